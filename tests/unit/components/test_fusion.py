"""Fusion block: the identity before training, a gate between 0 and 1, and gradients to both modalities."""

import pytest
import torch

from anomalib_vtfusion.components.fusion import CrossAttention, EvidenceGate, FusionBlock


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 3, 4), (2, 5, 16), (2, 3, 3, 4))  # fused map, text tokens, evidence
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make(seed=0):
    torch.manual_seed(seed)
    return FusionBlock(dim=16, evidence=3)


class TestFusionBlock:
    def test_image_features_pass_unchanged_at_first(self, inputs):
        fused, text = make()(*inputs)
        assert torch.equal(fused, inputs[0])
        assert text.shape == inputs[1].shape
        assert not torch.equal(text, inputs[1])

    def test_strength_learns_from_the_start_and_the_rest_follows(self, inputs):
        block = make()
        block(*inputs)[0].square().sum().backward()
        assert block.strength.grad.abs().min() > 0
        torch.nn.init.ones_(block.strength)
        block.zero_grad()
        block(*inputs)[0].square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())

    def test_image_features_then_depend_on_the_text_and_on_the_evidence(self, inputs):
        block = make()
        torch.nn.init.ones_(block.strength)
        fused = block(*inputs)[0]
        for changed in (1, 2):
            other = [value.flip(0) if i == changed else value for i, value in enumerate(inputs)]
            assert (block(*other)[0] - fused).abs().max() > 1e-3

    def test_a_shut_gate_keeps_the_image_features(self, inputs):
        """The answer to a misaligned modality: nothing of the exchange gets through."""
        block = make()
        torch.nn.init.ones_(block.strength)
        torch.nn.init.constant_(block.gate.spatial[-1].bias, -1e4)
        assert torch.equal(block(*inputs)[0], inputs[0])

    def test_images_do_not_mix(self, inputs):
        block = make()
        torch.nn.init.ones_(block.strength)
        both = block(*inputs)
        alone = block(*(value[1:] for value in inputs))
        torch.testing.assert_close(both[0][1:], alone[0])
        torch.testing.assert_close(both[1][1:], alone[1])


def test_gate_is_a_product_of_two_shares(inputs):
    torch.manual_seed(0)
    gate = EvidenceGate(dim=16, evidence=3)
    image, text, evidence = inputs[0].flatten(2).mT, inputs[1].mean(dim=1), inputs[2].flatten(2).mT
    values = gate(10 * image, 10 * text, 10 * evidence)
    assert values.shape == (2, 12, 16)
    assert values.min() >= 0
    assert values.max() <= 1
    # Rank one for each image: the same channels everywhere, the same places in every channel.
    torch.testing.assert_close(
        values, values.sum(dim=1, keepdim=True) * values.sum(dim=2, keepdim=True) / values.sum(dim=(1, 2), keepdim=True)
    )


def test_width_must_be_divisible_by_heads():
    with pytest.raises(RuntimeError):
        CrossAttention(dim=6, heads=4)(torch.rand(1, 2, 6), torch.rand(1, 3, 6))
