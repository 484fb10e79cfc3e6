"""Reports from fabricated result files, against figures worked out by hand."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.provenance import provenance, write_json
from benchmarks.report.__main__ import main
from benchmarks.report.heatmaps import average_precision, overlay, sheets
from benchmarks.report.results import OVERALL, load, summary
from benchmarks.report.tables import accuracy_tables, category_tables, published_rows

# Image AUROC by model and category: one figure for each of three seeds.
AUROC = {
    ("Ours", "grid"): (0.90, 0.92, 0.94),
    ("Ours", "tile"): (0.80, 0.80, 0.86),
    ("Other", "grid"): (0.50, 0.60, 0.70),
    ("Other", "tile"): (0.70, 0.70, 0.70),
}


def write_cell(folder: Path, model: str, category: str, seed: int, auroc: float, k: int = 2, dataset="MVTecAD") -> None:
    metrics = {"image_auroc": auroc, "image_aupr": 0.9, "image_f1_max": 0.9, "pixel_auroc": auroc, "pixel_aupro": 0.4}
    content = {
        "cell": {"dataset": dataset, "category": category, "model": model, "k": k, "seed": seed},
        "metrics": {**metrics, "pixel_f1_max": None},
        "images": 10,
        "defects": {
            "good": {"label": 0, "auroc": None, "scores": {"000.png": 0.1}},
            "hole": {"label": 1, "auroc": auroc, "scores": {"000.png": 0.9, "001.png": 0.8}},
        },
        "fit_seconds": 10.0 + seed,
        "latency_ms": {"batch_1": 20.0, "batch_8": None},
        "peak_memory_mb": {"resident": 900.0, "gpu": None},
        "checkpoint_mb": 1.5,
        "provenance": provenance(),
    }
    write_json(folder / "cells" / dataset / category / model / f"k{k}_seed{seed}.json", content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (model, category), values in AUROC.items():
        for seed, value in enumerate(values):
            write_cell(tmp_path / "sweep", model, category, seed, value)
    return tmp_path / "sweep"


def row(table, **keys):
    for key, value in keys.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_mean_and_deviation_by_category_and_overall(folder: Path) -> None:
    found = summary(load(folder).cells)
    grid = row(found, model="Ours", category="grid", metric="image_auroc")
    assert (grid["mean"], grid["std"], grid["n"]) == (pytest.approx(0.92), pytest.approx(0.02), 3)
    # Means over both categories by seed are 0.85, 0.86, 0.90: mean 0.87, squares 0.0004 + 0.0001 + 0.0009 over two.
    overall = row(found, model="Ours", category=OVERALL, metric="image_auroc")
    assert overall["mean"] == pytest.approx(0.87)
    assert overall["std"] == pytest.approx(math.sqrt(0.0014 / 2))
    assert overall["categories"] == 2
    assert "pixel_f1_max" not in set(found["metric"])


def test_overall_takes_only_categories_that_are_complete(folder: Path) -> None:
    (folder / "cells/MVTecAD/tile/Ours/k2_seed2.json").unlink()
    found = summary(load(folder).cells)
    overall = row(found, model="Ours", category=OVERALL, metric="image_auroc")
    assert (overall["mean"], overall["categories"]) == (pytest.approx(0.92), 1)
    (table,) = (t for t in accuracy_tables(load(folder)) if "image AUROC" in t.title)
    assert "Fewer categories than the others: Ours." in table.note
    assert not table.best[table.rows.index(next(row for row in table.rows if row[0] == "Ours"))]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_cell(tmp_path, "Ours", "grid", 0, 0.5, dataset="parts")
    (table,) = (t for t in accuracy_tables(load(tmp_path)) if "image AUROC" in t.title)
    assert table.rows == [["Ours", "50.0"]]
    assert table.note == ""


def test_table_shows_per_cent_marks_the_best_and_puts_published_figures_beside(folder: Path) -> None:
    (table,) = (t for t in accuracy_tables(load(folder)) if "image AUROC" in t.title)
    assert table.columns == ["model", "2-shot"]
    assert table.rows[0] == ["Ours", "87.0 ± 2.6"]
    assert table.rows[1][0] == "Other"
    assert table.best[0] == {1}
    assert ["PatchCore *(published)*", "86.3"] in table.rows
    assert ["VTFusion (paper) *(published)*", "96.8"] in table.rows
    text = table.markdown()
    assert "| Ours | **87.0 ± 2.6** |" in text
    assert "not measured here" in text


def test_category_tables_hold_every_category(folder: Path) -> None:
    (table,) = (t for t in category_tables(load(folder)) if "image AUROC" in t.title)
    assert table.columns == ["model", "grid", "tile", OVERALL]
    assert table.rows[0] == ["Ours", "92.0 ± 2.0", "82.0 ± 3.5", "87.0 ± 2.6"]


def test_published_figures_are_those_of_the_papers() -> None:
    rows = {name: figures for name, *figures in published_rows("VisA", "image_auroc", [1, 2, 4])}
    assert rows["VTFusion (paper) *(published)*"] == ["", "86.2", ""]
    assert rows["WinCLIP+ *(published)*"] == ["83.8", "84.6", "87.3"]
    assert published_rows("factory", "image_auroc", [1]) == []


def test_average_precision_by_hand() -> None:
    # Hits at ranks 1 and 3: (1/1 + 2/3) / 2.
    assert average_precision(np.array([[0.9, 0.5], [0.7, 0.1]]), np.array([[True, True], [False, False]])) == (
        pytest.approx(5 / 6)
    )


def test_overlay_is_hot_where_the_map_is_high() -> None:
    image, values = np.full((2, 2, 3), 128, dtype=np.uint8), np.array([[0.0, 1.0], [0.0, 0.0]])
    pixels = overlay(image, values, np.array([0.0, 1.0])).astype(int)
    red_minus_blue = pixels[..., 0] - pixels[..., 2]
    assert red_minus_blue[0, 1] > 0 > red_minus_blue.max(where=values < 0.5, initial=-255) - 1


def add_pictures(folder: Path) -> None:
    random = np.random.default_rng(0)
    masks = np.zeros((3, 8, 8), dtype=bool)
    masks[:2, :4, :4] = True
    names = np.array(["hole/000.png", "hole/001.png", "good/000.png"])
    views = folder / "views/MVTecAD/grid.npz"
    views.parent.mkdir(parents=True)
    np.savez(views, names=names, images=random.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8), masks=masks)
    for model, values in {
        "Ours": (masks[0], 1 - masks[0] * 0.5, masks[0]),
        "Other": (1 - masks[0], masks[0], masks[0]),
    }.items():
        path = folder / "cells/MVTecAD/grid" / model / "k2_seed0.npz"
        np.savez(path, names=names, maps=np.stack(values).astype(np.float16))


def test_best_and_worst_maps_of_every_model_on_the_same_images(folder: Path) -> None:
    add_pictures(folder)
    (sheet,) = sheets(load(folder))
    assert sheet.models == ["Ours", "Other"]
    assert {strip.image: strip.why for strip in sheet.strips} == {
        "hole/000.png": "best of Ours; worst of Other",
        "hole/001.png": "worst of Ours; best of Other",
    }
    assert all(len(strip.pictures) == 4 and all(strip.pictures) for strip in sheet.strips)
    assert sheet.strips[0].precision[0] == "100"


def test_report_is_written_from_the_files_alone_and_the_page_needs_no_other_file(folder: Path, tmp_path: Path) -> None:
    add_pictures(folder)
    broken = {"dataset": "MVTecAD", "category": "grid", "model": "Broken", "k": 2, "seed": 0}
    write_json(folder / "cells/MVTecAD/grid/Broken/k2_seed0.error.json", {"cell": broken, "reason": "Out of luck.\nx"})
    absent = {**broken, "model": "Absent<b>"}
    write_json(folder / "cells/MVTecAD/grid/A/k2_seed0.skipped.json", {"cell": absent, "reason": "No weights."})
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    markdown = (tmp_path / "out/report.md").read_text()
    for text in (page, markdown):
        assert "Broken: 1 cells failed. Out of luck." in text
    assert "Absent&lt;b&gt;: 1 cells skipped. No weights." in page
    assert "Absent<b>" not in page
    assert not [
        source for source in re.findall(r'(?:src|href)="([^"]*)"', page) if not source.startswith(("data:", "#"))
    ]
    assert page.count("data:image/png") == 8
    for name in re.findall(r"\]\(([^)]*)\)", markdown):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    for text in (page, markdown):
        assert str(tmp_path) not in text
    assert "MVTecAD,grid,Ours,2,0,0.9," in (tmp_path / "out/cells.csv").read_text()


def test_equal_results_make_an_equal_report(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        main([str(folder), "--output", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "MVTecAD_latency.svg",
        "MVTecAD_shots.svg",
        "cells.csv",
        "defects.csv",
        "report.html",
        "report.md",
        "summary.csv",
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_folder_without_results_is_told(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no finished cell" in capsys.readouterr().err


def test_partly_written_files_are_not_read(folder: Path) -> None:
    (folder / "cells/MVTecAD/grid/Ours/.k2_seed9.json.abc.tmp").write_text("{")
    (folder / "cells/MVTecAD/grid/Ours/.k2_seed9.json").write_text("{")
    assert len(load(folder).cells) == 12
    assert json.loads((folder / "cells/MVTecAD/grid/Ours/k2_seed0.json").read_text())["images"] == 10
