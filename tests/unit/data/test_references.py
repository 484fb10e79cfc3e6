"""References: chosen by path, k and seed alone, read as queries are, and laid out as one epoch."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image
from torchvision.transforms.v2 import Resize

from anomalib_vtfusion.data.few_shot import select_references
from anomalib_vtfusion.data.references import choose_references

RESIZE = Resize((64, 64), antialias=True)


@pytest.fixture
def datamodule(parts_datamodule):
    datamodule = parts_datamodule()
    datamodule.setup()
    return datamodule


def choose(datamodule, k_shot=None, seed=0, source=None):
    return choose_references(datamodule, k_shot, seed, source, RESIZE, (64, 64))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_choice_is_that_of_select_references(datamodule, parts, seed):
    paths = sorted(str(path) for path in (parts / "woven" / "train" / "good").iterdir())
    references = choose(datamodule, 2, seed)
    assert list(references.paths) == [paths[i] for i in select_references(paths, 2, seed)]


def test_images_are_read_and_transformed_as_queries_are(datamodule):
    references = choose(datamodule)
    assert references.images.shape == (3, 3, 64, 64)
    for path, image in zip(references.paths, references.images, strict=True):
        assert torch.equal(image, RESIZE(read_image(path, as_tensor=True)))


def test_an_image_listed_twice_is_one_reference(datamodule):
    once = choose(datamodule)
    twice = choose(type("Twice", (), {"train_data": datamodule.train_data + datamodule.train_data, "name": "twice"})())
    assert twice.paths == once.paths


def test_folder_instead_of_the_training_data(datamodule, parts):
    source = parts / "woven" / "test"
    references = choose(datamodule, source=str(source))
    assert [Path(path) for path in references.paths] == sorted(source.rglob("*.png"))


def test_repeated_rows_cover_all_references_alike(datamodule):
    references = choose(datamodule, 2)
    repeated = references.repeated(datamodule.train_data, 5)
    assert len(repeated) == 5
    first, second = references.paths
    assert Counter(repeated.samples.image_path) == {first: 3, second: 2}
    assert not repeated.samples.label_index.any()
    assert repeated.task == datamodule.train_data.task
    assert len(datamodule.train_data) == 3
    assert torch.equal(
        repeated[0].image,
        datamodule.train_data[list(datamodule.train_data.samples.image_path).index(repeated[0].image_path)].image,
    )


def test_indices_of_paths(datamodule):
    references = choose(datamodule)
    paths = [references.paths[2], references.paths[0]]
    assert references.indices(paths).tolist() == [2, 0]


def test_images_of_unequal_sizes(datamodule, parts, tmp_path):
    """Resize to one side keeps the shape of the image, so that one image may fit and the next not."""
    from PIL import Image

    square = parts / "woven" / "train" / "good" / "000.png"
    Image.open(square).save(tmp_path / "0.png")
    Image.open(square).resize((80, 40)).save(tmp_path / "1.png")
    message = r"makes images of \(64, 128\) \(of .*1\.png\), but the encoder takes \(64, 64\)"
    with pytest.raises(ValueError, match=message):
        choose_references(datamodule, None, 0, str(tmp_path), Resize(64), (64, 64))
