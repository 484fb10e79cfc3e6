"""Image and pixel scores of one test run, from raw maps and scores of any scale.

Image AUROC, AUPR and F1-max are Anomalib's metrics. The pixel ones (AUROC, AUPRO up to a false-positive rate of 0.3,
F1-max) are the same definitions as Anomalib's, which the tests compare them with, from plain sorts of the normal and of
the few anomalous pixels: for a few hundred images that takes seconds instead of minutes, and a sweep scores hundreds of
cells.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from anomalib.metrics import AUPR, AUROC, F1Max
from anomalib.metrics.pro import connected_components_cpu

FPR_LIMIT = 0.3

Array = npt.NDArray[np.float64]


def image_metrics(scores: Array, labels: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    """Image AUROC, AUPR and F1-max.

    Args:
        scores: Higher is more anomalous ``(N,)``, any scale.
        labels: Whether each image is anomalous ``(N,)``.

    Returns:
        Each metric in ``[0, 1]``, or None where the images are all normal or all anomalous.
    """
    metrics = {"image_auroc": AUROC, "image_aupr": AUPR, "image_f1_max": F1Max}
    if labels.all() or not labels.any():
        return dict.fromkeys(metrics, None)
    # Ranks: the metrics put a sigmoid on scores outside [0, 1], where large ones would become equal.
    batch: Any = SimpleNamespace(ranks=torch.as_tensor(rank(scores)), target=torch.as_tensor(labels).int())
    values: dict[str, float | None] = {}
    for name, metric in metrics.items():
        scorer = metric(fields=["ranks", "target"])
        scorer.update(batch)
        values[name] = float(scorer.compute())
    return values


def rank(scores: Array) -> Array:
    """Ranks in ``[0, 1]`` of ``scores`` ``(N,)``; equal scores share one."""
    values, places = np.unique(scores, return_inverse=True)
    return places / max(1, len(values) - 1)


def auroc(scores: Array, labels: npt.NDArray[np.bool_]) -> float | None:
    """AUROC of ``scores`` ``(N,)``, or None where it is not defined."""
    return image_metrics(scores, labels)["image_auroc"]


def pixel_metrics(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, float | None]:
    """Pixel AUROC, AUPRO and F1-max over all pixels of all images.

    Args:
        maps: Anomaly maps ``(N, H, W)``, any scale.
        masks: Ground truth ``(N, H, W)``, boolean.

    Returns:
        Each metric in ``[0, 1]``, or None where no pixel, or every one, is anomalous.

    Raises:
        ValueError: If a map holds a value that is not finite.
    """
    names = ("pixel_auroc", "pixel_aupro", "pixel_f1_max")
    if not torch.isfinite(maps).all():
        raise ValueError("An anomaly map holds values that are not finite.")
    if not masks.any() or masks.all():
        return dict.fromkeys(names, None)
    regions = connected_components_cpu(masks[:, None].float()).reshape(-1).numpy()
    pixels, anomalous = maps.float().reshape(-1).numpy(), regions > 0
    normal = np.sort(pixels[~anomalous])
    # Between two anomalous scores no curve rises, so these are the only thresholds that matter.
    values, places = np.unique(pixels[anomalous], return_inverse=True)
    higher, passed = (len(normal) - np.searchsorted(normal, values, side)[::-1] for side in ("right", "left"))
    region = regions[anomalous].astype(np.int64)
    sizes = np.bincount(region)
    weight = 1.0 / np.maximum(1, sizes) / np.count_nonzero(sizes)
    true = np.cumsum(np.bincount(places)[::-1]).astype(np.float64)
    fpr = np.append(_steps(higher, passed) / len(normal), 1.0)
    f1 = 2 * true / (passed + true + true[-1])
    return {
        "pixel_auroc": _area(_levels(true / true[-1]), fpr),
        "pixel_aupro": _area_up_to(fpr, _levels(np.cumsum(np.bincount(places, weight[region])[::-1])), FPR_LIMIT),
        "pixel_f1_max": float(f1.max()),
    }


def _steps(before: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> Array:
    """Zero, then the count before each threshold and the count at it ``(1 + 2 T,)``."""
    return np.concatenate([[0.0], np.stack([before, at], axis=1).reshape(-1)])


def _levels(at: Array) -> Array:
    """Heights of a curve at :func:`_steps` and at its end ``(2 + 2 T,)``: it rises at the thresholds alone."""
    before = np.concatenate([[0.0], at[:-1]])
    return np.concatenate([[0.0], np.stack([before, at], axis=1).reshape(-1), at[-1:]])


def _area_up_to(x: Array, y: Array, limit: float) -> float:
    """Area under a rising curve up to ``limit``, as a share of the most that it could be."""
    end = int(np.searchsorted(x, limit, side="right"))
    within, height = x[:end], y[:end]
    if within[-1] < limit:
        height = np.append(height, np.interp(limit, x[end - 1 : end + 1], y[end - 1 : end + 1]))
        within = np.append(within, limit)
    return _area(height, within) / limit


def _area(y: Array, x: Array) -> float:
    """Area under a curve, by trapezoids."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
