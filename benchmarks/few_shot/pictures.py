"""Small heat maps, and the images that they are of, for the page of a report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.few_shot.files import write_bytes

SIDE = 96


def choose(names: Sequence[str], count: int) -> list[int]:
    """Choose up to ``count`` of the test images, the same for every model, in turn from each kind of defect.

    Args:
        names: Names of the images as ``kind/file``.
        count: How many.

    Returns:
        Ascending indices.
    """
    kinds: dict[str, list[int]] = {}
    for index in sorted(range(len(names)), key=names.__getitem__):
        kinds.setdefault(names[index].rpartition("/")[0], []).append(index)
    # Later files of a kind alternate with earlier ones, for kinds are often sorted by difficulty.
    spread = [order[::2] + order[1::2] for order in kinds.values()]
    rounds = [order[i] for i in range(max(map(len, spread), default=0)) for order in spread if i < len(order)]
    return sorted(rounds[:count])


def save_maps(path: Path, names: Sequence[str], maps: Tensor) -> None:
    """Write maps ``(N, H, W)`` as small half floats."""
    small = F.interpolate(maps[:, None].float(), size=(SIDE, SIDE), mode="area")[:, 0]
    _save(path, names=np.array(names), maps=small.numpy().astype(np.float16))


def save_views(path: Path, names: Sequence[str], images: Sequence[Tensor], masks: Tensor) -> None:
    """Write what the maps are of, unless another cell of the category has written it.

    Args:
        path: File to write.
        names: Names of the images.
        images: Images ``(3, H, W)`` in ``[0, 1]``, of any size.
        masks: Ground truth ``(N, H, W)``.
    """
    if path.exists():
        return
    small = torch.cat([F.interpolate(image[None].float(), size=(SIDE, SIDE), mode="area") for image in images])
    pixels = (small.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    truth = F.interpolate(masks[:, None].float(), size=(SIDE, SIDE), mode="area")[:, 0] > 0.25
    _save(path, names=np.array(names), images=pixels, masks=truth.numpy())


def _save(path: Path, **arrays: Any) -> None:
    """Write a file in one step, as result files are."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
