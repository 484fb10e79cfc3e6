"""Image encoders of timm: every way of naming one and its weights, and every way that can go wrong."""

import json
import logging
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from anomalib_vtfusion.components.encoders import VisionTextEncoder


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """An empty hub cache without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def build(encoder_folders):
    """Function that makes an encoder with this image encoder beside a small CLIP."""

    def make(image_encoder, image_weights=None, **arguments):
        clip = f"local-dir:{encoder_folders['vit']}"
        return VisionTextEncoder(clip, image_encoder=image_encoder, image_weights=image_weights, **arguments)

    return make


@pytest.fixture(scope="module")
def from_folder(build, vit_folders):
    return build(f"local-dir:{vit_folders['dinov2']}")


def put_in_hub_cache(cache, repo, name, content):
    """The layout huggingface_hub writes: refs/main names the snapshot that holds the files."""
    base = cache / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True, exist_ok=True)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text("0123456789abcdef")
    (snapshot / name).write_bytes(content)


def maps(encoder):
    generator = torch.Generator().manual_seed(0)
    return encoder.encode_image(torch.rand(1, 3, *encoder.image_size, generator=generator)).maps


class TestNames:
    def test_random_weights_are_always_the_same_and_leave_the_random_state_alone(self, build, caplog):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with caplog.at_level(logging.WARNING, "anomalib_vtfusion"):
            first = build("test_vit", "")
        torch.testing.assert_close(torch.rand(4), expected)
        assert [record.getMessage() for record in caplog.records] == [
            "image_encoder 'test_vit' has random weights: its features know nothing of images."
        ]
        torch.manual_seed(4)
        assert build("test_vit.r160_in1k", "").weights_hash == first.weights_hash
        assert (first.image_size, first.grids, first.vit.mean.flatten().tolist()) == (
            (160, 160),
            [(10, 10)] * 2,
            [0.5] * 3,
        )

    def test_random_weights_of_a_folder(self, build, vit_folders, from_folder):
        random = build(str(vit_folders["dinov2"]), "")
        assert random.weights_hash != from_folder.weights_hash

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("vit_base_patch14_reg4_dinov2.lvd142", r"with known ones: vit_base_patch14_reg4_dinov2\.lvd142m"),
            ("vit_base_patch14_reg_dinov2.lvd142m", r"did you mean .*vit_base_patch14_reg4_dinov2\.lvd142m"),
            ("vit_base_patch16_dinov33", r"did you mean .*vit_base_patch16_dinov3"),
            ("zzzzzzzz", r"see timm\.list_models"),
            ("", r"Unknown image_encoder \'\'"),
            ("resnet50", r"'resnet50' is not a plain ViT .*such as vit_base_patch14_reg4_dinov2"),
            ("swin_tiny_patch4_window7_224", "is not a plain ViT"),
        ],
    )
    def test_unknown_or_no_vit(self, build, name, hint):
        with pytest.raises(ValueError, match=hint):
            build(name, "")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"layers": [2, 6]}, r"Unknown layers \[6\]: this image tower has layers 0 to 5"),
            ({"layers": []}, "at least one layer"),
            ({"image_size": 100}, "100x100 does not divide into patches of 16x16; the nearest that does is 96x96"),
            ({"image_size": 8}, "smaller than one patch"),
        ],
    )
    def test_blocks_and_size_are_checked_before_weights_are_fetched(self, build, arguments, message):
        with pytest.raises(ValueError, match=message):
            build("test_vit", **arguments)

    def test_weights_without_an_image_encoder(self, build):
        with pytest.raises(ValueError, match=r"image_weights is 'some\.pt', but there is no image_encoder"):
            build(None, "some.pt")


class TestFiles:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_weights_file_gives_its_features(self, build, vit_folders, from_folder, tmp_path, suffix):
        state = load_file(vit_folders["dinov2"] / "model.safetensors")
        file = tmp_path / f"mine{suffix}"
        save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
        folder = tmp_path / "configuration-only"
        folder.mkdir()
        shutil.copy(vit_folders["dinov2"] / "config.json", folder)
        encoder = build(f"local-dir:{folder}", str(file))
        assert encoder.weights_hash == from_folder.weights_hash
        for actual, expected in zip(maps(encoder), maps(from_folder), strict=True):
            assert torch.equal(actual, expected)
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist; put it there.*image_weights="):
            build(f"local-dir:{folder}")

    def test_tag_from_the_hub_cache_without_its_classifier(self, build, hub, tmp_path):
        torch.manual_seed(5)
        classifier = timm.create_model("test_vit", num_classes=1000)
        save_file(classifier.state_dict(), tmp_path / "model.safetensors")
        put_in_hub_cache(
            hub, "timm/test_vit.r160_in1k", "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
        )
        encoder = build("test_vit", layers=[0])
        state = classifier.state_dict()
        for name, tensor in encoder.vit.vit.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert build("test_vit", str(tmp_path / "model.safetensors")).weights_hash == encoder.weights_hash

    def test_repository_from_the_hub_cache(self, build, hub, vit_folders, from_folder):
        for name in ("config.json", "model.safetensors"):
            put_in_hub_cache(hub, "someone/vit", name, (vit_folders["dinov2"] / name).read_bytes())
        assert build("hf-hub:someone/vit").weights_hash == from_folder.weights_hash

    @pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2.lvd142m", "hf-hub:someone/nothing"])
    def test_missing_and_offline(self, build, hub, name, monkeypatch):
        monkeypatch.setattr(
            "anomalib_vtfusion.components.encoder_vit.build_vit", lambda source: timm.create_model("test_vit")
        )
        with pytest.raises(FileNotFoundError) as caught:
            build(name)
        file = "config.json of" if name.startswith("hf-hub") else "model.safetensors of"
        repo = name.removeprefix("hf-hub:") if name.startswith("hf-hub") else f"timm/{name}"
        way_out = "local-dir:PATH" if name.startswith("hf-hub") else "image_weights="
        for part in (file, repo, str(hub), "hf download", way_out, "or leave image_encoder out"):
            assert part in str(caught.value)

    def test_model_without_weights_of_its_own(self, build):
        with pytest.raises(
            ValueError, match=r"has no weights of its own: set image_weights to a file .*\"\" for random"
        ):
            build("vit_small_patch16_36x1_224")

    def test_weights_of_another_model_part_of_them_or_none(self, build, vit_folders, tmp_path):
        name = f"local-dir:{vit_folders['dinov2']}"
        with pytest.raises(ValueError, match=r"does not hold weights of image_encoder 'local-dir:.*dinov2'"):
            build(name, str(vit_folders["dinov3"] / "model.safetensors"))
        state = load_file(vit_folders["dinov2"] / "model.safetensors")
        for wrong, found in (
            ({key: value for key, value in state.items() if key != "reg_token"}, r"missing \['reg_token'\]"),
            (state | {"blocks.9.norm1.weight": torch.zeros(1)}, r"unexpected \['blocks\.9\.norm1\.weight'\]"),
        ):
            save_file(wrong, tmp_path / "wrong.safetensors")
            with pytest.raises(ValueError, match=found):
                build(name, str(tmp_path / "wrong.safetensors"))
        (tmp_path / "junk.pt").write_bytes(b"these are not weights")
        with pytest.raises(ValueError, match="does not hold weights"):
            build(name, str(tmp_path / "junk.pt"))

    def test_missing_file_or_folder(self, build, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist.*or leave image_encoder out"):
            build("test_vit", str(tmp_path / "nothing.pt"))
        with pytest.raises(FileNotFoundError, match=r"config\.json does not exist: a folder of image_encoder holds"):
            build(f"local-dir:{tmp_path / 'nowhere'}")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("not json", "is not a timm configuration"),
            ("[]", "is not a timm configuration"),
            ({"architecture": "vit_tiny_patch16_225"}, r"unknown architecture 'vit_tiny_patch16_225': did you mean"),
            ({"architecture": "resnet18"}, "is not a plain ViT"),
            ({"architecture": "test_vit", "model_args": {"no_such": 1}, "pretrained_cfg": {}}, "timm cannot build"),
        ],
    )
    def test_bad_configuration(self, build, tmp_path, content, message):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            build(str(tmp_path), "")
