"""DemoParts: where pictures lie, that they are complete or absent, and how they are read."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_vtfusion.data import DemoParts, demo


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render 3 + 2 + 4 pictures instead of 46."""
    monkeypatch.setattr(demo, "NUM_TRAIN", 3)
    monkeypatch.setattr(demo, "NUM_GOOD", 2)
    monkeypatch.setattr(demo, "NUM_PER_DEFECT", 1)


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not render at all."""

    def render(category: str, split: str, kind: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((8, 8, 3), dtype=np.uint8), np.ones((8, 8), dtype=np.bool_)

    monkeypatch.setattr(demo, "render", render)


def test_unknown_category_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="'gear'; there are connector, fabric, plate, tile, washer"):
        DemoParts(category="gear")


def test_every_category_has_three_to_five_defects() -> None:
    for category in demo.CATEGORIES:
        assert 3 <= len(demo.defects_of(category)) <= 5
        assert list(demo.defects_of(category)) == sorted(set(demo.defects_of(category)))


@pytest.mark.usefixtures("blank_pictures")
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    datamodule = DemoParts(category="tile")
    assert datamodule.root == tmp_path / "anomalib_vtfusion" / "demo_parts" / "v1"
    assert not datamodule.root.exists()
    datamodule.prepare_data()
    assert [path.name for path in datamodule.root.iterdir()] == ["tile"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert demo.default_root() == tmp_path / "me" / ".cache" / "anomalib_vtfusion" / "demo_parts" / "v1"


def test_reads_what_it_renders(tmp_path: Path) -> None:
    datamodule = DemoParts(root=tmp_path, category="washer", train_batch_size=2, eval_batch_size=4)
    datamodule.setup()
    assert (datamodule.name, datamodule.category, datamodule.task) == ("DemoParts", "washer", "segmentation")
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (3, 6)
    assert datamodule.test_data.samples.label_index.tolist() == [1, 0, 0, 1, 1, 1]
    image, mask = demo.render("washer", "test", "stain", 0)
    item = datamodule.test_data[5]
    assert "stain" in item.image_path
    assert np.array_equal(np.round(item.image.permute(1, 2, 0).numpy() * 255), image)
    assert np.array_equal(item.gt_mask.numpy().astype(bool), mask)
    assert next(iter(datamodule.train_dataloader())).image.shape == (2, 3, 256, 256)


@pytest.mark.usefixtures("blank_pictures")
class TestRenderingToDisk:
    def test_layout(self, tmp_path: Path) -> None:
        folder = demo.ensure_rendered(tmp_path, "plate")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        kinds = demo.defects_of("plate")
        assert files == sorted(
            ["demo_parts.json"]
            + [f"train/good/{i:03}.png" for i in range(3)]
            + [f"test/good/{i:03}.png" for i in range(2)]
            + [f"test/{kind}/000.png" for kind in kinds]
            + [f"ground_truth/{kind}/000_mask.png" for kind in kinds]
        )
        with Image.open(folder / f"ground_truth/{kinds[0]}/000_mask.png") as mask:
            assert (mask.mode, mask.getextrema()) == ("L", (255, 255))

    def test_no_validation_set_and_no_loader_for_it(self, tmp_path: Path) -> None:
        datamodule = DemoParts(root=tmp_path)
        datamodule.setup()
        assert datamodule.val_dataloader() == []
        with_validation = DemoParts(root=tmp_path, val_split_mode="from_train", val_split_ratio=0.34)
        with_validation.setup()
        assert len(with_validation.val_dataloader().dataset) == 1

    def test_is_done_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        DemoParts(root=tmp_path).prepare_data()
        monkeypatch.setattr(demo, "render_category", pytest.fail)
        DemoParts(root=tmp_path).prepare_data()

    def test_interrupted_rendering_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(category: str, folder: Path) -> None:
            (folder / "half.png").touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "render_category", fail)
        with pytest.raises(KeyboardInterrupt):
            demo.ensure_rendered(tmp_path, "tile")
        assert list(tmp_path.iterdir()) == []

    def test_many_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        together, original, done = threading.Barrier(4), demo.render_category, []

        def render_together(category: str, folder: Path) -> None:
            original(category, folder)
            together.wait(timeout=60)

        monkeypatch.setattr(demo, "render_category", render_together)
        threads = [
            threading.Thread(target=lambda: done.append(demo.ensure_rendered(tmp_path, "tile"))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert done == [tmp_path / "tile"] * 4
        assert [path.name for path in tmp_path.iterdir()] == ["tile"]
        assert len(list((tmp_path / "tile").rglob("*.png"))) == 3 + 2 + 2 * 4

    @pytest.mark.parametrize("marker", [None, {"version": 0}])
    def test_foreign_folder_is_refused(self, tmp_path: Path, marker: dict | None) -> None:
        (tmp_path / "tile").mkdir()
        if marker is not None:
            (tmp_path / "tile" / "demo_parts.json").write_text(json.dumps(marker))
        with pytest.raises(FileExistsError, match="tile was not rendered by this version"):
            DemoParts(root=tmp_path, category="tile").prepare_data()
