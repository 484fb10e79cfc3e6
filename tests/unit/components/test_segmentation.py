"""Segmentation network and image head: nothing said before training, and never more than the bound."""

import pytest
import torch

from anomalib_vtfusion.components.predictions import TOP_FRACTION
from anomalib_vtfusion.components.segmentation import (
    MAX_RESIDUAL,
    MAX_SCORE_RESIDUAL,
    WIDTHS,
    ImageHead,
    PyramidLevel,
    SegmentationNet,
    bounded,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(guided=True):
    torch.manual_seed(0)
    return SegmentationNet(dim=8, skip=6, evidence=3, text_guidance=guided)


def inputs(grid=(3, 5), finest=(7, 10)):
    return randn(2, 8, *grid), randn(2, 6, *finest, seed=1), randn(2, 3, *finest, seed=2), randn(2, 8, seed=3)


def test_bound_is_smooth_odd_and_the_identity_near_zero():
    values = torch.linspace(-1e3, 1e3, 101, dtype=torch.float64)
    assert bounded(values, MAX_RESIDUAL).abs().max() <= MAX_RESIDUAL
    torch.testing.assert_close(bounded(-values, MAX_RESIDUAL), -bounded(values, MAX_RESIDUAL))
    small = torch.tensor([1e-3, -2e-3], dtype=torch.float64)
    torch.testing.assert_close(bounded(small, MAX_RESIDUAL), small, rtol=1e-5, atol=0)
    assert (bounded(torch.linspace(-5, 5, 50), MAX_RESIDUAL).diff() > 0).all()


class TestSegmentationNet:
    @pytest.mark.parametrize("guided", [True, False])
    @pytest.mark.parametrize(("grid", "finest"), [((3, 5), (7, 10)), ((4, 4), (4, 4)), ((1, 2), (4, 8))])
    def test_residual_is_zero_at_first_and_four_times_as_fine(self, guided, grid, finest):
        residual = make(guided)(*inputs(grid, finest))
        assert residual.shape == (2, 1, 4 * grid[0], 4 * grid[1])
        assert not residual.any()

    def test_is_bounded_however_it_is_trained(self):
        network = make()
        torch.nn.init.constant_(network.output.weight, 1e3)
        residual = network(*inputs())
        assert residual.abs().max() <= MAX_RESIDUAL
        assert residual.abs().max() > 0.9 * MAX_RESIDUAL

    def test_the_text_changes_nothing_at_first_and_counts_once_trained(self):
        network = make()
        torch.nn.init.normal_(network.output.weight)
        fused, skip, evidence, guide = inputs()
        assert torch.equal(network(fused, skip, evidence, guide), network(fused, skip, evidence, -guide))
        for level in network.levels:
            torch.nn.init.normal_(level.modulation.weight)
        assert (network(fused, skip, evidence, guide) - network(fused, skip, evidence, -guide)).abs().max() > 1e-2

    def test_without_guidance_the_text_never_counts(self):
        network = make(guided=False)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        fused, skip, evidence, guide = inputs()
        assert torch.equal(network(fused, skip, evidence, guide), network(fused, skip, evidence, -guide))

    def test_evidence_joins_at_every_level(self):
        network = make()
        assert [level.convolution.in_channels for level in network.levels] == [
            8 + 3,
            WIDTHS[0] + WIDTHS[1] + 3,
            WIDTHS[1] + 3,
        ]

    def test_learns_through_the_zero_start(self):
        network = make()
        network(*inputs()).sum().backward()
        assert network.output.weight.grad.abs().max() > 0


def test_modulation_scales_and_shifts_each_channel():
    torch.manual_seed(0)
    level = PyramidLevel(4, 8, guide=2)
    features, guide = randn(1, 4, 5, 5), torch.tensor([[1.0, 0.0]])
    plain = level.norm(level.convolution(features))
    with torch.no_grad():
        level.modulation.weight[:8, 0] = 2.0
        level.modulation.weight[8:, 0] = -0.5
    torch.testing.assert_close(level(features, guide), torch.nn.functional.gelu(3 * plain - 0.5))


class TestImageHead:
    def test_says_nothing_at_first_and_stays_bounded(self):
        torch.manual_seed(0)
        head = ImageHead(8)
        fused, logits, base = randn(2, 8, 3, 4), randn(2, 1, 12, 16, seed=1), randn(2, 1, 6, 8, seed=2)
        assert head(fused, logits, base).tolist() == [[0.0], [0.0]]
        torch.nn.init.constant_(head.output.weight, 1e3)
        assert head(fused, logits, base).abs().max() <= MAX_SCORE_RESIDUAL

    def test_statistics_of_the_maps(self):
        values = torch.arange(400.0).view(1, 1, 20, 20)
        top = values.flatten()[-round(400 * TOP_FRACTION) :]
        expected = torch.stack([values.mean(), values.std(), values.max(), top.mean()])[None]
        torch.testing.assert_close(ImageHead._statistics(values), expected)

    def test_looks_where_the_map_is_high(self):
        """Features under the peak of the map count, those elsewhere only through their mean."""
        torch.manual_seed(0)
        head = ImageHead(2)
        torch.nn.init.normal_(head.output.weight, std=0.1)
        fused = torch.zeros(1, 2, 4, 4)
        fused[0, 0, 1, 2] = fused[0, 1, 3, 0] = 5.0
        peak, elsewhere = torch.full((2, 1, 1, 4, 4), -5.0)
        peak[0, 0, 1, 2] = elsewhere[0, 0, 3, 0] = 5.0  # equal statistics, another place
        assert (head(fused, peak, peak) - head(fused, elsewhere, elsewhere)).abs() > 1e-2
