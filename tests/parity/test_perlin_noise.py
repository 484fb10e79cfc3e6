"""Perlin noise against a pixel-by-pixel formulation."""

import math

import pytest
import torch

from anomalib_vtfusion.synthesis.masks import lattice_angles, perlin_noise


def naive_perlin(height: int, width: int, angles: list[list[float]]) -> list[list[float]]:
    """Perlin's definition, one pixel and one corner at a time."""

    def fade(t: float) -> float:
        return 6.0 * t**5 - 15.0 * t**4 + 10.0 * t**3

    cells_y, cells_x = len(angles) - 1, len(angles[0]) - 1
    result = []
    for i in range(height):
        line = []
        for j in range(width):
            y, x = (i + 0.5) / height * cells_y, (j + 0.5) / width * cells_x
            y0, x0 = math.floor(y), math.floor(x)
            value = 0.0
            for gy in (y0, y0 + 1):
                for gx in (x0, x0 + 1):
                    weight = (1.0 - fade(abs(y - gy))) * (1.0 - fade(abs(x - gx)))
                    angle = angles[gy][gx]
                    value += weight * (math.sin(angle) * (y - gy) + math.cos(angle) * (x - gx))
            line.append(value * math.sqrt(2.0))
        result.append(line)
    return result


@pytest.mark.parametrize(
    ("size", "cells"), [((16, 16), (2, 2)), ((13, 21), (3, 5)), ((8, 8), (8, 8)), ((9, 5), (1, 1))]
)
def test_matches_the_naive_loop(size: tuple[int, int], cells: tuple[int, int]) -> None:
    angles = lattice_angles(2, cells, torch.Generator().manual_seed(7))
    noise = perlin_noise(size, angles)
    for field, gradients in zip(noise, angles, strict=True):
        torch.testing.assert_close(field, torch.tensor(naive_perlin(*size, gradients.tolist())), atol=2e-5, rtol=0.0)
