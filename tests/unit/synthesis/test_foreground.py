"""The foreground mask finds objects on a plain background and leaves textures whole."""

import pytest
import torch
from torch import Tensor

from anomalib_vtfusion.synthesis import foreground_mask
from anomalib_vtfusion.synthesis.surroundings import Surroundings


def disc_image(
    height: int, width: int, radius: float, background: tuple[float, ...], colour: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    rows, cols = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    disc = (torch.hypot(rows - height / 2, cols - width / 2) < radius).float()
    noise = 0.02 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    ground, ink = torch.tensor(background).view(3, 1, 1), torch.tensor(colour).view(3, 1, 1)
    return (ground * (1.0 - disc) + ink * disc + noise).clamp(0.0, 1.0)[None], disc[None, None]


def overlap(first: Tensor, second: Tensor) -> float:
    """Intersection over union."""
    return float((first * second).sum() / torch.maximum(first, second).sum())


@pytest.mark.parametrize("size", [(32, 32), (128, 96), (256, 256), (200, 333)])
@pytest.mark.parametrize(
    ("background", "colour"),
    [((0.9, 0.9, 0.9), (0.3, 0.3, 0.3)), ((0.1, 0.1, 0.1), (0.6, 0.5, 0.2)), ((0.8, 0.75, 0.2), (0.7, 0.65, 0.55))],
)
def test_disc_is_found(size: tuple[int, int], background: tuple[float, ...], colour: tuple[float, ...]) -> None:
    image, disc = disc_image(*size, 0.3 * min(size), background, colour)
    mask = foreground_mask(image)
    assert mask.shape == (1, 1, *size)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert overlap(mask, disc) > (0.75 if min(size) < 64 else 0.92)


def test_shadow_on_a_coloured_background_is_not_the_object() -> None:
    image, disc = disc_image(128, 128, 32.0, (0.8, 0.75, 0.2), (0.7, 0.7, 0.6))
    rows, cols = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    shadow = (torch.hypot(rows - 70.0, cols - 72.0) < 34.0).float() * (1.0 - disc)
    assert overlap(foreground_mask(image * (1.0 - 0.3 * shadow)), disc) > 0.9


@pytest.mark.parametrize("kind", ["flat", "noise", "stripes", "gradient"])
def test_textures_are_foreground_everywhere(kind: str) -> None:
    rows, cols = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    image = {
        "flat": torch.full((96, 96), 0.4),
        "noise": torch.rand(96, 96, generator=torch.Generator().manual_seed(1)),
        "stripes": 0.5 + 0.4 * torch.sin(cols * 0.8),
        "gradient": (rows + cols) / 192.0,
    }[kind].expand(2, 3, 96, 96)
    assert float(foreground_mask(image).min()) == 1.0


def test_images_of_a_batch_are_judged_apart() -> None:
    image, _ = disc_image(96, 96, 28.0, (0.9, 0.9, 0.9), (0.2, 0.3, 0.3))
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    mask = foreground_mask(torch.cat([noise, image]))
    assert float(mask[0].min()) == 1.0
    assert torch.equal(mask[1:], foreground_mask(image))


def test_surroundings_place_defects_on_the_object_and_fill_with_background() -> None:
    image, _ = disc_image(120, 90, 25.0, (0.9, 0.8, 0.7), (0.2, 0.2, 0.2))
    around = Surroundings(image)
    assert around.has_background == [True]
    assert around.grey == [False]
    for rank in (0.0, 0.2, 0.5, 0.77, 0.999):
        row, col = around.place(0, rank)
        assert ((row - 60.0) ** 2 + (col - 45.0) ** 2) ** 0.5 < 29.0
        row, col = around.place(0, rank / 2.0, at_edge=True)
        assert 18.0 < ((row - 60.0) ** 2 + (col - 45.0) ** 2) ** 0.5 < 30.0
    assert around.luma_at(0, (60.0, 45.0)) == pytest.approx(0.2, abs=0.03)
    behind = around.fill(0, slice(50, 70), slice(35, 55), seed=3)
    assert torch.allclose(behind.mean((1, 2)), torch.tensor([0.9, 0.8, 0.7]), atol=0.05)
