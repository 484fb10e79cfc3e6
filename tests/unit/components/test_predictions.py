"""Training-free predictions: the formulas, their order for strong evidence, and the mean of the highest values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anomalib_vtfusion.components.predictions import (
    NEUTRAL_DISTANCE,
    TOP_FRACTION,
    base_logits,
    text_margin,
    top_mean,
)


def logit_of(evidence: float) -> float:
    """The formula in double precision, by way of its stable form for very negative evidence."""
    softplus = max(evidence, 0.0) + math.log1p(math.exp(-abs(evidence)))
    return math.log(softplus) - math.log(math.log1p(math.exp(NEUTRAL_DISTANCE)))


def logits(evidence, dtype=torch.float32):
    """Logits where both predictions say the same."""
    values = torch.tensor(evidence, dtype=dtype).view(1, 1, 1, -1)
    return base_logits(values, values, 0.3).flatten()


class TestBaseLogits:
    @pytest.mark.parametrize(
        "evidence", [-600.0, -40.0, -15.5, -14.5, -3.0, 0.0, 1.0, NEUTRAL_DISTANCE, 20.0, 1e3, 1e6]
    )
    def test_is_the_stated_formula(self, evidence):
        assert float(logits([evidence], torch.float64)) == pytest.approx(logit_of(evidence), rel=1e-6, abs=1e-6)

    def test_neutral_evidence_is_as_likely_as_not(self):
        assert float(logits([NEUTRAL_DISTANCE])) == pytest.approx(0, abs=1e-6)

    def test_weighs_layers_alike_and_text_as_told(self):
        visual = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
        textual = torch.tensor(-2.0).view(1, 1, 1, 1)
        assert float(base_logits(visual, textual, 0.25)) == pytest.approx(logit_of(0.75 * 3.0 - 0.25 * 2.0), abs=1e-5)
        assert float(base_logits(visual, 1e3 * textual, 0.0)) == pytest.approx(logit_of(3.0), abs=1e-5)

    @settings(max_examples=50, deadline=None)
    @given(low=st.floats(-50, 1e4), step=st.floats(1e-3, 1e3))
    def test_more_evidence_is_a_higher_probability(self, low, step):
        """Also as a sigmoid in single precision: strong anomalies must not tie because they are all called certain."""
        high = low + max(step, 1e-3 * abs(low))
        lower, higher = logits([low, high])
        assert lower < higher
        if low > -10:  # further below, the probability is nil for all that matters
            assert lower.sigmoid() < higher.sigmoid() < 1.0

    def test_gradient_is_finite_everywhere(self):
        evidence = torch.tensor([-1e4, -15.0, -14.999, 0.0, 1e4]).view(1, 1, 1, -1).requires_grad_()
        base_logits(evidence, evidence.detach(), 0.0).sum().backward()
        assert evidence.grad.isfinite().all()
        assert (evidence.grad > 0).all()


class TestTextMargin:
    def test_is_the_difference_of_cosines(self):
        generator = torch.Generator().manual_seed(0)
        tokens = F.normalize(torch.randn(2, 6, 3, 4, generator=generator), dim=1)
        states = F.normalize(torch.randn(2, 6, generator=generator), dim=1)
        margin = text_margin(tokens, states)
        assert margin.shape == (2, 1, 3, 4)
        cosines = F.cosine_similarity(tokens[:, None], states[None, :, :, None, None], dim=2)
        torch.testing.assert_close(margin[:, 0], cosines[:, 1] - cosines[:, 0])
        # And so the softmax over both states is its sigmoid.
        torch.testing.assert_close((20 * cosines).softmax(dim=1)[:, 1:], (20 * margin).sigmoid())

    def test_extremes(self):
        states = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).T[None, :, None]
        assert text_margin(tokens, states).flatten().tolist() == [2.0, 0.0, -2.0]


class TestTopMean:
    def test_is_the_mean_of_the_highest_share(self):
        count = round(5 / TOP_FRACTION)
        values = torch.arange(float(count))[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        scores = top_mean(torch.stack([values, -values]).view(2, 1, 5, -1))
        assert scores.shape == (2, 1)
        assert scores.flatten().tolist() == [count - 3.0, -2.0]

    def test_takes_at_least_one_pixel(self):
        assert float(top_mean(torch.tensor([[[[1.0, 7.0, 3.0]]]]))) == 7.0
