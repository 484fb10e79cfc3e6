"""A sweep's settings: what is refused before anything starts, and which cells there are."""

from pathlib import Path

import pytest
import yaml

from benchmarks.few_shot.cells import CellFiles, State, encoder_digest, plan, state, task
from benchmarks.few_shot.config import SweepConfig
from benchmarks.provenance import ROOT, write_json

CONFIGS = sorted((ROOT / "benchmarks" / "configs").glob("*.yaml"))


def settings(**changes) -> dict:
    return {
        "name": "trial",
        "models": {"A": {"class_path": "Padim"}, "B": {"class_path": "Patchcore", "init_args": {"num_neighbors": 3}}},
        "datasets": {"parts": {"class_path": "Folder", "categories": ["x", "y"]}},
        "k": [1, 2],
        "seeds": [0, 1],
        **changes,
    }


def load(tmp_path: Path, **changes) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings(**changes)), encoding="utf-8")
    return SweepConfig.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [0, 1]}, "k must be at least 1, got 0"),
        ({"k": []}, "k is empty"),
        ({"k": [2, 2]}, "k lists 2 twice"),
        ({"k": ["two"]}, "k must be a list of int"),
        ({"k": 2}, "k must be a list of int"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "must not be negative"),
        ({"name": "../up"}, "used as a file name"),
        ({"models": {}}, "There are no models"),
        ({"models": {"a/b": {"class_path": "Padim"}}}, "used as a file name"),
        ({"models": {"A": {}}}, "models.A lacks class_path"),
        ({"models": {"A": {"class_path": "Padim", "shots": 3}}}, "unknown settings: shots"),
        ({"models": {"A": {"class_path": "Padim", "k": [-1]}}}, "k of model A must be at least 0"),
        ({"datasets": {"d": {"class_path": "Folder", "categories": []}}}, "has no categories"),
        ({"datasets": {"d": {"class_path": "Folder", "categories": ["x", "x"]}}}, "'x' of d is listed twice"),
        ({"datasets": {"d": {"class_path": "MVTecAD", "categories": ["x"]}}}, "Give its folder with --root"),
        ({"root": "/does/not/exist"}, "does not exist"),
        ({"pictures": -1}, "pictures must not be negative"),
        ({"colour": "red"}, "unknown settings: colour"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_wrong(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load(tmp_path, **changes)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)k lists 1 twice.*seeds is empty"):
        load(tmp_path, k=[1, 1], seeds=[])


def test_missing_category_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    datasets = {"d": {"class_path": "MVTecAD", "categories": ["x", "y"], "init_args": {"root": str(tmp_path)}}}
    with pytest.raises(ValueError, match=r"has no folder .*y"):
        load(tmp_path, datasets=datasets)


def test_roots_and_categories_are_filled_in(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    arguments = {"name": "{category}", "root": "{category}", "normal_dir": "good", "train_batch_size": 2}
    datasets = {"d": {"class_path": "Folder", "categories": ["x"], "init_args": arguments}}
    config = load(tmp_path, datasets=datasets, root=str(tmp_path))
    expected = {"name": "x", "root": str(tmp_path / "x"), "normal_dir": "good", "train_batch_size": 2, "category": "x"}
    assert config.data_arguments("d", "x") == expected


def test_every_combination_is_a_cell_once_and_early_cells_compare_all_models(tmp_path: Path) -> None:
    cells = list(plan(load(tmp_path)))
    assert len(cells) == len({cell.id for cell in cells}) == 2 * 2 * 2 * 2
    assert [cell.id for cell in cells[:3]] == ["parts/x/A/k1_seed0", "parts/x/B/k1_seed0", "parts/x/A/k2_seed0"]
    assert {cell.seed for cell in cells[:8]} == {0}


def test_zero_shot_model_runs_once_a_category(tmp_path: Path) -> None:
    models = {"A": {"class_path": "Padim"}, "Z": {"class_path": "WinClip", "k": [0]}}
    zero = [cell.id for cell in plan(load(tmp_path, models=models)) if cell.model == "Z"]
    assert zero == ["parts/x/Z/k0_seed0", "parts/y/Z/k0_seed0"]


def test_state_follows_the_files_and_the_configuration_but_not_the_root(tmp_path: Path) -> None:
    config = load(tmp_path)
    cell = next(plan(config))
    job = task(config, cell, tmp_path)
    files = CellFiles.of(cell, tmp_path)
    assert state(job) is State.NEW
    write_json(files.error, {"reason": "x"})
    assert state(job) is State.FAILED
    write_json(files.result, {"fingerprint": job["fingerprint"]})
    assert state(job) is State.DONE
    config.root = str(tmp_path)
    assert state(task(config, cell, tmp_path)) is State.DONE
    config.models["A"].init_args["n_features"] = 7
    assert state(task(config, cell, tmp_path)) is State.CHANGED


def test_a_new_version_of_the_encoder_is_another_configuration(tmp_path: Path) -> None:
    marks = []
    for content in (b"old", b"new", b"new"):
        folder = tmp_path / str(len(marks))
        folder.mkdir()
        (folder / "open_clip_model.safetensors").write_bytes(content)
        marks.append(encoder_digest(f"local-dir:{folder}"))
    assert marks[0] != marks[1] == marks[2]
    assert encoder_digest("ViT-B-16") is None
    assert len(encoder_digest("vtfusion-tiny")) == 64


def test_pictures_are_kept_by_one_cell_a_model_and_category(tmp_path: Path) -> None:
    config = load(tmp_path, pictures=5)
    kept = [cell.id for cell in plan(config) if task(config, cell, tmp_path)["pictures"]]
    assert kept == ["parts/x/A/k2_seed0", "parts/x/B/k2_seed0", "parts/y/A/k2_seed0", "parts/y/B/k2_seed0"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_holds_no_path_and_makes_cells(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    root = None
    for dataset in content["datasets"].values():
        assert "root" not in dataset.get("init_args", {})
        if dataset["class_path"] in {"MVTecAD", "Visa"}:
            root = str(tmp_path)
            for category in dataset["categories"]:
                (tmp_path / category).mkdir(exist_ok=True)
            assert dataset["init_args"]["val_split_mode"] == "none"
    assert list(plan(SweepConfig.load(path, root=root)))
