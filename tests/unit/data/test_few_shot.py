"""References are a pure function of names, k and seed; FewShot shows them and leaves everything else alone."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import Folder, MVTecAD
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from omegaconf import DictConfig
from PIL import Image

from anomalib_vtfusion.data.few_shot import FewShot, build_datamodule, relative_paths, select_references

NAMES = [f"{i:03}.png" for i in range(20)]
FROZEN = {0: [0, 2, 3, 8], 1: [2, 7, 9, 12]}


def save_image(path: Path, seed: int, mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24) if mask else (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels if not mask else (pixels > 128).astype(np.uint8) * np.uint8(255)).save(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category ``nut`` in the layout of MVTec AD: 8 normal training, 2 normal test and 3 bad test images."""
    root = tmp_path_factory.mktemp("data")
    for i in range(8):
        save_image(root / "nut/train/good" / f"{i:03}.png", i)
    for i in range(2):
        save_image(root / "nut/test/good" / f"{i:03}.png", 50 + i)
    for i in range(3):
        save_image(root / "nut/test/scratch" / f"{i:03}.png", 100 + i)
        save_image(root / "nut/ground_truth/scratch" / f"{i:03}_mask.png", 200 + i, mask=True)
    return root


def mvtec(dataset: Path, **arguments: object) -> MVTecAD:
    return MVTecAD(**{"root": dataset, "category": "nut", "num_workers": 0, **arguments})


def folder(dataset: Path, **arguments: object) -> Folder:
    defaults = {"name": "own", "root": dataset / "nut", "normal_dir": "train/good", "num_workers": 0}
    return Folder(**{**defaults, **arguments})


def names_of(datamodule: FewShot) -> list[str]:
    return [Path(path).name for path in datamodule.train_data.samples.image_path]


class TestSelectReferences:
    def test_ranks_by_the_documented_hash(self) -> None:
        ranked = sorted(NAMES, key=lambda name: hashlib.sha256(f"7:{name}".encode()).hexdigest())
        assert [NAMES[i] for i in select_references(NAMES, 3, 7)] == sorted(ranked[:3])

    def test_stays_what_it_was(self) -> None:
        # Published results depend on these numbers.
        assert select_references(NAMES, 4, 0) == FROZEN[0]
        assert select_references(NAMES, 4, 1) == FROZEN[1]

    @settings(deadline=None, max_examples=25)
    @given(order=st.permutations(range(20)), seed=st.integers(-5, 2**40), k=st.integers(1, 20))
    def test_order_of_the_input_does_not_matter(self, order: list[int], seed: int, k: int) -> None:
        shuffled = [NAMES[i] for i in order]
        chosen = {shuffled[i] for i in select_references(shuffled, k, seed)}
        assert chosen == {NAMES[i] for i in select_references(NAMES, k, seed)}
        assert len(chosen) == k

    @pytest.mark.parametrize("place", ["/mnt/a/train/good/", "b/train/good/", "C:\\data\\train\\good\\"])
    def test_place_and_separator_do_not_matter(self, place: str) -> None:
        assert select_references([place + name for name in NAMES], 4, 3) == select_references(NAMES, 4, 3)

    def test_composed_and_decomposed_names_are_the_same(self) -> None:
        decomposed = ["Schra\u0308ge_" + name for name in NAMES]
        composed = ["Schr\u00e4ge_" + name for name in NAMES]
        assert select_references(decomposed, 4, 0) == select_references(composed, 4, 0)

    @pytest.mark.parametrize("seed", range(5))
    def test_small_sets_are_within_larger_ones(self, seed: int) -> None:
        one, two, four = (set(select_references(NAMES, k, seed)) for k in (1, 2, 4))
        assert one < two < four

    def test_seed_matters(self) -> None:
        assert len({tuple(select_references(NAMES, 4, seed)) for seed in range(10)}) > 5

    def test_all_is_all(self) -> None:
        assert select_references(NAMES, 20, 0) == list(range(20))

    @pytest.mark.parametrize("k", [0, -1])
    def test_k_below_one(self, k: int) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            select_references(NAMES, k, 0)

    def test_k_above_what_there_is(self) -> None:
        with pytest.raises(ValueError, match="only 20 normal images"):
            select_references(NAMES, 21, 0)

    def test_nothing_to_choose_from(self) -> None:
        with pytest.raises(ValueError, match="no normal images"):
            select_references([], 1, 0)

    def test_listed_twice(self) -> None:
        with pytest.raises(ValueError, match="more than once"):
            select_references(["a/0.png", "a/0.png"], 1, 0)

    def test_fraction_is_no_count(self) -> None:
        with pytest.raises(TypeError):
            select_references(NAMES, 1.5, 0)  # type: ignore[arg-type]


def test_relative_paths_drop_the_common_folder_only() -> None:
    assert relative_paths(["/d/x/a/0.png", "/d/x/b/0.png"]) == ["a/0.png", "b/0.png"]
    assert relative_paths(["/d/x/0.png"]) == ["0.png"]
    assert relative_paths(["good/0.png", "good_more/0.png"]) == ["good/0.png", "good_more/0.png"]
    assert relative_paths([]) == []


class TestFewShot:
    def test_keeps_k_references_and_the_rest(self, dataset: Path) -> None:
        datamodule = FewShot(mvtec(dataset, train_batch_size=3, eval_batch_size=4), k_shot=2, seed=1)
        datamodule.setup()
        expected = select_references([f"{i:03}.png" for i in range(8)], 2, 1)
        assert names_of(datamodule) == [f"{i:03}.png" for i in expected]
        assert len(datamodule.test_data) == len(datamodule.val_data) == 5
        assert (datamodule.name, datamodule.category) == ("MVTecAD", "nut")
        assert datamodule.root == dataset
        assert datamodule.train_dataloader().batch_size == 3
        assert datamodule.test_dataloader().batch_size == datamodule.predict_dataloader().batch_size == 4
        assert datamodule.task == "segmentation"
        batch = next(iter(datamodule.train_dataloader()))
        assert batch.image.shape == (2, 3, 24, 24)

    def test_every_reader_of_the_images_gets_the_same_references(self, dataset: Path) -> None:
        first = FewShot(mvtec(dataset), k_shot=3, seed=5)
        second = FewShot(folder(dataset, normal_test_dir="test/good", abnormal_dir="test/scratch"), k_shot=3, seed=5)
        first.setup()
        second.setup()
        assert names_of(first) == names_of(second)
        assert [r["sha256"] for r in first.manifest["references"]] == [
            r["sha256"] for r in second.manifest["references"]
        ]

    @pytest.mark.parametrize("ready", [False, True])
    def test_wrapped_datamodule_stays_as_it_was(self, dataset: Path, ready: bool) -> None:
        wrapped = mvtec(dataset)
        if ready:
            wrapped.setup()
        before = dict(vars(wrapped))
        datamodule = FewShot(wrapped, k_shot=2)
        datamodule.setup()
        datamodule.test_data.augmentations = datamodule.val_data.augmentations = "changed"
        assert vars(wrapped) == before
        if ready:
            assert len(wrapped.train_data) == 8
            assert wrapped.test_data.augmentations is wrapped.val_data.augmentations is None

    def test_setup_again_changes_nothing(self, dataset: Path) -> None:
        datamodule = FewShot(mvtec(dataset, val_split_mode="from_train", val_split_ratio=0.25), k_shot=2)
        datamodule.setup()
        train, manifest = datamodule.train_data, copy.deepcopy(datamodule.manifest)
        datamodule.setup("fit")
        datamodule.setup("test")
        assert datamodule.train_data is train
        assert datamodule.manifest == manifest

    def test_references_come_from_what_validation_leaves(self, dataset: Path) -> None:
        datamodule = FewShot(mvtec(dataset, val_split_mode="from_train", val_split_ratio=0.25), k_shot=6)
        datamodule.setup()
        validation = set(datamodule.val_data.samples.image_path)
        assert len(validation) == 2
        assert not validation & set(datamodule.train_data.samples.image_path)
        with pytest.raises(ValueError, match=r"MVTecAD/nut: 7 reference images were asked for.* only 6 normal"):
            FewShot(mvtec(dataset, val_split_mode="from_train", val_split_ratio=0.25), k_shot=7).setup()

    def test_unseeded_splits_are_the_same_in_every_run(self, dataset: Path) -> None:
        # Without normal test images, Folder moves random training images into the test set.
        runs = [FewShot(folder(dataset, abnormal_dir="test/scratch", seed=None), k_shot=2, seed=i) for i in (4, 4, 5)]
        for run in runs:
            run.setup()
        tests = [sorted(run.test_data.samples.image_path) for run in runs]
        assert tests[0] == tests[1] == tests[2]
        assert names_of(runs[0]) == names_of(runs[1])

    def test_folder_without_masks(self, dataset: Path) -> None:
        datamodule = FewShot(folder(dataset, abnormal_dir="test/scratch", normal_test_dir="test/good"), k_shot=1)
        datamodule.setup()
        assert (len(datamodule.train_data), datamodule.task) == (1, "classification")
        assert next(iter(datamodule.test_dataloader())).gt_mask is None

    def test_folder_without_anything_abnormal(self, dataset: Path) -> None:
        datamodule = FewShot(folder(dataset, normal_test_dir="test/good", val_split_mode="none"), k_shot=4)
        datamodule.setup()
        assert (len(datamodule.train_data), len(datamodule.test_data)) == (4, 2)
        assert datamodule.val_dataloader() == []

    def test_synthetic_validation_files_outlive_the_view(self, dataset: Path) -> None:
        wrapped = mvtec(dataset, val_split_mode="synthetic", val_split_ratio=0.5, seed=0)
        wrapped.setup()
        datamodule = FewShot(wrapped, k_shot=2)
        datamodule.setup()
        del datamodule
        assert all(Path(path).exists() for path in wrapped.val_data.samples.image_path)

    def test_augmentations_of_the_wrapped_datamodule_apply(self, dataset: Path) -> None:
        from torchvision.transforms.v2 import Resize

        datamodule = FewShot(mvtec(dataset, augmentations=Resize((8, 8), antialias=True)), k_shot=1)
        datamodule.setup()
        assert datamodule.train_data[0].image.shape == (3, 8, 8)
        assert datamodule.test_data[0].image.shape == (3, 8, 8)

    def test_collate_function_of_the_wrapped_datamodule_applies(self, dataset: Path) -> None:
        wrapped = mvtec(dataset)
        wrapped.external_collate_fn = len
        datamodule = FewShot(wrapped, k_shot=2)
        datamodule.setup()
        assert next(iter(datamodule.train_dataloader())) == 2

    def test_manifest(self, dataset: Path, tmp_path: Path) -> None:
        datamodule = FewShot(mvtec(dataset), k_shot=2, seed=3, manifest_dir=tmp_path / "new")
        with pytest.raises(RuntimeError, match="setup"):
            _ = datamodule.manifest
        datamodule.setup()
        manifest = json.loads((tmp_path / "new" / "MVTecAD_nut_k2_seed3.json").read_text())
        assert manifest == datamodule.manifest
        assert {key: manifest[key] for key in ("dataset", "category", "k_shot", "seed", "available")} == {
            "dataset": "MVTecAD",
            "category": "nut",
            "k_shot": 2,
            "seed": 3,
            "available": 8,
        }
        for reference, path in zip(manifest["references"], datamodule.train_data.samples.image_path, strict=True):
            assert Path(manifest["folder"], reference["path"]) == Path(path)
            assert reference["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["MVTecAD_nut_k2_seed3.json"]

    def test_more_than_there_is(self, dataset: Path) -> None:
        with pytest.raises(ValueError, match=r"MVTecAD/nut: 9 reference images were asked for.* only 8 normal images"):
            FewShot(mvtec(dataset), k_shot=9).setup()

    def test_bad_k_is_refused_at_once(self, dataset: Path) -> None:
        with pytest.raises(ValueError, match="k_shot must be at least 1"):
            FewShot(mvtec(dataset), k_shot=0)

    def test_subsets_of_the_wrapped_datamodule_do_not_pass_for_ours(self, dataset: Path) -> None:
        wrapped = mvtec(dataset)
        wrapped.setup()
        with pytest.raises(AttributeError, match="train_data"):
            _ = FewShot(wrapped, k_shot=2).train_data


class TestBuildDatamodule:
    @pytest.mark.parametrize("wrap", [dict, DictConfig, lambda config: Namespace(**config)])
    @pytest.mark.parametrize("class_path", ["MVTecAD", "anomalib.data.MVTecAD"])
    def test_configuration(self, wrap: type, class_path: str) -> None:
        built = build_datamodule(wrap({"class_path": class_path, "init_args": {"root": "x", "category": "nut"}}))
        assert (type(built), built.root, built.category) == (MVTecAD, Path("x"), "nut")

    def test_name_alone(self) -> None:
        assert type(build_datamodule("MVTecAD")) is MVTecAD

    @pytest.mark.parametrize("name", ["NoSuchData", "anomalib.data.NoSuchData", "no.such.module.Data"])
    def test_unknown_name(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"no datamodule '{name}'"):
            build_datamodule(name)

    def test_without_class_path(self) -> None:
        with pytest.raises(ValueError, match=r"needs a 'class_path', got the keys \['category'\]"):
            build_datamodule({"category": "nut"})

    @pytest.mark.parametrize("data", [3, {"class_path": "pathlib.Path"}, None])
    def test_not_a_datamodule(self, data: object) -> None:
        with pytest.raises(TypeError, match="must be an Anomalib image datamodule"):
            build_datamodule(data)  # type: ignore[arg-type]

    def test_video_is_refused(self) -> None:
        with pytest.raises(TypeError, match="got Avenue"):
            build_datamodule("Avenue")
