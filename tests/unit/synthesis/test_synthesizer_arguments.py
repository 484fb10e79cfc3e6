"""Bad arguments are refused at construction, with a message that says what would be right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anomalib_vtfusion.synthesis import FAMILIES, AnomalySynthesizer
from anomalib_vtfusion.synthesis.textures import TextureFolder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ["scratch", "rustt"]}, r"unknown defect families \['rustt'\]; known: perlin, cutpaste"),
        ({"families": ()}, "families is empty"),
        ({"families": "scratch"}, r"write \['scratch'\]"),
        ({"area": (0.05, 0.01)}, "area must be .* low <= high"),
        ({"area": (0.0, 0.01)}, r"area must lie in \(0.0, 0.5\]"),
        ({"area": (0.1, 0.9)}, "area must lie in"),
        ({"area": (0.1,)}, r"area must be a pair \(low, high\)"),
        ({"area": (float("nan"), 0.1)}, "area must lie in"),
        ({"strength": (0.5, 0.2)}, "strength must be"),
        ({"strength": (0.5, 1.2)}, r"strength must lie in \[0.0, 1.0\]"),
        ({"defects_per_image": (0, 2)}, "defects_per_image must lie in"),
        ({"defects_per_image": (1, 1.5)}, "whole numbers"),
        ({"defects_per_image": (3, 1)}, "defects_per_image must be"),
        ({"clean_fraction": 1.5}, r"clean_fraction must lie in \[0, 1\], got 1.5"),
        ({"clean_fraction": -0.1}, "clean_fraction must lie in"),
    ],
)
def test_bad_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalySynthesizer(**arguments)


def test_families_are_a_subset_without_repeats() -> None:
    assert AnomalySynthesizer().families == FAMILIES
    assert AnomalySynthesizer(["hole", "scratch", "hole"]).families == ("hole", "scratch")


def test_texture_source_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        AnomalySynthesizer(texture_source=tmp_path / "nowhere")


def test_texture_source_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"no image in .*looked for \.bmp"):
        AnomalySynthesizer(texture_source=tmp_path)


def test_texture_source_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texture.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(NotADirectoryError, match="give the folder"):
        AnomalySynthesizer(texture_source=path)


def test_texture_source_unreadable(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png"):
        AnomalySynthesizer(texture_source=str(tmp_path))


def test_textures_are_read_as_rgb_and_shrunk(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("L", (600, 300), 51).save(tmp_path / "a.png")
    Image.new("RGB", (20, 30), (255, 0, 102)).save(tmp_path / "sub" / "b.bmp")
    folder = TextureFolder(tmp_path)
    assert len(folder) == 2
    assert folder.read(0).shape == (3, 128, 256)
    assert torch.allclose(folder.read(2), torch.full((3, 128, 256), 0.2))
    assert torch.allclose(folder.read(1)[:, 4, 5], torch.tensor([1.0, 0.0, 0.4]))


def test_textures_are_what_perlin_defects_show(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")
    synthesizer = AnomalySynthesizer(
        ["perlin"], area=(0.05, 0.1), strength=(1.0, 1.0), clean_fraction=0.0, texture_source=tmp_path
    )
    images = torch.full((2, 3, 64, 64), 0.5)
    images[:, 2] = 0.2
    result = synthesizer(images, torch.Generator().manual_seed(0))
    changed = result.images.permute(0, 2, 3, 1)[result.masks[:, 0] == 1.0]
    assert float((changed - torch.tensor([1.0, 0.0, 0.0])).abs().amax(1).median()) < 0.05


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)],
)
def test_images_of_a_wrong_kind(images: torch.Tensor) -> None:
    synthesizer = AnomalySynthesizer()
    params = synthesizer.sample((1, 32, 32), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"images must be floating point \(B, 3, H, W\)"):
        synthesizer.apply(images, params)


def test_parameters_for_another_shape() -> None:
    synthesizer = AnomalySynthesizer()
    params = synthesizer.sample((2, 32, 32), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"sampled for \(B, H, W\) = \(2, 32, 32\), but the images are \(1, 32, 32\)"):
        synthesizer.apply(torch.zeros(1, 3, 32, 32), params)


def test_images_without_parameters() -> None:
    with pytest.raises(TypeError, match="needs the parameters"):
        AnomalySynthesizer().apply(torch.zeros(1, 3, 32, 32))
