"""Plots of a report: AUROC against shots, accuracy against latency."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from benchmarks.report.results import METRICS, OVERALL, Sweep, summary

MARKERS = "osD^vP*Xh<>"


def draw(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """Draw all plots as SVG.

    Args:
        sweep: The sweep.
        folder: Folder for the files.

    Returns:
        File of each plot by its title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    # Text stays text, and equal data makes an equal file.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": sweep.name, "font.size": 10}):
        for dataset in sweep.cells["dataset"].unique():
            for title, name, figure in (
                (f"{dataset}: accuracy against shots", "shots", against_shots(sweep, dataset)),
                (f"{dataset}: accuracy against latency", "latency", against_latency(sweep, dataset)),
            ):
                path = folder / f"{dataset}_{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                # Matplotlib leaves blanks at the ends of lines.
                lines = path.read_text(encoding="utf-8").splitlines()
                path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
                files[title] = path
    return files


def against_shots(sweep: Sweep, dataset: str) -> Figure:
    """Image AUROC and pixel AUPRO against k, with a band of one standard deviation over seeds."""
    summed = summary(sweep.cells[sweep.cells["dataset"] == dataset], ("image_auroc", "pixel_aupro"))
    overall = summed[(summed["category"] == OVERALL) & (summed["k"] > 0)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, metric in zip(axes, ("image_auroc", "pixel_aupro"), strict=True):
        rows = overall[overall["metric"] == metric]
        for i, model in enumerate(sweep.models()):
            line = rows[rows["model"] == model].sort_values("k")
            if line.empty:
                continue
            mean, std = 100 * line["mean"], 100 * line["std"].fillna(0)
            (drawn,) = axis.plot(line["k"], mean, marker=MARKERS[i % len(MARKERS)], label=model)
            axis.fill_between(line["k"], mean - std, mean + std, color=drawn.get_color(), alpha=0.12, linewidth=0)
        shots = sorted(rows["k"].unique())
        if shots and shots[0] < shots[-1]:
            axis.set_xscale("log", base=2)
        axis.set_xticks(shots, [str(k) for k in shots])
        _finish(axis, "reference images", f"{METRICS[metric]}, %")
    _legend(figure, axes[0])
    return figure


def against_latency(sweep: Sweep, dataset: str) -> Figure:
    """Image AUROC and pixel AUPRO at the most shots against milliseconds an image at batch 1."""
    cells = sweep.cells[sweep.cells["dataset"] == dataset]
    most = cells["k"].max()
    summed = summary(cells, ("image_auroc", "pixel_aupro"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, metric in zip(axes, ("image_auroc", "pixel_aupro"), strict=True):
        for i, model in enumerate(sweep.models()):
            k = 0 if set(cells.loc[cells["model"] == model, "k"]) == {0} else most
            own = cells[(cells["model"] == model) & (cells["k"] == k)]
            row = summed[
                (summed["category"] == OVERALL)
                & (summed["model"] == model)
                & (summed["k"] == k)
                & (summed["metric"] == metric)
            ]
            if not row.empty:
                marker = MARKERS[i % len(MARKERS)]
                axis.plot(own["batch_1_ms"].median(), 100 * row["mean"], marker, markersize=9, label=model)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        low, high = axis.get_xlim()
        axis.set_xlim(low / 1.3, high * 1.3)
        _finish(axis, "ms per image, batch 1", f"{METRICS[metric]} at {most}-shot, %")
    _legend(figure, axes[0])
    return figure


def _finish(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
