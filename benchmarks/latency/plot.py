"""Draws a result: time of each variant, against the number of references, and against the number of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a result of the benchmark into a PNG file."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2, 1, 1))
    variants = result["variants"]
    names = list(variants)
    for offset, batch in enumerate(str(batch) for batch in result["settings"]["batches"]):
        timed = [variants[name]["batch"][batch] for name in names]
        middle = [entry["wall_ms"]["median"] for entry in timed]
        spread = [
            [entry["wall_ms"]["median"] - entry["wall_ms"]["q1"] for entry in timed],
            [entry["wall_ms"]["q3"] - entry["wall_ms"]["median"] for entry in timed],
        ]
        places = [place + 0.4 * (offset - 0.5) for place in range(len(names))]
        axes[0].barh(places, middle, height=0.38, xerr=spread, label=f"batch {batch}")
        for place, entry in zip(places, timed, strict=True):
            ratio = entry["wall_ratio"]["median"]
            axes[0].text(entry["wall_ms"]["q3"], place, f"  {ratio:.2f}x", va="center", fontsize=8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xscale("log")
    axes[0].set_xlabel("ms an image, median and quartiles; ratio to the bare tower")
    axes[0].margins(x=0.15)
    axes[0].legend()
    for axis, points, title in (
        (axes[1], result["references"], "references (k)"),
        (axes[2], result["images"], "images, one by one"),
    ):
        counts = [int(count) for count in points]
        for clock, label in (("wall_ms", "clock"), ("cpu_ms", "processor")):
            values = [point[clock] for point in points.values()]
            middle = [value["median"] if isinstance(value, dict) else value for value in values]
            axis.plot(counts, middle, marker="o", label=label)
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(title)
        axis.set_ylabel("ms an image")
        axis.legend()
    figure.suptitle(f"VTFusion on {result['settings']['encoder']}, {result['settings']['threads']} threads")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
