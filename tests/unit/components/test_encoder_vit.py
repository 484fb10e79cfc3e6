"""A timm ViT beside the CLIP towers: what its maps are, how the grids meet, and what changes for the rest."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from anomalib_vtfusion.components.encoder_vit import AntialiasedResize
from anomalib_vtfusion.components.encoders import VisionTextEncoder

KINDS = ["dinov2", "dinov3", "plain"]
PATCH = {"dinov2": 14, "dinov3": 16, "plain": 16}
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]
CLIP_SIDE = 64


@pytest.fixture(scope="module")
def clip(encoder_folders):
    return f"local-dir:{encoder_folders['vit']}"


@pytest.fixture(scope="module")
def make(clip, vit_folders):
    """Function that makes an encoder with a small image encoder of its own weights."""

    def build(kind="dinov2", **arguments):
        return VisionTextEncoder(clip, image_encoder=f"local-dir:{vit_folders[kind]}", **arguments)

    return build


@pytest.fixture(scope="module")
def strong(make):
    return {kind: make(kind) for kind in KINDS}


def some_images(size, count=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def blocks_by_hooks(folder, images):
    """Patch tokens after every block of timm's own model, as ``(B, C, h, w)``."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.set_input_size(tuple(images.shape[-2:]))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    model((images - mean) / std)
    grid = [side // patch for side, patch in zip(images.shape[-2:], model.patch_embed.patch_size, strict=True)]
    return [output[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid) for output in outputs]


class TestMaps:
    @pytest.mark.parametrize("kind", KINDS)
    @torch.no_grad()
    def test_are_the_means_of_the_middle_blocks(self, strong, vit_folders, kind):
        encoder = strong[kind]
        images = some_images(encoder.image_size)
        assert encoder.layers == ((1, 2, 3, 4) if kind != "plain" else (0, 1, 2, 3, 4))
        blocks = blocks_by_hooks(vit_folders[kind], images)
        half = len(encoder.layers) // 2
        lower, upper = encoder.layers[:half], encoder.layers[half:]
        expected = [sum(blocks[i] for i in group) / len(group) for group in (lower, upper)]
        maps = encoder.encode_image(images).maps
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
        assert (maps[0] - maps[1]).abs().max() > 1e-2

    @pytest.mark.parametrize(("kind", "size"), [("dinov2", (84, 56)), ("dinov3", (96, 64)), ("plain", (96, 80))])
    @torch.no_grad()
    def test_at_another_size(self, make, vit_folders, kind, size):
        encoder = make(kind, image_size=size, layers=[3, 0, 1])
        images, patch = some_images(size), PATCH[kind]
        assert encoder.image_size == size
        assert encoder.grids == [(size[0] // patch, size[1] // patch)] * 2 == [encoder.token_grid] * 2
        blocks = blocks_by_hooks(vit_folders[kind], images)
        expected = [blocks[0], (blocks[1] + blocks[3]) / 2]
        torch.testing.assert_close(encoder.encode_image(images).maps, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_of_a_single_block(self, make, vit_folders):
        encoder, images = make(layers=[2]), some_images((56, 56))
        (only,) = encoder.encode_image(images).maps
        assert (encoder.channels, encoder.grids) == ([48], [(4, 4)])
        torch.testing.assert_close(only, blocks_by_hooks(vit_folders["dinov2"], images)[2], rtol=1e-4, atol=1e-5)

    def test_need_no_block_after_the_last(self, strong):
        assert len(strong["dinov2"].vit.vit.blocks) == 5

    def test_twelve_blocks_make_two_groups_of_four(self, clip):
        encoder = VisionTextEncoder(clip, image_encoder="vit_tiny_patch16_224", image_weights="", image_size=32)
        assert encoder.vit.groups == [(2, 3, 4, 5), (6, 7, 8, 9)]

    def test_images_of_another_size_are_refused(self, strong):
        with pytest.raises(ValueError, match=r"Expected images \(B, 3, 56, 56\), got \(1, 3, 64, 64\)"):
            strong["dinov2"].encode_image(torch.rand(1, 3, 64, 64))


class TestJointSpace:
    @torch.no_grad()
    def test_is_that_of_the_clip_tower_at_its_own_size(self, make, encoders):
        encoder, alone = make(image_size=112), encoders["vit"]
        images = some_images((112, 112))
        resized = F.interpolate(images, (CLIP_SIDE, CLIP_SIDE), mode="bilinear", antialias=True, align_corners=False)
        features, expected = encoder.encode_image(images), alone.encode_image(resized)
        torch.testing.assert_close(features.pooled, expected.pooled, rtol=1e-4, atol=1e-5)
        tokens = F.interpolate(expected.tokens, (8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(features.tokens, F.normalize(tokens, dim=1), rtol=1e-4, atol=1e-5)
        assert encoder.embed_dim == alone.embed_dim
        prompts = ["a nut", "a scratched nut"]
        assert torch.equal(encoder.encode_text(prompts), alone.encode_text(prompts))

    @pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
    @torch.no_grad()
    def test_same_place_of_both_grids_shows_the_same_part(self, make, corner):
        """What one quarter of the image shows changes that quarter of the maps and of the tokens most."""
        encoder = make(image_size=112, layers=[0, 1])
        plain = torch.full((1, 3, 112, 112), 0.5)
        marked = plain.clone()
        top, left = (14 + 56 * side for side in corner)
        marked[:, :, top : top + 28, left : left + 28] = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1)
        before, after = encoder.encode_image(plain), encoder.encode_image(marked)
        for old, new in zip([*before.maps, before.tokens], [*after.maps, after.tokens], strict=True):
            change = F.adaptive_avg_pool2d((new - old).norm(dim=1), 2)[0]
            assert divmod(int(change.argmax()), 2) == corner

    @pytest.mark.parametrize(("size", "new_size"), [((112, 84), (64, 64)), ((56, 42), (64, 96)), ((64, 64), (64, 64))])
    def test_resizing_is_that_of_torch(self, size, new_size):
        images = some_images(size)
        expected = F.interpolate(images, new_size, mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(AntialiasedResize(size, new_size)(images), expected, rtol=1e-5, atol=1e-6)


class TestFrozen:
    def test_stays_in_eval_mode_without_gradients(self, strong):
        encoder = strong["dinov2"]
        torch.nn.Sequential(encoder).train()
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert not encoder.encode_image(some_images((56, 56))).maps[0].requires_grad

    def test_text_tower_is_loaded_again(self, make):
        encoder = make()
        digest, expected = encoder.weights_hash, encoder.encode_text(["a nut"])
        encoder.drop_text_tower()
        assert torch.equal(encoder.encode_text(["a nut"]), expected)
        assert encoder.weights_hash == digest


class TestHash:
    def test_covers_both_towers(self, make, strong, encoders, write_encoder_folder, vit_folders, tmp_path):
        digest = strong["dinov2"].weights_hash
        assert len({digest, strong["dinov3"].weights_hash, encoders["vit"].weights_hash}) == 3
        state = load_file(vit_folders["dinov2"] / "model.safetensors")
        state["reg_token"][0, 0, 0] += 1
        save_file(state, tmp_path / "other.safetensors")
        assert make(image_weights=str(tmp_path / "other.safetensors")).weights_hash != digest
        other_clip = write_encoder_folder(tmp_path / "clip", "vit", seed=2)
        other = VisionTextEncoder(str(other_clip), image_encoder=str(vit_folders["dinov2"]))
        assert other.weights_hash != digest

    def test_names_the_weights_whatever_the_size_and_the_blocks(self, make, strong):
        assert make(image_size=(84, 56), layers=[0, 1]).weights_hash == strong["dinov2"].weights_hash

    def test_name_tells_both(self, make, clip, vit_folders):
        assert make("plain").name == f"{clip} with local-dir:{vit_folders['plain']}"


@pytest.mark.parametrize("kind", KINDS)
class TestExport:
    def test_with_a_free_batch_size(self, strong, kind):
        class Features(torch.nn.Module):
            def __init__(self, encoder):
                super().__init__()
                self.encoder = encoder

            def forward(self, images):
                features = self.encoder.encode_image(images)
                return *features.maps, features.tokens

        model, size = Features(strong[kind]), strong[kind].image_size
        dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(model, (some_images(size),), dynamic_shapes=dynamic)
        more = some_images(size, count=5)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_traced(self, strong, kind):
        encoder = strong[kind]

        def features(images):
            found = encoder.encode_image(images)
            return *found.maps, found.tokens

        traced = torch.jit.trace(features, some_images(encoder.image_size), check_trace=False)
        more = some_images(encoder.image_size, count=3)
        torch.testing.assert_close(traced(more), features(more), rtol=1e-4, atol=1e-5)
