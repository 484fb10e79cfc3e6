"""FewShot and DemoParts where Anomalib builds and runs datamodules: command line, registry, benchmark and engine."""

import json
from importlib.metadata import entry_points
from pathlib import Path

import anomalib.data
import numpy as np
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule, MVTecAD, get_datamodule
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from PIL import Image

from anomalib_vtfusion.data import DemoParts, FewShot, demo, select_references

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put both names where the start-up hook puts them."""
    monkeypatch.setattr(anomalib.data, "FewShot", FewShot, raising=False)
    monkeypatch.setattr(anomalib.data, "DemoParts", DemoParts, raising=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Category ``nut`` in the layout of MVTec AD: 5 normal training, 2 normal test and 2 bad test images."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    counts = {"train/good": 5, "test/good": 2, "test/hole": 2}
    for folder, count in counts.items():
        for i in range(count):
            path = root / "nut" / folder / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(100, 130, (64, 64, 3), dtype=np.uint8)
            mask = np.zeros((64, 64), dtype=np.uint8)
            if folder == "test/hole":
                pixels[20:40, 20:40], mask[20:40, 20:40] = 0, 255
                mask_path = root / "nut/ground_truth/hole" / f"{i:03}_mask.png"
                mask_path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(mask_path)
            Image.fromarray(pixels).save(path)
    return root


def tiny_padim() -> Padim:
    return Padim(
        backbone="resnet18",
        layers=["layer1"],
        pre_trained=False,
        n_features=8,
        pre_processor=Padim.configure_pre_processor((64, 64)),
        visualizer=False,
    )


def wrapped_config(dataset: Path, **arguments: object) -> dict:
    inner = {"root": str(dataset), "category": "nut", "num_workers": 0, **arguments}
    return {"class_path": "MVTecAD", "init_args": inner}


def test_entry_points_name_the_classes() -> None:
    found = {point.name: point.load() for point in entry_points(group="anomalib.data")}
    assert found["FewShot"] is FewShot
    assert found["DemoParts"] is DemoParts


@pytest.mark.usefixtures("registered")
class TestRegistry:
    def test_few_shot(self, dataset: Path) -> None:
        built = get_datamodule(
            {"data": {"class_path": "FewShot", "init_args": {"data": wrapped_config(dataset), "k_shot": 2, "seed": 4}}}
        )
        assert isinstance(built, FewShot)
        assert isinstance(built.data, MVTecAD)
        assert (built.k_shot, built.seed, built.root, built.category) == (2, 4, dataset, "nut")

    def test_demo_parts(self, tmp_path: Path) -> None:
        built = get_datamodule({"class_path": "DemoParts", "init_args": {"category": "tile", "root": str(tmp_path)}})
        assert isinstance(built, DemoParts)
        assert (built.category, built.root) == ("tile", tmp_path)

    def test_few_shot_of_demo_parts(self) -> None:
        inner = {"class_path": "DemoParts", "init_args": {"category": "plate"}}
        built = get_datamodule({"class_path": "FewShot", "init_args": {"data": inner, "k_shot": 1}})
        assert (type(built.data), built.name, built.category) == (DemoParts, "DemoParts", "plate")

    def test_benchmark_sweeps_over_shots_and_seeds(self, dataset: Path) -> None:
        arguments = {
            "seed": 0,
            "model": {"class_path": "Padim", "init_args": {"pre_trained": False}},
            "data": {
                "class_path": "FewShot",
                "init_args": {
                    "data": wrapped_config(dataset),
                    "k_shot": {"grid": [1, 2]},
                    "seed": {"grid": [0, 1]},
                },
            },
        }
        jobs = list(BenchmarkJobGenerator("cpu").generate_jobs(arguments, None))
        assert [(job.datamodule.k_shot, job.datamodule.seed) for job in jobs] == [(1, 0), (1, 1), (2, 0), (2, 1)]
        assert jobs[0].flat_cfg["data.init_args.data.init_args.category"] == "nut"


class TestCommandLine:
    def parse(self, *arguments: str) -> AnomalibDataModule:
        model = ["--model", "Padim", "--model.pre_trained", "false"]
        return AnomalibCLI(args=["fit", *model, *arguments], run=False).datamodule

    def test_few_shot_arguments(self, dataset: Path) -> None:
        inner = ["--data.data", "MVTecAD", "--data.data.root", str(dataset), "--data.data.category", "nut"]
        built = self.parse("--data", "FewShot", *inner, "--data.k_shot", "2", "--data.seed", "7")
        assert isinstance(built, FewShot)
        assert isinstance(built.data, MVTecAD)
        assert (built.k_shot, built.seed, built.root, built.category) == (2, 7, dataset, "nut")

    def test_dotted_path(self) -> None:
        built = self.parse("--data", "anomalib_vtfusion.data.DemoParts", "--data.category", "tile")
        assert isinstance(built, DemoParts)
        assert built.category == "tile"

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_shipped_configurations(self, path: Path) -> None:
        config = yaml.safe_load(path.read_text())
        built = self.parse("--data", str(path))
        assert type(built).__name__ == config["class_path"].split(".")[-1]
        assert built.val_split_mode == "none"
        assert built.num_workers == 0


class TestEngine:
    def test_results_are_filed_under_the_wrapped_data_set(self, dataset: Path, tmp_path: Path) -> None:
        datamodule = FewShot(MVTecAD(root=dataset, category="nut", num_workers=0), k_shot=2, seed=1)
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1)
        results = engine.train(tiny_padim(), datamodule=datamodule)
        assert "pixel_AUROC" in results[0]
        run = tmp_path / "Padim" / "MVTecAD" / "nut" / "v0"
        manifest = json.loads((run / "few_shot.json").read_text())
        assert manifest == datamodule.manifest
        expected = select_references([f"{i:03}.png" for i in range(5)], 2, 1)
        assert [reference["path"] for reference in manifest["references"]] == [f"{i:03}.png" for i in expected]
        # The pre-processor of the model resizes the references before they are collated.
        assert datamodule.train_data[0].image.shape == (3, 64, 64)

        # A test run with other references does not rewrite what the model was fitted with.
        other = FewShot(MVTecAD(root=dataset, category="nut", num_workers=0), k_shot=4)
        Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1).test(
            tiny_padim(), datamodule=other, ckpt_path=run / "weights" / "lightning" / "model.ckpt"
        )
        assert json.loads((run / "few_shot.json").read_text())["k_shot"] == 2

    def test_without_any_validation_image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "NUM_TRAIN", 3)
        monkeypatch.setattr(demo, "NUM_GOOD", 2)
        monkeypatch.setattr(demo, "NUM_PER_DEFECT", 1)
        datamodule = FewShot(DemoParts(root=tmp_path / "cache", category="plate"), k_shot=2)
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1)
        results = engine.train(tiny_padim(), datamodule=datamodule)
        assert 0.0 <= results[0]["pixel_AUROC"] <= 1.0
        assert (tmp_path / "Padim" / "DemoParts" / "plate" / "v0" / "few_shot.json").is_file()

    def test_too_many_shots_stop_before_training(self, dataset: Path, tmp_path: Path) -> None:
        datamodule = FewShot(MVTecAD(root=dataset, category="nut", num_workers=0), k_shot=6)
        with pytest.raises(ValueError, match=r"MVTecAD/nut: 6 reference images .* only 5 normal images"):
            Engine(default_root_dir=tmp_path, accelerator="cpu").train(tiny_padim(), datamodule=datamodule)
