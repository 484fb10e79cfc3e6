"""The encoder against open_clip itself, on the same weights: pooled images, texts, layers, sizes and dense tokens."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from anomalib_vtfusion.components.encoders import VisionTextEncoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160}
MODELS = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "vit, mean pooled": {"vision_cfg": VIT | {"pool_type": "avg", "final_ln_after_pool": True}, "text_cfg": TEXT},
    "vit, QuickGELU": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "resnet": {
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64},
        "text_cfg": TEXT | {"pool_type": "last"},
        "custom_text": True,
    },
    "timm resnet": {
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": TEXT | {"no_causal_mask": True},
        "custom_text": True,
    },
    "timm projecting": {
        "vision_cfg": {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None, "image_size": 64},
        "text_cfg": TEXT,
    },
    "timm convnext": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        "text_cfg": TEXT,
    },
    "timm vit, token": {"vision_cfg": TIMM_VIT | {"timm_pool": "token"}, "text_cfg": TEXT},
    "timm vit, average": {"vision_cfg": TIMM_VIT | {"timm_pool": "avg"}, "text_cfg": TEXT},
    "timm vit, attention": {
        "embed_dim": 64,
        "vision_cfg": TIMM_VIT | {"timm_pool": "map", "timm_proj": "none"},
        "text_cfg": TEXT,
    },
    "coca": {
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
        | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
}
PROMPTS = [
    "a photo of a metal nut.",
    "a scratch",
    "a close-up photo of the hazelnut with a hole and more words than fit",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Build, once per model, the encoder and open_clip's own model from the same folder."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            config = {"model_cfg": {"embed_dim": 32, **json.loads(json.dumps(MODELS[name]))}, "preprocess_cfg": {}}
            (folder / "open_clip_config.json").write_text(json.dumps(config))
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
                for parameter in model.parameters():  # nothing may hide behind a zero or a one
                    parameter.data.add_(0.02 * torch.randn_like(parameter))
            save_file(
                {key: value.contiguous() for key, value in model.state_dict().items()},
                folder / "open_clip_model.safetensors",
            )
            made[name] = (VisionTextEncoder(f"local-dir:{folder}"), model, folder)
        return made[name]

    return make


def some_images(encoder):
    images = torch.rand(2, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))
    return images, (images - encoder.mean) / encoder.std


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_images_and_texts(pair, name):
    encoder, model, _ = pair(name)
    images, normalised = some_images(encoder)
    expected = model.encode_image(normalised, normalize=True)
    torch.testing.assert_close(encoder.encode_image(images).pooled, expected, rtol=1e-4, atol=1e-5)
    expected = model.encode_text(open_clip.tokenize(PROMPTS, context_length=16), normalize=True)
    torch.testing.assert_close(encoder.encode_text(PROMPTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layers(pair, name):
    encoder, model, _ = pair(name)
    images, normalised = some_images(encoder)
    expected = model.visual.forward_intermediates(normalised, indices=list(encoder.layers), intermediates_only=True)
    torch.testing.assert_close(encoder.encode_image(images).maps, expected["image_intermediates"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_context_equal_to_words_is_those_words(pair, name):
    encoder, model, _ = pair(name)
    words = open_clip.tokenize(["red big"], context_length=16)[0, 1:3]
    embedding = model.text.token_embedding if hasattr(model, "text") else model.token_embedding
    context = embedding(words)
    with_context = encoder.encode_text_with_context(["metal nut", "a cookie with a hole " * 4], context)
    as_words = encoder.encode_text(["red big metal nut", "red big " + "a cookie with a hole " * 4])
    torch.testing.assert_close(with_context, as_words, rtol=1e-4, atol=1e-5)
    assert (with_context - encoder.encode_text(["metal nut", "a cookie"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["timm resnet", "timm vit, average"])
@torch.no_grad()
def test_average_of_dense_tokens_is_the_pooled_embedding(pair, name):
    encoder, _, _ = pair(name)
    _, normalised = some_images(encoder)
    _, tokens, pooled = encoder.image(normalised)
    torch.testing.assert_close(tokens.mean(dim=(2, 3)), pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vit_tokens_are_the_towers_own_projected_patches(pair):
    encoder, model, _ = pair("vit")
    images, normalised = some_images(encoder)
    model.visual.output_tokens = True
    _, patches = model.visual(normalised)
    model.visual.output_tokens = False
    expected = F.normalize(patches @ model.visual.proj, dim=-1).transpose(1, 2).reshape(2, 32, 4, 4)
    torch.testing.assert_close(encoder.encode_image(images).tokens, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_resnet_tokens_are_attention_to_one_location(pair):
    """Attention over one key returns its value whatever the query: the pool, shown one location, gives the token."""
    encoder, model, _ = pair("resnet")
    images, normalised = some_images(encoder)
    last = model.visual.forward_intermediates(normalised, indices=[4])["image_intermediates"][0]
    pool = model.visual.attnpool
    key = last[:, :, 1, 0].unsqueeze(0)
    expected, _ = F.multi_head_attention_forward(
        torch.randn_like(key),
        key,
        key,
        embed_dim_to_check=key.shape[-1],
        num_heads=pool.num_heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        training=False,
    )
    tokens = encoder.encode_image(images).tokens
    torch.testing.assert_close(tokens[:, :, 1, 0], F.normalize(expected[0], dim=-1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_pooled_tokens_are_attention_to_one_patch(pair):
    encoder, model, _ = pair("coca")
    images, normalised = some_images(encoder)
    visual = model.visual
    last = visual.forward_intermediates(normalised, indices=[1])["image_intermediates"][0]
    pooled, _ = visual._pool(last[:, :, 2, 3].unsqueeze(1))
    expected = F.normalize(pooled @ visual.proj, dim=-1)
    torch.testing.assert_close(encoder.encode_image(images).tokens[:, :, 2, 3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [("vit", (96, 64)), ("timm vit, token", (96, 64)), ("timm resnet", (96, 80))]
)
@torch.no_grad()
def test_other_image_sizes(pair, name, size):
    _, _, folder = pair(name)
    if name.startswith("timm vit"):  # open_clip can resize timm towers only after loading them at their own size
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        model.visual.set_input_size(size)
    else:
        model = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()
    encoder = VisionTextEncoder(f"local-dir:{folder}", image_size=size)
    images, normalised = some_images(encoder)
    expected = model.encode_image(normalised, normalize=True)
    torch.testing.assert_close(encoder.encode_image(images).pooled, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_quick_gelu_follows_the_tag(pair, monkeypatch):
    """A tag trained with QuickGELU gives under the plain name what open_clip gives under the '-quickgelu' name."""
    encoder, model, folder = pair("vit, QuickGELU")
    plain = {"embed_dim": 32, **MODELS["vit"]}
    tag = {
        "hf_hub": "someone/model/",
        "mean": tuple(encoder.mean.flatten().tolist()),
        "std": tuple(encoder.std.flatten().tolist()),
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-vit", plain)
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "small-vit", {"quick": tag | {"quick_gelu": True}, "exact": dict(tag)}
    )
    monkeypatch.setattr(
        "anomalib_vtfusion.components.encoder_weights.hub_file", lambda *_: folder / "open_clip_model.safetensors"
    )
    images, normalised = some_images(encoder)
    quick, exact = (VisionTextEncoder("small-vit", weights=weights) for weights in ("quick", "exact"))
    expected = model.encode_image(normalised, normalize=True)
    torch.testing.assert_close(quick.encode_image(images).pooled, expected, rtol=1e-4, atol=1e-5)
    assert (exact.encode_image(images).pooled - expected).abs().max() > 1e-4
