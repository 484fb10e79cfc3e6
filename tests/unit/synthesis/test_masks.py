"""Shapes of defects: areas, distances and noise statistics."""

import math
import random

import pytest
import torch

from anomalib_vtfusion.synthesis import masks
from anomalib_vtfusion.synthesis.masks import Stroke


def coordinates(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(height).float()[:, None] - height / 2, torch.arange(width).float()[None] - width / 2


@pytest.mark.parametrize("elongation", [1.0, 3.0])
@pytest.mark.parametrize("roughness", [0.0, 0.3, 0.6])
def test_blob_area_is_that_of_the_disc(elongation: float, roughness: float) -> None:
    ys, xs = coordinates(200, 200)
    distance = masks.blob_distance(
        ys, xs, 30.0, random.Random(1), elongation=elongation, angle=0.7, roughness=roughness
    )
    assert float((distance > 0.0).sum()) == pytest.approx(math.pi * 30.0**2, rel=0.03)


def test_smooth_blob_is_the_disc() -> None:
    ys, xs = coordinates(64, 64)
    distance = masks.blob_distance(ys, xs, 20.0, random.Random(0), roughness=0.0)
    assert torch.allclose(distance, 20.0 - torch.hypot(ys, xs), atol=1e-3)


def test_rectangle_distance_counts_from_the_nearest_side() -> None:
    ys, xs = torch.tensor([[0.0], [3.0], [6.0]]), torch.tensor([[0.0, 9.0, 12.0]])
    distance = masks.rectangle_distance(ys, xs, height=8.0, width=20.0)
    expected = torch.tensor([[4.0, 1.0, -2.0], [1.0, 1.0, -2.0], [-2.0, -2.0, -2.0]])
    assert torch.equal(distance, expected)
    turned = masks.rectangle_distance(xs.T, ys.T, height=8.0, width=20.0, angle=math.pi / 2)
    assert torch.allclose(turned, expected.T, atol=1e-5)


def test_straight_stroke_is_a_band() -> None:
    points = torch.ones(33)
    stroke = Stroke((10.0, 5.0), 0.0, 20.0, 0.0 * points, 2.0 * points, 0.5 * points)
    ys, xs = torch.arange(21.0)[:, None], torch.arange(31.0)[None]
    distance, pressure = masks.stroke_distance(ys, xs, stroke, (0.0, 3.0))
    assert distance.shape == (2, 21, 31)
    assert torch.allclose(distance[0, :, 15], 2.0 - (torch.arange(21.0) - 10.0).abs())
    assert torch.allclose(distance[1, :, 15], 2.0 - (torch.arange(21.0) - 13.0).abs())
    assert float(distance[0, 10, 2]) == pytest.approx(2.0 - 3.0)
    assert float(distance[0, 10, 30]) == pytest.approx(2.0 - 5.0)
    assert float(pressure.min()) == 0.5
    assert stroke.at(0.5) == pytest.approx((10.0, 15.0))


def test_stroke_follows_its_centre_line_at_any_angle() -> None:
    at = torch.linspace(0.0, 1.0, 257)
    stroke = Stroke((40.0, 20.0), 0.6, 60.0, 6.0 * torch.sin(math.pi * at), torch.ones(257), torch.ones(257))
    ys, xs = torch.arange(120.0)[:, None], torch.arange(120.0)[None]
    distance, _ = masks.stroke_distance(ys, xs, stroke)
    for fraction in (0.1, 0.5, 0.8):
        row, col = stroke.at(fraction)
        assert float(distance[0, round(row), round(col)]) > 0.2


def test_curve_noise_is_pinned_at_both_ends() -> None:
    curve = masks.curve_noise(129, 0.7, masks.seeded(3))
    assert curve.shape == (129,)
    assert abs(float(curve[0])) < 1e-5
    assert abs(float(curve[-1])) < 1e-4
    assert float(curve.abs().max()) > 0.1


def test_soft_edge_is_half_on_the_outline() -> None:
    alpha = masks.soft_edge(torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 5.0]), softness=2.0)
    assert torch.equal(alpha, torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0, 1.0]))


def test_look_up_interpolates() -> None:
    table = torch.tensor([0.0, 10.0, 40.0])
    assert torch.equal(
        masks.look_up(table, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])), torch.tensor([0, 5, 10, 25, 40.0])
    )


def test_perlin_noise_is_zero_mean_and_bounded() -> None:
    noise = masks.perlin_noise((64, 48), masks.lattice_angles(16, (8, 6), masks.seeded(0)))
    assert noise.shape == (16, 64, 48)
    assert float(noise.abs().max()) <= 1.0
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) > 0.15


def test_noise_depends_on_its_seed_alone() -> None:
    cpu = torch.device("cpu")
    for draw in (
        lambda seed: masks.fractal_noise((70, 90), 3, 3, masks.seeded(seed), cpu),
        lambda seed: masks.smooth_noise((70, 90), 5.0, masks.seeded(seed), cpu),
    ):
        assert draw(1).shape == (1, 70, 90)
        assert torch.equal(draw(1), draw(1))
        assert not torch.allclose(draw(1), draw(2))
