"""The encoder that ships with the package: small, complete, loads offline, and tells damaged from flawless."""

import json
import zipfile
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch.nn import functional as F

import anomalib_vtfusion
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.prompting import build_prompts
from benchmarks.pretrain.export import export_timm_backbone
from benchmarks.pretrain.procedural import product_pairs

FOLDER = Path(anomalib_vtfusion.__file__).parent / "weights" / "vtfusion-tiny"


@pytest.fixture(scope="module")
def encoder() -> VisionTextEncoder:
    """Load the shipped encoder as users do."""
    return VisionTextEncoder("vtfusion-tiny")


def test_files_stay_below_25_mb_in_a_wheel(tmp_path: Path) -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "README.md"} <= names
    with zipfile.ZipFile(tmp_path / "wheel.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in FOLDER.iterdir():
            archive.write(path, path.name)
    assert (tmp_path / "wheel.zip").stat().st_size < 25e6


def test_loads_through_open_clip_alone() -> None:
    model = open_clip.create_model(f"local-dir:{FOLDER}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{FOLDER}")(["a photo of a brick"])
    assert tokens.shape == (1, model.context_length)
    with torch.no_grad():
        assert model.encode_text(tokens, normalize=True).norm() == pytest.approx(1.0, abs=1e-5)
        assert model.encode_image(torch.zeros(1, 3, 64, 64), normalize=True).norm() == pytest.approx(1.0, abs=1e-5)


def test_maps_have_strides_8_and_16(encoder: VisionTextEncoder) -> None:
    assert encoder.grids == [(32, 32), (16, 16)]
    assert encoder.channels == [128, 256]
    assert encoder.token_grid == (8, 8)
    assert encoder.embed_dim == json.loads((FOLDER / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]


def test_weights_are_trained_and_finite(encoder: VisionTextEncoder) -> None:
    assert all(torch.isfinite(parameter).all() for parameter in encoder.parameters())
    fish, bus = encoder.encode_text(["a photo of a goldfish", "a photo of a school bus"])
    assert fish @ bus < 0.8


def stained(images: torch.Tensor) -> torch.Tensor:
    """Put a dark blot with a ragged edge on the middle of each image."""
    size = images.shape[-1]
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius = 0.3 + 0.06 * torch.sin(5 * torch.atan2(y, x))
    blot = (torch.hypot(x, y) < radius).float()
    return images * (1 - 0.8 * blot)


def test_text_tells_damaged_from_flawless(encoder: VisionTextEncoder) -> None:
    clean, _, _ = product_pairs(12, 256, torch.Generator().manual_seed(7))
    prompts = build_prompts("surface")
    normal, anomalous = (
        F.normalize(encoder.encode_text(p).mean(0), dim=0) for p in (prompts.normal, prompts.anomalous)
    )
    with torch.no_grad():
        scores = [
            torch.einsum("bdhw,d->bhw", encoder.encode_image(images).tokens, anomalous - normal).flatten(1).amax(1)
            for images in (clean, stained(clean))
        ]
    # Of one product and its damaged copy, the damaged one gets the higher score; chance would be half of them.
    assert (scores[1] > scores[0]).float().mean() >= 0.75


def test_patches_of_a_defect_find_no_match_in_a_clean_view(encoder: VisionTextEncoder) -> None:
    query, reference, _ = product_pairs(8, 256, torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = [
            F.normalize(F.avg_pool2d(encoder.encode_image(images).maps[1], 3, 1, 1, count_include_pad=False), dim=1)
            for images in (stained(query), reference)
        ]
    distance = 1 - (features[0].flatten(2).transpose(1, 2) @ features[1].flatten(2)).amax(2).view(8, 16, 16)
    inside = distance[:, 6:10, 6:10].mean((1, 2))
    outside = torch.cat([distance[:, :3].flatten(1), distance[:, -3:].flatten(1)], 1).mean(1)
    assert (inside > outside).float().mean() >= 0.75


def test_image_tower_serves_as_timm_backbone(encoder: VisionTextEncoder, tmp_path: Path) -> None:
    folder = export_timm_backbone(FOLDER, tmp_path / "timm")
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(2, 3)).eval()
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = backbone((image - encoder.mean) / encoder.std)
        expected = encoder.encode_image(image).maps
    for found, wanted in zip(maps, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)
