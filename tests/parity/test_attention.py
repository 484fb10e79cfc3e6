"""Attention against torch's own multi-head attention with the same weights."""

import torch
from torch import nn

from anomalib_vtfusion.components.encoder_attention import SelfAttention
from anomalib_vtfusion.components.fusion import CrossAttention, FusionLayer


def oracle(attention: CrossAttention) -> nn.MultiheadAttention:
    dim = attention.query.in_features
    reference = nn.MultiheadAttention(dim, attention.heads, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([attention.query.weight, attention.key_value.weight]),
            "in_proj_bias": torch.cat([attention.query.bias, attention.key_value.bias]),
            "out_proj.weight": attention.output.weight,
            "out_proj.bias": attention.output.bias,
        }
    )
    return reference


def randomised(module: nn.Module) -> nn.Module:
    """Random biases and norms, too, so that none of them is missed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def test_cross_attention():
    attention = randomised(CrossAttention(dim=24, heads=4))
    tokens = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    context = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    key = attention.norm_context(context)
    expected, _ = oracle(attention)(attention.norm_query(tokens), key, key)
    torch.testing.assert_close(attention(tokens, context), expected, rtol=1e-4, atol=1e-5)


def test_self_attention_of_a_vit():
    reference = randomised(nn.MultiheadAttention(24, 4, batch_first=True))
    attention = SelfAttention(reference)
    assert attention.state_dict().keys() == reference.state_dict().keys()
    tokens = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    expected, _ = reference(tokens, tokens, tokens)
    torch.testing.assert_close(attention(tokens, tokens, tokens)[0], expected, rtol=1e-4, atol=1e-5)


def test_fusion_layer_lets_the_text_read_first():
    layer = randomised(FusionLayer(dim=24, heads=4))
    image = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))

    def read(attention, tokens, context):
        context = attention.norm_context(context)
        return oracle(attention)(attention.norm_query(tokens), context, context)[0]

    expected_text = text + read(layer.text_from_image, text, image)
    expected_image = image + read(layer.image_from_text, image, expected_text)
    norm, first, activation, second = layer.mlp
    expected_image = expected_image + second(activation(first(norm(expected_image))))
    actual_image, actual_text = layer(image, text)
    torch.testing.assert_close(actual_text, expected_text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual_image, expected_image, rtol=1e-4, atol=1e-4)
