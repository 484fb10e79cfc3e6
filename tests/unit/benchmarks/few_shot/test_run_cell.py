"""One cell from task to result file, for VTFusion and the baselines on one encoder, with a tiny tower."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.few_shot.cells import State, plan, state, task
from benchmarks.few_shot.check import check
from benchmarks.few_shot.config import DatasetEntry, ModelEntry, SweepConfig
from benchmarks.few_shot.models import UnavailableError, arguments_of, build_model, find_model
from benchmarks.few_shot.pictures import choose
from benchmarks.few_shot.run_cell import run
from benchmarks.provenance import write_json

DATA = {"train_batch_size": 2, "eval_batch_size": 3, "num_workers": 0, "val_split_mode": "none"}
METRICS = {"image_auroc", "image_aupr", "image_f1_max", "pixel_auroc", "pixel_aupro", "pixel_f1_max"}
BASELINES = "benchmarks.few_shot.encoder_baselines."


MODELS = {
    "VTFusion": ("anomalib_vtfusion.VTFusion", {"num_steps": 2}),
    "training-free": ("anomalib_vtfusion.VTFusion", {"num_steps": 0}),
    "PatchCore": (f"{BASELINES}EncoderPatchcore", {}),
    "PaDiM": (f"{BASELINES}EncoderPadim", {"n_features": 8}),
    "WinCLIP": ("benchmarks.few_shot.window_clip.EncoderWinClip", {"grid": 4}),
}


@pytest.fixture(scope="module")
def make_task(parts, cnn_encoder, tmp_path_factory):
    """Function that makes the task of a model's cell."""
    folder = tmp_path_factory.mktemp("cells")

    def make(name: str, **changes) -> dict:
        class_path, arguments = MODELS[name]
        entry = ModelEntry(class_path, {"encoder": cnn_encoder, **arguments}, k=changes.pop("shots", None))
        datasets = {"parts": DatasetEntry("MVTecAD", ["woven"], {**DATA, "root": str(parts)})}
        settings = {"k": [1], "seeds": [3], "pictures": 3, **changes}
        config = SweepConfig("trial", {name: entry}, datasets, **settings)
        return task(config, next(plan(config)), folder, accelerator="cpu")

    return make


@pytest.fixture(scope="module")
def cells(make_task):
    """Tasks and results of one cell of every model."""
    tasks = {name: make_task(name) for name in MODELS}
    return {name: (job, run(job)) for name, job in tasks.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_cell_gives_everything_the_protocol_asks_for(name: str, cells) -> None:
    job, result = cells[name]
    write_json(Path(job["files"]["result"]), result)
    assert state(job) is State.DONE
    assert set(result["metrics"]) == METRICS
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert result["images"] == 4
    assert {kind: len(entry["scores"]) for kind, entry in result["defects"].items()} == {"good": 2, "square": 2}
    assert result["defects"]["square"]["auroc"] == result["metrics"]["image_auroc"]
    assert result["fit_seconds"] > 0
    assert result["latency_ms"]["batch_1"] > 0
    assert result["latency_ms"]["batch_8"] is None  # there are four test images
    assert result["peak_memory_mb"]["resident"] > 100
    assert 0 < result["checkpoint_mb"] < 50
    assert [len(reference["sha256"]) for reference in result["references"]["references"]] == [64]
    assert result["image_size"] == [64, 64]
    assert np.load(job["files"]["maps"])["maps"].shape == (3, 96, 96)
    assert np.load(job["views"])["masks"].any()
    assert job["data"]["init_args"]["root"] not in json.dumps({**result, "model": None})


@pytest.mark.parametrize("name", ["VTFusion", "PaDiM"])
def test_two_cells_with_the_same_seed_give_the_same_numbers(name: str, make_task, cells) -> None:
    torch.manual_seed(99)
    again, first = run(make_task(name)), cells[name][1]
    assert (again["metrics"], again["defects"]) == (first["metrics"], first["defects"])


def test_scores_are_taken_before_the_post_processor(cells) -> None:
    scores = [v for entry in cells["PatchCore"][1]["defects"].values() for v in entry["scores"].values()]
    assert len(set(scores)) == 4
    assert max(scores) > 1  # distances; normalised scores lie in [0, 1]


def test_all_models_see_the_same_references(cells) -> None:
    seen = [result["references"] for _, result in cells.values()]
    assert all(references == seen[0] for references in seen)
    assert len(seen[0]["references"]) == 1


def test_winclip_takes_its_references_as_it_takes_queries(parts_datamodule, cnn_encoder) -> None:
    from anomalib_vtfusion.data import FewShot
    from benchmarks.few_shot.window_clip import EncoderWinClip

    datamodule = FewShot(data=parts_datamodule(), k_shot=2)
    datamodule.setup()
    model = EncoderWinClip(k_shot=2, encoder=cnn_encoder, grid=4)
    images = model.collect_reference_images(datamodule.train_dataloader())
    expected = [model.pre_processor.transform(datamodule.train_data[i].image) for i in range(2)]
    assert torch.equal(images, torch.stack(expected))
    model.model.setup("woven", images)
    # A reference lies at distance zero of itself, so its few-shot part is zero and only half the text part is left.
    zero_shot = EncoderWinClip(encoder=cnn_encoder, grid=4)
    zero_shot.model.setup("woven", None)
    alone, together = zero_shot.model(images), model.model(images)
    assert torch.allclose(together.pred_score, alone.pred_score / 2, atol=1e-3)
    assert torch.allclose(together.anomaly_map, alone.anomaly_map / 2, atol=1e-3)


def test_windows_must_cover_the_image(cnn_encoder) -> None:
    from benchmarks.few_shot.window_clip import CropWindowModel

    with pytest.raises(ValueError, match="do not cover"):
        CropWindowModel(cnn_encoder, grid=4, scales=(2, 3), stride=2)
    with pytest.raises(ValueError, match="do not cover"):
        CropWindowModel(cnn_encoder, grid=5)
    model = CropWindowModel(cnn_encoder, grid=4, scales=(2, 4), stride=2)
    assert [window.shape[1] for window in model.encode(torch.rand(1, 3, 64, 64))[1]] == [4, 1]


def test_zero_shot_cell_names_no_references(make_task) -> None:
    result = run(make_task("WinCLIP", shots=[0]))
    assert result["cell"]["k"] == 0
    assert result["references"]["references"] == []


def test_padim_takes_a_single_reference() -> None:
    from benchmarks.few_shot.encoder_baselines import FewShotGaussian

    gaussian = FewShotGaussian()
    gaussian.fit(torch.ones(1, 2, 3, 3))
    # The covariance is the host's regulariser alone: 0.01 + 1e-5 on the diagonal.
    assert torch.allclose(gaussian.inv_covariance[0], torch.eye(2) / 0.01001)


def test_missing_weights_make_a_model_unavailable_and_wrong_arguments_an_error(tmp_path: Path) -> None:
    cell = {"k": 1, "seed": 0}
    entry = {"class_path": "anomalib_vtfusion.VTFusion", "init_args": {}, "image_size": None}
    with pytest.raises(UnavailableError, match="cannot be had"):
        build_model({**entry, "init_args": {"encoder": f"local-dir:{tmp_path / 'none'}"}}, cell, "part")
    with pytest.raises(ValueError, match="does not take shots"):
        build_model({**entry, "init_args": {"shots": 3}}, cell, "part")
    with pytest.raises(ValueError, match="no model class 'Nothing'"):
        find_model("Nothing")
    with pytest.raises(ValueError, match="not an Anomalib model"):
        find_model("anomalib.data.MVTecAD")


def test_pictures_are_spread_over_the_kinds_of_defect() -> None:
    names = [f"{kind}/{i:03}.png" for kind in ("crack", "good", "hole") for i in range(5)]
    chosen = [names[i] for i in choose(names, 6)]
    assert chosen == ["crack/000.png", "crack/002.png", "good/000.png", "good/002.png", "hole/000.png", "hole/002.png"]
    assert choose(names, 0) == []
    assert len(choose(names, 99)) == 15


def test_arguments_passed_on_to_a_parent_count() -> None:
    from benchmarks.few_shot.encoder_baselines import EncoderPadim, FewShotPadim

    assert {"backbone", "n_features", "evaluator"} <= set(arguments_of(FewShotPadim))
    assert {"encoder", "post_processor"} <= set(arguments_of(EncoderPadim))
    assert "args" not in arguments_of(FewShotPadim)


def test_classes_and_arguments_are_checked_before_the_first_cell() -> None:
    good = {"class_path": "Padim", "init_args": {"n_features": 10}, "image_size": 64}
    data = {"class_path": "Folder", "init_args": {"name": "x"}}
    assert check({"models": {"A": good}, "datasets": {"d": data}}) == []
    problems = check(
        {
            "models": {"A": {**good, "init_args": {"shots": 1}}, "B": {**good, "class_path": "Padum"}},
            "datasets": {"d": {**data, "init_args": {"colour": 1}}, "e": {**data, "class_path": "Padim"}},
        }
    )
    assert [problem.split(":")[0] for problem in problems] == ["Model A", "Model B", "Data set d", "Data set e"]
    assert "does not take shots" in problems[0]
    assert "no model class 'Padum'" in problems[1]
    assert "does not take colour" in problems[2]
    assert "no datamodule class 'Padim'" in problems[3]


def test_a_folder_of_images_can_be_compared_on(parts, make_task) -> None:
    datasets = {
        "own": DatasetEntry(
            "Folder",
            ["woven"],
            {
                **DATA,
                "name": "own",
                "root": str(parts / "{category}"),
                "normal_dir": "train/good",
                "normal_test_dir": "test/good",
                "abnormal_dir": "test/square",
                "mask_dir": "ground_truth/square",
            },
        )
    }
    entry = ModelEntry(MODELS["PaDiM"][0], make_task("PaDiM")["model"]["init_args"])
    config = SweepConfig("own", {"PaDiM": entry}, datasets, [1], [0])
    result = run(task(config, next(plan(config)), parts.parent / "own", accelerator="cpu"))
    assert result["images"] == 4
    assert result["class_name"] == "woven"
    assert all(value is not None for value in result["metrics"].values())
