"""Encoders: small random towers of every kind, and every way images, layers and prompts can be wrong."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from anomalib_vtfusion.components.encoders import VisionTextEncoder

EXPECTED = {  # layers, channels, grids, token grid, number of layers
    "vit": ((0, 1, 2), [64, 64, 64], [(4, 4)] * 3, (4, 4), 3),
    "timm": ((2, 3), [128, 256], [(8, 8), (4, 4)], (2, 2), 5),
    "resnet": ((2, 3), [64, 128], [(8, 8), (4, 4)], (2, 2), 5),
}
KINDS = list(EXPECTED)


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_attributes_describe_the_features(self, encoders, images, kind):
        encoder = encoders[kind]
        layers, channels, grids, token_grid, _ = EXPECTED[kind]
        assert (encoder.layers, encoder.channels, encoder.grids) == (layers, channels, grids)
        assert (encoder.token_grid, encoder.embed_dim, encoder.image_size) == (token_grid, 32, (64, 64))
        assert (encoder.text_width, encoder.context_length) == (64, 16)
        assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
        features = encoder.encode_image(images)
        assert [tuple(feature.shape) for feature in features.maps] == [
            (2, c, *g) for c, g in zip(channels, grids, strict=True)
        ]
        assert features.tokens.shape == (2, 32, *token_grid)
        torch.testing.assert_close(features.tokens.norm(dim=1), torch.ones(2, *token_grid))
        torch.testing.assert_close(features.pooled.norm(dim=1), torch.ones(2))
        assert not features.tokens.requires_grad

    def test_one_pass_of_the_tower(self, encoders, images, kind):
        encoder, calls = encoders[kind], []
        stem = {"vit": "conv1", "timm": "trunk.conv1.0", "resnet": "conv1"}[kind]
        handle = encoder.image.visual.get_submodule(stem).register_forward_hook(lambda *_: calls.append(1))
        encoder.encode_image(images)
        handle.remove()
        assert calls == [1]

    def test_images_are_independent_of_their_batch(self, encoders, images, kind):
        together, alone = encoders[kind].encode_image(images), encoders[kind].encode_image(images[1:])
        torch.testing.assert_close(together.tokens[1:], alone.tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.maps[0][1:], alone.maps[0], rtol=1e-4, atol=1e-4)

    def test_chosen_layers_come_in_order(self, encoder_folders, encoders, images, kind):
        count = EXPECTED[kind][-1]
        chosen = VisionTextEncoder(f"local-dir:{encoder_folders[kind]}", layers=[2, 0])
        everything = VisionTextEncoder(f"local-dir:{encoder_folders[kind]}", layers=range(count))
        assert chosen.layers == (0, 2)
        all_maps, maps = everything.encode_image(images).maps, chosen.encode_image(images).maps
        assert len(all_maps) == count
        torch.testing.assert_close(maps, [all_maps[0], all_maps[2]])
        torch.testing.assert_close(chosen.encode_image(images).pooled, encoders[kind].encode_image(images).pooled)

    @pytest.mark.parametrize("layers", [[0, 9], [-1], [True]])
    def test_unknown_layer(self, encoder_folders, kind, layers):
        with pytest.raises(ValueError, match=f"layers 0 to {EXPECTED[kind][-1] - 1}"):
            VisionTextEncoder(f"local-dir:{encoder_folders[kind]}", layers=layers)

    @pytest.mark.parametrize("layers", [[], [1, 1]])
    def test_no_layer_or_one_twice(self, encoder_folders, kind, layers):
        with pytest.raises(ValueError, match="each once"):
            VisionTextEncoder(f"local-dir:{encoder_folders[kind]}", layers=layers)

    def test_non_square_images(self, encoder_folders, encoders, kind):
        encoder = VisionTextEncoder(f"local-dir:{encoder_folders[kind]}", image_size=(96, 128))
        grids = [(h * 3 // 2, w * 2) for h, w in encoders[kind].grids]
        assert encoder.grids == grids
        features = encoder.encode_image(torch.rand(1, 3, 96, 128))
        assert [tuple(feature.shape[2:]) for feature in features.maps] == grids
        assert tuple(features.tokens.shape[2:]) == encoder.token_grid
        assert encoder.weights_hash == encoders[kind].weights_hash

    def test_image_smaller_than_a_patch(self, encoder_folders, kind):
        with pytest.raises(ValueError, match="smaller than one patch"):
            VisionTextEncoder(f"local-dir:{encoder_folders[kind]}", image_size=8)

    def test_frozen_and_in_eval_mode(self, encoders, images, kind):
        encoder = encoders[kind]
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        assert encoder.train() is encoder
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        parent = torch.nn.Sequential(encoder)
        parent.train()
        assert not any(module.training for module in encoder.modules())
        encoder.encode_image(images)
        torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)

    def test_exports_with_a_free_batch_size(self, encoders, images, kind):
        class Pooled(torch.nn.Module):
            def __init__(self, encoder):
                super().__init__()
                self.encoder = encoder

            def forward(self, images):
                features = self.encoder.encode_image(images)
                return features.tokens, features.pooled

        model = Pooled(encoders[kind])
        dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
        more = torch.rand(5, 3, 64, 64)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_traces_without_fused_attention(self, encoders, kind):
        """The TorchScript-based ONNX exporter has no translation for it."""
        encoder = encoders[kind]

        def pooled(images):
            return encoder.encode_image(images).pooled

        traced = torch.jit.trace(pooled, torch.rand(2, 3, 64, 64), check_trace=False)
        assert "_native_multi_head_attention" not in str(traced.inlined_graph)
        assert torch.backends.mha.get_fastpath_enabled()
        more = torch.rand(3, 3, 64, 64)
        torch.testing.assert_close(traced(more), pooled(more), rtol=1e-4, atol=1e-5)

    def test_text_prompts(self, encoders, kind):
        encoder = encoders[kind]
        prompts = ["a metal nut", "a scratch", "a photo of the cookie with a hole"]
        assert encoder.tokenize(prompts).shape == (3, 16)
        embeddings = encoder.encode_text(prompts)
        assert embeddings.shape == (3, 32)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(encoder.encode_text(prompts[1:2]), embeddings[1:2])
        assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3

    def test_gradients_flow_to_the_context_only(self, encoders, kind):
        encoder = encoders[kind]
        context = torch.zeros(3, 64, requires_grad=True)
        encoder.encode_text_with_context(["a metal nut", "a scratch"], context)[:, 0].sum().backward()
        assert (context.grad.abs().sum(dim=1) > 0).all()
        assert all(parameter.grad is None for parameter in encoder.parameters())
        none = encoder.encode_text_with_context(["a nut"], torch.zeros(0, 64))
        torch.testing.assert_close(none, encoder.encode_text(["a nut"]))


def test_normalisation_comes_from_the_folder(encoders):
    seen = []
    original = encoders["vit"].image.visual.forward_intermediates
    encoders["vit"].image.visual.forward_intermediates = lambda x, **kwargs: seen.append(x) or original(x, **kwargs)
    try:
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
        encoders["vit"].encode_image((mean + std).expand(1, 3, 64, 64))
    finally:
        del encoders["vit"].image.visual.forward_intermediates
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 64, 64))


def test_vit_image_size_must_divide_into_patches(encoder_folders):
    with pytest.raises(ValueError, match="nearest that does is 96x64"):
        VisionTextEncoder(f"local-dir:{encoder_folders['vit']}", image_size=(100, 64))


@pytest.mark.parametrize("size", [0, -64, (64,), (64, 64, 64), (64, 0)])
def test_image_size_must_be_a_size(encoder_folders, size):
    with pytest.raises(ValueError, match="image_size"):
        VisionTextEncoder(f"local-dir:{encoder_folders['vit']}", image_size=size)


def test_images_of_another_size(encoders):
    with pytest.raises(ValueError, match="Expected images"):
        encoders["vit"].encode_image(torch.rand(1, 3, 32, 64))
    with pytest.raises(ValueError, match="Expected images"):
        encoders["vit"].encode_image(torch.rand(1, 1, 64, 64))


def test_long_prompt_ensembles_equal_single_prompts(encoders):
    prompts = [f"part number {index}" for index in range(300)]
    embeddings = encoders["vit"].encode_text(prompts)
    torch.testing.assert_close(
        embeddings[[0, 255, 256, 299]], encoders["vit"].encode_text([prompts[i] for i in (0, 255, 256, 299)])
    )


def test_bad_prompts_and_contexts(encoders):
    encoder = encoders["vit"]
    with pytest.raises(TypeError, match="sequence"):
        encoder.encode_text("a single string")
    for prompts in ([], [" "]):
        with pytest.raises(ValueError, match="at least one prompt"):
            encoder.encode_text(prompts)
    with pytest.raises(ValueError, match="context must be"):
        encoder.encode_text_with_context(["a nut"], torch.zeros(4, 63))
    with pytest.raises(ValueError, match="no room"):
        encoder.encode_text_with_context(["a nut"], torch.zeros(14, 64))


def test_dropped_text_tower_is_loaded_again_when_needed(encoder_folders):
    encoder = VisionTextEncoder(f"local-dir:{encoder_folders['vit']}")
    digest, count = encoder.weights_hash, sum(p.numel() for p in encoder.parameters())
    expected = encoder.encode_text(["a nut"])
    encoder.drop_text_tower()
    assert sum(p.numel() for p in encoder.parameters()) < count - 49408 * 64
    assert encoder.weights_hash == digest
    encoder.encode_image(torch.rand(1, 3, 64, 64))
    assert encoder.text is None
    assert torch.equal(encoder.encode_text(["a nut"]), expected)
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert not any(p.requires_grad for p in encoder.parameters())


def test_dropped_text_tower_must_not_change(encoder_folders, tmp_path):
    folder = shutil.copytree(encoder_folders["vit"], tmp_path / "tower")
    encoder = VisionTextEncoder(str(folder))
    encoder.drop_text_tower()
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    state["logit_scale"] += 1
    save_file(state, weights)
    with pytest.raises(ValueError, match="have changed"):
        encoder.encode_text(["a nut"])


@pytest.mark.parametrize(
    ("name", "size", "dim", "channels", "grids"),
    [
        ("ViT-B-16-plus-240", (240, 240), 640, [896] * 4, [(15, 15)] * 4),
        ("ViT-L-14-336", (336, 336), 768, [1024] * 4, [(24, 24)] * 4),
        ("RN50", (224, 224), 1024, [512, 1024], [(28, 28), (14, 14)]),
        ("MobileCLIP2-S0", (256, 256), 512, [128, 256], [(32, 32), (16, 16)]),
    ],
)
def test_known_towers_can_be_built(monkeypatch, name, size, dim, channels, grids):
    # Filling and hashing hundreds of millions of numbers is most of the time and says nothing about these shapes.
    for filler in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, filler, lambda tensor, *args, **kwargs: tensor)
    monkeypatch.setattr("anomalib_vtfusion.components.encoders.hash_state", lambda states: "0" * 64)
    encoder = VisionTextEncoder(name, weights="")
    assert (encoder.image_size, encoder.embed_dim, encoder.channels, encoder.grids) == (size, dim, channels, grids)
    assert encoder.context_length == 77
