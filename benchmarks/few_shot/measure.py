"""What a model costs: milliseconds an image, peak memory, size of its checkpoint."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = (1, 8)
# Few: of a cell that takes a minute, timing eight images five times takes ten seconds and more.
WARM_UP, REPEATS = 1, 3


@torch.no_grad()
def latency(model: nn.Module, images: Tensor, device: torch.device) -> dict[str, float | None]:
    """Median milliseconds an image of the network's forward pass, at batch 1 and 8.

    Args:
        model: The torch model; left on the CPU, in the mode that it was in.
        images: Pre-processed real images ``(N, 3, H, W)``; a batch larger than N is not timed.
        device: Where to time.
    """
    training = model.training
    model.eval().to(device)
    images = images.to(device)
    result: dict[str, float | None] = {}
    for batch in BATCHES:
        if batch > len(images):
            result[f"batch_{batch}"] = None
            continue
        seconds = []
        for i in range(WARM_UP + REPEATS):
            start = i * batch % (len(images) - batch + 1)
            chunk = images[start : start + batch]
            _synchronize(device)
            begin = time.perf_counter()
            model(chunk)
            _synchronize(device)
            seconds.append(time.perf_counter() - begin)
        result[f"batch_{batch}"] = round(statistics.median(seconds[WARM_UP:]) / batch * 1e3, 3)
    model.train(training)
    model.cpu()
    return result


def peak_memory_mb(device: torch.device) -> dict[str, float | None]:
    """Most memory that this process has held so far, in MB of 10^6 bytes: resident, and on the graphics card."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    card = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return {"resident": round(resident, 1), "gpu": None if card is None else round(card, 1)}


def checkpoint_mb(trainer: Any, folder: Path) -> float:
    """Size of the checkpoint that the trainer writes, in MB of 10^6 bytes."""
    path = folder / "measured.ckpt"
    trainer.save_checkpoint(path)
    size = path.stat().st_size / 1e6
    path.unlink()
    return round(size, 3)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
