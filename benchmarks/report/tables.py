"""Tables of a report, as plain rows of text that Markdown and the page both show."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.report.results import COSTS, METRICS, OVERALL, Sweep, summary

PUBLISHED = Path(__file__).with_name("published.yaml")
PUBLISHED_SHOTS = (1, 2, 4)


@dataclass(frozen=True)
class TableText:
    """A table to show.

    Attributes:
        title: What it shows.
        columns: Heads.
        rows: Cells, the first the row's name.
        best: For each row the columns whose figure is the best of its column.
        note: What must be known to read it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: list[set[int]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, best figures bold."""
        marked = [
            [f"**{text}**" if column in best else text for column, text in enumerate(row)]
            for row, best in zip(self.rows, self.best, strict=True)
        ]
        lines = [self.columns, ["---"] * len(self.columns), *marked]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")


def accuracy_tables(sweep: Sweep) -> list[TableText]:
    """For each data set and metric: models by shots over all categories; for the first metrics also by category."""
    summed = summary(sweep.cells)
    tables = []
    for dataset in sweep.cells["dataset"].unique():
        of_set = summed[summed["dataset"] == dataset]
        for metric, title in METRICS.items():
            rows = of_set[(of_set["metric"] == metric) & (of_set["category"] == OVERALL)]
            if not rows.empty:
                tables.append(_by_shots(f"{dataset}: {title}, %", rows, sweep.models(), dataset, metric))
    return tables


def category_tables(sweep: Sweep, metrics: Sequence[str] = ("image_auroc", "pixel_aupro")) -> list[TableText]:
    """For each data set, metric and number of shots: models by category."""
    summed = summary(sweep.cells, metrics)
    tables = []
    for (dataset, metric, k), rows in summed.groupby(["dataset", "metric", "k"]):
        categories = sorted(set(rows["category"]) - {OVERALL})
        if len(categories) < 2:
            continue
        values = {(row.model, row.category): (row.mean, row.std) for row in rows.itertuples()}
        models = [model for model in sweep.models() if model in set(rows["model"])]
        title = f"{dataset}, {k}-shot: {METRICS[metric]} by category, %"
        means = rows[rows["category"] == OVERALL]
        tables.append(_table(title, models, [*categories, OVERALL], values, partial=_partial(means, "category")))
    return tables


def cost_tables(sweep: Sweep) -> list[TableText]:
    """Median costs of a model, over all its cells, by the number of shots."""
    medians = sweep.cells.groupby(["model", "k"])[list(COSTS)].median()
    rows = []
    for model in sweep.models():
        for k, costs in medians.loc[model].iterrows():
            rows.append([model, str(k), *(_figure(costs[name]) for name in COSTS)])
    note = (
        "Medians over the cells. Milliseconds are the network's forward pass on real images. Memory is the process's, "
        "libraries included, without the scoring. Checkpoints leave out the shared encoder where it is VTFusion's."
    )
    return [TableText("By model and shots", ["model", "k", *COSTS.values()], rows, [set()] * len(rows), note)]


def defect_rows(sweep: Sweep) -> pd.DataFrame:
    """Image AUROC of each kind of defect against the normal images, one row a cell and kind."""
    import json

    rows = []
    for path in sorted((sweep.folder / "cells").rglob("*.json")):
        if path.name.endswith((".error.json", ".skipped.json")) or path.name.startswith("."):
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        rows += [
            {**content["cell"], "defect": kind, "images": len(entry["scores"]), "image_auroc": entry["auroc"]}
            for kind, entry in content["defects"].items()
            if entry["label"]
        ]
    return pd.DataFrame(rows)


def _by_shots(title: str, rows: pd.DataFrame, models: list[str], dataset: str, metric: str) -> TableText:
    shots = sorted(rows["k"].unique())
    values: dict[tuple[str, Any], tuple[float, float]] = {
        (row.model, row.k): (row.mean, row.std) for row in rows.itertuples()
    }
    partial = _partial(rows, "k")
    names = ", ".join(sorted({model for model, _ in partial}))
    note = f"Fewer categories than the others: {names}." if partial else ""
    table = _table(title, [m for m in models if m in set(rows["model"])], shots, values, note, partial)
    table.columns[1:] = [f"{k}-shot" for k in shots]
    published = published_rows(dataset, metric, shots)
    if published:
        table.rows.extend(published)
        table.best.extend([set()] * len(published))
        return TableText(
            table.title,
            table.columns,
            table.rows,
            table.best,
            f"{note} Rows marked *published* are "
            "their papers' figures, with their encoders and references; they were not measured here.".strip(),
        )
    return table


def published_rows(dataset: str, metric: str, shots: Sequence[int]) -> list[list[str]]:
    """Published figures of a metric, in the columns of ``shots``."""
    rows = []
    for entry in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        if (entry["dataset"], entry["metric"]) == (dataset, metric):
            for method, figures in entry["methods"].items():
                by_shot = dict(zip(PUBLISHED_SHOTS, figures, strict=True))
                texts = [f"{by_shot[k]:.1f}" if by_shot.get(k) is not None else "" for k in shots]
                rows.append([f"{method} *(published)*", *texts])
    return rows


def _partial(means: pd.DataFrame, column: str) -> set[tuple[str, Any]]:
    """Model and ``column`` of the means over fewer categories than the others'."""
    fewer = means[means["categories"] < means["categories"].max()]
    return set(zip(fewer["model"], fewer[column], strict=True))


def _table(
    title: str,
    models: Sequence[str],
    columns: Sequence[Any],
    values: dict[tuple[str, Any], tuple[float, float]],
    note: str = "",
    partial: Collection[tuple[str, Any]] = (),
) -> TableText:
    """Table of ``values``; those in ``partial``, over fewer categories than the others, are never the best."""
    rows = [
        [model, *(_percent(*values[model, c]) if (model, c) in values else "" for c in columns)] for model in models
    ]
    rivals = {key: round(mean, 3) for key, (mean, _) in values.items() if key not in partial}
    tops = {c: max((rivals[m, c] for m in models if (m, c) in rivals), default=None) for c in columns}
    best = [
        {
            i + 1
            for i, c in enumerate(columns)
            if len(models) > 1 and (model, c) in rivals and rivals[model, c] == tops[c]
        }
        for model in models
    ]
    return TableText(title, ["model", *map(str, columns)], rows, best, note)


def _percent(mean: float, std: float) -> str:
    return f"{100 * mean:.1f}" + ("" if math.isnan(std) else f" ± {100 * std:.1f}")


def _figure(value: float) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
