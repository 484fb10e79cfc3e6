"""The contact sheet shows every family once for every image."""

from pathlib import Path

import torch
from PIL import Image

from anomalib_vtfusion.synthesis import FAMILIES, AnomalySynthesizer, contact_sheet
from anomalib_vtfusion.synthesis.contact_sheet import GAP, HEADER


def test_grid_of_all_families(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    path = contact_sheet(images, tmp_path / "new" / "sheet.png")
    assert path == tmp_path / "new" / "sheet.png"
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    with Image.open(path) as sheet:
        assert sheet.size == ((1 + len(FAMILIES)) * (48 + GAP), HEADER + 2 * 2 * (40 + GAP))


def test_shows_the_clean_image_first_and_outlines_in_red(tmp_path: Path) -> None:
    images = torch.full((1, 3, 64, 64), 0.6)
    synthesizer = AnomalySynthesizer(["hole"], area=(0.03, 0.03), strength=(1.0, 1.0))
    path = contact_sheet(images, tmp_path / "sheet.png", seed=2, synthesizer=synthesizer)
    with Image.open(path) as sheet:
        clean = sheet.crop((0, HEADER, 64, HEADER + 64))
        assert clean.getextrema() == ((153, 153),) * 3
        marked = sheet.crop((64 + GAP, HEADER + 64 + GAP, 128 + GAP, HEADER + 128 + GAP))
        colours = {colour for _, colour in marked.getcolors(64 * 64)}
    assert (255, 0, 0) in colours
    assert (153, 153, 153) in colours


def test_seed_decides_the_sheet(tmp_path: Path) -> None:
    images = torch.full((1, 3, 48, 48), 0.6)
    pages = [contact_sheet(images, tmp_path / f"{name}.png", seed).read_bytes() for name, seed in enumerate((1, 1, 2))]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]
