"""Poisson blending against a dense linear solve."""

import pytest
import torch
from torch import Tensor

from anomalib_vtfusion.synthesis.poisson import poisson_blend


def dense_blend(source: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Perez' equations written out, one row for each pixel of the domain, solved in double precision."""
    height, width = inside.shape
    pixels = [(i, j) for i in range(1, height - 1) for j in range(1, width - 1) if bool(inside[i, j])]
    number = {pixel: index for index, pixel in enumerate(pixels)}
    matrix = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    right = torch.zeros(len(pixels), source.shape[0], dtype=torch.float64)
    for (i, j), row in number.items():
        matrix[row, row] = 4.0
        for near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            right[row] += source[:, i, j].double() - source[:, near[0], near[1]].double()
            if near in number:
                matrix[row, number[near]] = -1.0
            else:
                right[row] += target[:, near[0], near[1]].double()
    solution = torch.linalg.solve(matrix, right)
    result = target.clone()
    for (i, j), row in number.items():
        result[:, i, j] = solution[row].float()
    return result


def case(height: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.rand(2, 3, height, width, generator=generator)
    rows, cols = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    inside = torch.hypot(rows, cols + 0.2 * rows) < 0.75
    return source, target, inside


@pytest.mark.parametrize("size", [(9, 9), (14, 11), (24, 20)])
def test_converges_to_the_dense_solution(size: tuple[int, int]) -> None:
    source, target, inside = case(*size, seed=1)
    blended = poisson_blend(source, target, inside, iterations=120)
    torch.testing.assert_close(blended, dense_blend(source, target, inside), atol=2e-4, rtol=0.0)


def test_default_iterations_are_close_on_smooth_images() -> None:
    source, target, inside = case(32, 28, seed=2)
    smooth = torch.nn.functional.avg_pool2d
    source, target = (smooth(image[None], 5, 1, 2, count_include_pad=False)[0] for image in (source, target))
    blended = poisson_blend(source, target, inside)
    error = (blended - dense_blend(source, target, inside)).abs()[:, inside]
    assert float(error.max()) < 0.05
    assert float(error.mean()) < 0.01


def test_outside_is_untouched_and_a_constant_shift_vanishes() -> None:
    source, target, inside = case(20, 20, seed=3)
    blended = poisson_blend(source, target, inside)
    assert torch.equal(blended[:, ~inside], target[:, ~inside])
    same = poisson_blend(target + 0.3, target, inside, iterations=60)
    torch.testing.assert_close(same, target, atol=1e-4, rtol=0.0)


def test_domain_reaching_the_crop_border_is_cut_there() -> None:
    source, target, _ = case(12, 12, seed=4)
    blended = poisson_blend(source, target, torch.ones(12, 12, dtype=torch.bool), iterations=60)
    assert torch.equal(blended[:, 0], target[:, 0])
    assert torch.equal(blended[:, :, -1], target[:, :, -1])
    torch.testing.assert_close(
        blended, dense_blend(source, target, torch.ones(12, 12, dtype=torch.bool)), atol=2e-4, rtol=0.0
    )
