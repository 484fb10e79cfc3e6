"""Weights: every way of naming an encoder and its weights, and every way that can go wrong."""

import logging
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from anomalib_vtfusion.components.encoders import VisionTextEncoder


@pytest.fixture
def hub(monkeypatch, tmp_path, encoder_config):
    """A small model registered with open_clip, with tags on the hub, and an empty hub cache without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tags = {
        "plain": {"hf_hub": "someone/small-clip/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        "quick": {"hf_hub": "someone/small-clip/", "mean": (0, 0, 0), "std": (1, 1, 1), "quick_gelu": True},
        "named": {"hf_hub": "someone/small-clip/special.bin", "mean": (0, 0, 0), "std": (1, 1, 1)},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-vit", encoder_config("vit"))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-vit", tags)
    return tmp_path / "hub"


def put_in_hub_cache(cache: Path, repo: str, files: dict[str, Path]) -> None:
    """The layout huggingface_hub writes: refs/main names the snapshot that holds the files."""
    base = cache / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0123456789abcdef")
    snapshot = base / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    for name, source in files.items():
        (snapshot / name).write_bytes(source.read_bytes())


class TestFolders:
    def test_hash_is_that_of_the_weights(self, write_encoder_folder, encoder_folders, encoders, tmp_path):
        again = VisionTextEncoder(str(encoder_folders["vit"]))
        assert again.weights_hash == encoders["vit"].weights_hash
        assert len(again.weights_hash) == 64
        other = VisionTextEncoder(f"local-dir:{write_encoder_folder(tmp_path / 'other', 'vit', seed=2)}")
        assert other.weights_hash != again.weights_hash

    def test_named_by_its_weights_file(self, encoder_folders, encoders):
        encoder = VisionTextEncoder(str(encoder_folders["vit"] / "open_clip_model.safetensors"))
        assert encoder.weights_hash == encoders["vit"].weights_hash
        assert encoder.name == str(encoder_folders["vit"] / "open_clip_model.safetensors")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
    def test_weights_file_in_place_of_its_own(self, encoder_folders, encoders, tmp_path, suffix):
        state = load_file(encoder_folders["vit"] / "open_clip_model.safetensors")
        state["visual.proj"] = state["visual.proj"] + 1
        file = tmp_path / f"mine{suffix}"
        save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
        encoder = VisionTextEncoder(f"local-dir:{encoder_folders['vit']}", weights=str(file))
        torch.testing.assert_close(encoder.image.visual.proj, encoders["vit"].image.visual.proj + 1)

    def test_half_precision_weights(self, encoder_folders, encoders, tmp_path):
        state = load_file(encoder_folders["timm"] / "open_clip_model.safetensors")
        file = tmp_path / "half.safetensors"
        save_file({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, file)
        encoder = VisionTextEncoder(f"local-dir:{encoder_folders['timm']}", weights=str(file))
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        x = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(
            encoder.encode_image(x).pooled, encoders["timm"].encode_image(x).pooled, atol=5e-3, rtol=0
        )

    def test_missing(self, tmp_path, encoder_folders):
        with pytest.raises(FileNotFoundError, match=r'open_clip_config.json.*encoder="vtfusion-tiny"'):
            VisionTextEncoder(f"local-dir:{tmp_path}/nothing")
        config_only = tmp_path / "config_only"
        config_only.mkdir()
        (config_only / "open_clip_config.json").write_bytes(
            (encoder_folders["vit"] / "open_clip_config.json").read_bytes()
        )
        with pytest.raises(FileNotFoundError, match=r'open_clip_model.safetensors does not exist.*"vtfusion-tiny"'):
            VisionTextEncoder(f"local-dir:{config_only}")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            VisionTextEncoder(str(tmp_path / "nothing.safetensors"))

    @pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"model_cfg": {"embed_dim": 3}}'])
    def test_bad_configuration(self, tmp_path, content):
        (tmp_path / "open_clip_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"model_cfg|configuration"):
            VisionTextEncoder(str(tmp_path))


class TestWrongFiles:
    def test_weights_of_another_model(self, encoder_folders):
        with pytest.raises(ValueError, match=r"vit.*does not hold weights of encoder 'local-dir:.*resnet'"):
            VisionTextEncoder(
                f"local-dir:{encoder_folders['resnet']}",
                weights=str(encoder_folders["vit"] / "open_clip_model.safetensors"),
            )

    @pytest.mark.parametrize("name", ["junk.safetensors", "junk.pt", "empty.pt"])
    def test_not_weights_at_all(self, encoder_folders, tmp_path, name):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"these are not weights")
        with pytest.raises(ValueError, match="does not hold weights"):
            VisionTextEncoder(f"local-dir:{encoder_folders['vit']}", weights=str(tmp_path / name))

    def test_part_of_the_weights(self, encoder_folders, tmp_path):
        state = load_file(encoder_folders["vit"] / "open_clip_model.safetensors")
        del state["visual.proj"]
        save_file(state, tmp_path / "part.safetensors")
        with pytest.raises(ValueError, match=r"Missing key.*visual\.proj"):
            VisionTextEncoder(f"local-dir:{encoder_folders['vit']}", weights=str(tmp_path / "part.safetensors"))

    def test_unknown_suffix_and_missing_file(self, encoder_folders, tmp_path):
        (tmp_path / "weights.txt").write_text("hello")
        with pytest.raises(ValueError, match=r"must end in \.safetensors"):
            VisionTextEncoder(f"local-dir:{encoder_folders['vit']}", weights=str(tmp_path / "weights.txt"))
        with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist.*vtfusion-tiny"):
            VisionTextEncoder("RN50", weights=str(tmp_path / "nothing.pt"))


class TestNames:
    def test_random_weights_are_always_the_same_and_leave_the_random_state_alone(self, hub, caplog):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with caplog.at_level(logging.DEBUG):
            first = VisionTextEncoder("small-vit", weights="")
        torch.testing.assert_close(torch.rand(4), expected)
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
            "Encoder 'small-vit' has random weights: its features know nothing of images or text."
        ]
        torch.manual_seed(4)
        assert VisionTextEncoder("small-vit", weights="").weights_hash == first.weights_hash

    def test_root_logger_gets_no_handler(self, hub, encoder_folders, monkeypatch):
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        VisionTextEncoder(str(encoder_folders["timm"]), image_size=96)
        assert logging.getLogger().handlers == []
        assert logging.getLogger().filters == []

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("vit-b-16-plus-240", "ViT-B-16-plus-240"), ("RN51", "RN50"), ("vtfusion_tiny", "vtfusion-tiny")],
    )
    def test_unknown_name_gets_close_matches(self, name, hint):
        with pytest.raises(ValueError, match=rf"Unknown encoder '{name}'.*{hint}"):
            VisionTextEncoder(name)

    def test_name_without_a_close_match(self):
        with pytest.raises(ValueError, match=r"list_models\(\)"):
            VisionTextEncoder("zzzzzzzzzzzz")
        with pytest.raises(ValueError, match="encoder is empty"):
            VisionTextEncoder("")

    def test_no_weights_named_is_an_error_that_lists_the_tags(self, hub):
        with pytest.raises(ValueError, match=r"'small-vit' has no default weights.*plain, quick, named"):
            VisionTextEncoder("small-vit")

    def test_unknown_tag_lists_the_tags(self, hub):
        with pytest.raises(ValueError, match=r"Unknown weights 'laion9b'.*plain, quick, named"):
            VisionTextEncoder("small-vit", weights="laion9b")

    def test_hugging_face_text_towers_are_refused(self):
        with pytest.raises(ValueError, match="Hugging Face text tower"):
            VisionTextEncoder("roberta-ViT-B-32", weights="")

    def test_weights_from_a_file(self, hub, encoder_folders, encoders):
        encoder = VisionTextEncoder("small-vit", weights=str(encoder_folders["vit"] / "open_clip_model.safetensors"))
        assert encoder.weights_hash == encoders["vit"].weights_hash
        assert encoder.mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


class TestHub:
    def test_tag_from_the_cache(self, hub, encoder_folders, encoders, monkeypatch):
        put_in_hub_cache(
            hub,
            "someone/small-clip",
            {"open_clip_model.safetensors": encoder_folders["vit"] / "open_clip_model.safetensors"},
        )
        encoder = VisionTextEncoder("small-vit", weights="plain")
        assert encoder.weights_hash == encoders["vit"].weights_hash
        monkeypatch.setattr("anomalib_vtfusion.components.encoder_weights.DEFAULT_TAGS", {"small-vit": "plain"})
        assert VisionTextEncoder("small-vit").weights_hash == encoder.weights_hash
        assert encoder.mean.flatten().tolist() == pytest.approx((0.1, 0.2, 0.3))
        assert encoder.std.flatten().tolist() == pytest.approx((0.4, 0.5, 0.6))

    def test_pickled_file_from_the_cache(self, hub, encoder_folders, encoders, tmp_path):
        torch.save(load_file(encoder_folders["vit"] / "open_clip_model.safetensors"), tmp_path / "weights.bin")
        put_in_hub_cache(hub, "someone/small-clip", {"special.bin": tmp_path / "weights.bin"})
        assert VisionTextEncoder("small-vit", weights="named").weights_hash == encoders["vit"].weights_hash

    def test_repository_from_the_cache(self, hub, encoder_folders, encoders):
        names = ("open_clip_config.json", "open_clip_model.safetensors")
        put_in_hub_cache(hub, "someone/other", {name: encoder_folders["resnet"] / name for name in names})
        encoder = VisionTextEncoder("hf-hub:someone/other")
        assert encoder.weights_hash == encoders["resnet"].weights_hash
        assert encoder.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])

    @pytest.mark.parametrize(
        ("tag", "file"), [("plain", "open_clip_model.safetensors"), ("named", "special.safetensors")]
    )
    def test_missing_and_offline(self, hub, tag, file):
        with pytest.raises(FileNotFoundError) as caught:
            VisionTextEncoder("small-vit", weights=tag)
        message = str(caught.value)
        for part in (file, "someone/small-clip", str(hub), "weights=", 'encoder="vtfusion-tiny"'):
            assert part in message

    def test_missing_repository(self, hub):
        with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json of Hugging Face repository someone/none"):
            VisionTextEncoder("hf-hub:someone/none")
