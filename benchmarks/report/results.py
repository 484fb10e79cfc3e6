"""Reads the result files of a sweep into a table, and sums it up over seeds and categories."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

METRICS = {
    "image_auroc": "image AUROC",
    "image_aupr": "image AUPR",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupro": "pixel AUPRO",
    "pixel_f1_max": "pixel F1-max",
}
COSTS = {
    "fit_seconds": "fit, s",
    "batch_1_ms": "ms per image, batch 1",
    "batch_8_ms": "ms per image, batch 8",
    "memory_mb": "peak memory, MB",
    "checkpoint_mb": "checkpoint, MB",
}
KEYS = ["dataset", "category", "model", "k", "seed"]
OVERALL = "overall"


@dataclass(frozen=True)
class Sweep:
    """What the files of a sweep hold.

    Attributes:
        name: Name of the sweep.
        folder: Its folder.
        cells: One row a finished cell: its keys, metrics and costs.
        failed: Reason of each failed cell, by its name.
        skipped: Reason of each skipped cell, by its name.
        provenance: What each finished cell says of commit, versions and device.
    """

    name: str
    folder: Path
    cells: pd.DataFrame
    failed: dict[str, str]
    skipped: dict[str, str]
    provenance: list[dict[str, Any]]

    def models(self) -> list[str]:
        """Models in order of their mean image AUROC, best first."""
        return list(self.cells.groupby("model")["image_auroc"].mean().sort_values(ascending=False).index)


def load(folder: str | Path) -> Sweep:
    """Read a sweep.

    Args:
        folder: Folder of the sweep, the one that holds ``cells``.

    Raises:
        FileNotFoundError: If there is no finished cell.
    """
    folder = Path(folder)
    rows, provenance = [], []
    reasons: dict[str, dict[str, str]] = {"error": {}, "skipped": {}}
    for path in sorted((folder / "cells").rglob("*.json")):
        kind = path.name.removesuffix(".json").rpartition(".")[2]
        if path.name.startswith("."):
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if kind in reasons:
            cell = content["cell"]
            name = f"{cell['dataset']}/{cell['category']}/{cell['model']}/k{cell['k']}_seed{cell['seed']}"
            reasons[kind][name] = str(content["reason"]).strip().partition("\n")[0]
        else:
            rows.append(_row(content))
            provenance.append(content["provenance"])
    if not rows:
        raise FileNotFoundError(f"There is no finished cell in {folder / 'cells'}.")
    cells = pd.DataFrame(rows).sort_values(KEYS, ignore_index=True)
    return Sweep(folder.resolve().name, folder, cells, reasons["error"], reasons["skipped"], provenance)


def _row(content: dict[str, Any]) -> dict[str, Any]:
    latency = content["latency_ms"]
    return {
        **content["cell"],
        **{metric: content["metrics"].get(metric) for metric in METRICS},
        "fit_seconds": content["fit_seconds"],
        "batch_1_ms": latency["batch_1"],
        "batch_8_ms": latency["batch_8"],
        "memory_mb": content["peak_memory_mb"]["resident"],
        "checkpoint_mb": content["checkpoint_mb"],
        "images": content["images"],
    }


def summary(cells: pd.DataFrame, values: Iterable[str] = METRICS) -> pd.DataFrame:
    """Mean and standard deviation over seeds, per category and overall.

    Overall is the mean over categories for each seed first, so its deviation is that of the figure that a paper gives.
    It is taken over the categories that a model has in every seed; ``n`` and ``categories`` say how much that is.

    Args:
        cells: One row a cell.
        values: Columns to sum up.

    Returns:
        Rows by ``dataset``, ``category``, ``model``, ``k`` and ``metric`` with ``mean``, ``std`` (n - 1; NaN for one
        seed), ``n`` (seeds) and ``categories``.
    """
    values = [value for value in values if cells[value].notna().any()]
    long = cells.melt(id_vars=KEYS, value_vars=values, var_name="metric", value_name="value").dropna(subset=["value"])
    long["value"] = long["value"].astype(float)
    groups = ["dataset", "model", "k", "metric"]
    # A category counts overall where every seed of its model has it.
    seeds = long.groupby(groups)["seed"].transform("nunique")
    has = long.groupby([*groups, "category"])["seed"].transform("nunique")
    complete = long[has == seeds]
    overall = complete.groupby([*groups, "seed"], as_index=False).agg(
        value=("value", "mean"), categories=("category", "nunique")
    )
    rows = pd.concat([long.assign(categories=1), overall.assign(category=OVERALL)], ignore_index=True)
    return rows.groupby(["dataset", "category", "model", "k", "metric"], as_index=False).agg(
        mean=("value", "mean"), std=("value", "std"), n=("value", "size"), categories=("categories", "max")
    )
