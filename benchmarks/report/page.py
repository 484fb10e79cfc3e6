"""Puts a report together: Markdown, CSV, plots and one self-contained page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jinja2

from benchmarks.report import heatmaps, plots, tables
from benchmarks.report.results import COSTS, METRICS, Sweep, summary

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_report(sweep: Sweep, folder: Path) -> list[Path]:
    """Write all files of a report.

    Args:
        sweep: The sweep.
        folder: Folder for the files.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(sweep, folder)
    files = [folder / name for name in ("cells.csv", "summary.csv", "defects.csv")]
    sweep.cells.to_csv(files[0], index=False)
    summary(sweep.cells, [*METRICS, *COSTS]).to_csv(files[1], index=False, float_format="%.6g")
    tables.defect_rows(sweep).to_csv(files[2], index=False)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(_markdown(sweep, drawn), encoding="utf-8")
    page.write_text(_page(sweep, drawn), encoding="utf-8")
    return [*files, *drawn.values(), markdown, page]


def _subtitle(sweep: Sweep) -> str:
    cells = sweep.cells
    shots, seeds = sorted(cells["k"].unique()), cells["seed"].nunique()
    categories = cells.groupby("dataset")["category"].nunique().sum()
    deviation = "mean ± standard deviation over seeds" if seeds > 1 else "one seed, so no deviation"
    return (
        f"{len(cells)} cells: {cells['model'].nunique()} models, {categories} categories, "
        f"{', '.join(map(str, shots))} shots; {deviation}. Overall figures are means over categories. All models saw "
        "the same references; nothing was chosen on test images. F1-max is at the best threshold of the test set, as "
        "in the papers."
    )


def _markdown(sweep: Sweep, drawn: dict[str, Path]) -> str:
    parts = [f"# Results: {sweep.name}", _subtitle(sweep), "## Accuracy"]
    parts += [table.markdown() for table in tables.accuracy_tables(sweep)]
    parts += ["## Plots", *(f"![{title}]({path.name})" for title, path in drawn.items())]
    by_category = tables.category_tables(sweep)
    if by_category:
        parts += ["## By category", *(table.markdown() for table in by_category)]
    parts += ["## Cost", *(table.markdown() for table in tables.cost_tables(sweep))]
    missing = missing_lines(sweep)
    if missing:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in missing)]
    parts += ["## Where the figures come from", "\n".join(f"- {line}" for line in origin_lines(sweep))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _page(sweep: Sweep, drawn: dict[str, Path]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    by_category, sheets, missing = tables.category_tables(sweep), heatmaps.sheets(sweep), missing_lines(sweep)
    sections = [("accuracy", "Accuracy"), ("plots", "Plots"), ("maps", "Heat maps"), ("categories", "By category")]
    sections += [("cost", "Cost"), ("missing", "Not measured"), ("origin", "Origin")]
    shown = {"maps": sheets, "categories": by_category, "missing": missing}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Few-shot anomaly detection: {sweep.name}",
        subtitle=_subtitle(sweep),
        sections=[(key, name) for key, name in sections if shown.get(key, True)],
        accuracy=tables.accuracy_tables(sweep),
        plots={title: heatmaps.svg_address(path) for title, path in drawn.items()},
        sheets=sheets,
        categories=by_category,
        cost=tables.cost_tables(sweep),
        missing=missing,
        origin=origin_lines(sweep),
    )


def missing_lines(sweep: Sweep) -> list[str]:
    """Cells that failed or were skipped, by model and reason."""
    lines = []
    for kind, reasons in (("skipped", sweep.skipped), ("failed", sweep.failed)):
        groups = Counter((cell.split("/")[-2], reason) for cell, reason in reasons.items())
        lines += [f"{model}: {count} cells {kind}. {reason}" for (model, reason), count in sorted(groups.items())]
    return lines


def origin_lines(sweep: Sweep) -> list[str]:
    """Commits, versions, devices and dates of the cells."""
    origins = sweep.provenance
    lines = []
    commits = Counter((o["commit"] or "unknown")[:12] + (" with changes" if o["dirty"] else "") for o in origins)
    lines.append("Commit: " + ", ".join(f"{commit} ({count} cells)" for commit, count in commits.most_common()))
    dates = sorted(o["date"] for o in origins)
    lines.append(f"Measured from {dates[0]} to {dates[-1]}")
    devices = Counter(o["device"]["gpu"] or f"{o['device']['cpu']}, {o['device']['cores']} cores" for o in origins)
    lines.append("Device: " + ", ".join(f"{device} ({count} cells)" for device, count in devices.most_common()))
    loads = sorted(o["device"]["load"] for o in origins if o["device"]["load"] is not None)
    if loads:
        lines.append(
            f"Load of the machine at the end of a cell: {loads[0]} to {loads[-1]}, median {loads[len(loads) // 2]}"
        )
    versions = Counter(", ".join(f"{name} {v}" for name, v in o["versions"].items()) for o in origins)
    lines += [f"Versions: {text} ({count} cells)" for text, count in versions.most_common()]
    return lines
