"""Scores are Anomalib's, whatever the scale of the maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPRO, AUROC, F1Max
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.few_shot.scores import image_metrics, pixel_metrics, rank


def maps_and_masks(seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.nn.functional.interpolate((torch.rand(4, 1, 5, 5, generator=generator) > 0.8).float(), size=20)[:, 0]
    masks[0] = 0
    masks[1, :4, :4] = 1
    maps = torch.randn(4, 20, 20, generator=generator) + masks
    maps = (maps - maps.min()) / (maps.max() - maps.min())
    return ((maps * 8).round() / 8 if ties else maps), masks.bool()


def by_anomalib(metric, maps: torch.Tensor, masks: torch.Tensor) -> float:
    scorer = metric(fields=["maps", "masks"])
    scorer.update(SimpleNamespace(maps=maps, masks=masks))
    return float(scorer.compute())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_pixel_metrics_equal_anomalibs(seed: int, ties: bool) -> None:
    maps, masks = maps_and_masks(seed, ties)
    ours = pixel_metrics(maps, masks)
    assert ours["pixel_auroc"] == pytest.approx(by_anomalib(AUROC, maps, masks), abs=1e-5)
    assert ours["pixel_aupro"] == pytest.approx(by_anomalib(AUPRO, maps, masks), abs=1e-5)
    assert ours["pixel_f1_max"] == pytest.approx(by_anomalib(F1Max, maps, masks), abs=1e-5)


@pytest.mark.parametrize(("factor", "shift"), [(100.0, 0.0), (1.0, -5.0), (1e-6, 3e-6)])
def test_pixel_metrics_do_not_depend_on_the_scale(factor: float, shift: float) -> None:
    maps, masks = maps_and_masks(3, ties=True)
    assert pixel_metrics(maps * factor + shift, masks) == pytest.approx(pixel_metrics(maps, masks))


def test_perfect_and_inverted_maps() -> None:
    _, masks = maps_and_masks(1, ties=False)
    assert pixel_metrics(masks.float(), masks) == pytest.approx(
        {"pixel_auroc": 1.0, "pixel_aupro": 1.0, "pixel_f1_max": 1.0}
    )
    assert pixel_metrics(-masks.float(), masks)["pixel_auroc"] == pytest.approx(0.0)


def test_image_metrics_by_hand_and_large_scores_stay_apart() -> None:
    labels = np.array([False, True, False, True])
    # Pairs in the right order: (1 < 4), (1 < 2), (3 < 4); 3 of 4. A sigmoid would make all of these equal to 1.
    found = image_metrics(np.array([1.0, 4.0, 3.0, 2.0]) * 1000, labels)
    assert found["image_auroc"] == pytest.approx(0.75)
    assert found["image_f1_max"] == pytest.approx(0.8)  # all above 1: precision 2/3, recall 1
    assert found["image_aupr"] is not None


def test_undefined_metrics_are_none() -> None:
    assert set(image_metrics(np.array([1.0, 2.0]), np.array([True, True])).values()) == {None}
    assert set(pixel_metrics(torch.rand(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)).values()) == {None}


def test_maps_that_are_not_finite_are_refused() -> None:
    maps = torch.rand(1, 4, 4)
    maps[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        pixel_metrics(maps, torch.ones(1, 4, 4, dtype=torch.bool))


def test_equal_scores_share_a_rank() -> None:
    assert rank(np.array([5.0, 1.0, 5.0, 9.0])).tolist() == [0.5, 0.0, 0.5, 1.0]
