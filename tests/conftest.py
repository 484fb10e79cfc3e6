"""Shared fixtures: tiny random towers, an image data set of a few pixels, and a quick engine."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

SIZE = 64
torch.set_num_threads(1)  # on tensors this small, threads only wait for each other
TEXT_TOWER = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
TOWERS = {
    "cnn": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
    "vit": {"layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
}


def write_tower(folder: Path, kind: str, seed: int = 1) -> str:
    """Write random towers in open_clip's folder format and return the name that VTFusion knows them by."""
    from open_clip.model import CLIP

    config = {"embed_dim": 32, "vision_cfg": {"image_size": SIZE, **TOWERS[kind]}, "text_cfg": TEXT_TOWER}
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**config)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory):
    """Folder that the shared towers lie in."""
    return tmp_path_factory.mktemp("shared-towers")


@pytest.fixture(scope="session")
def cnn_encoder(tower_folder):
    """Name of a random CNN tower for 64 x 64 images: maps of 8 x 8 and 4 x 4, joint-space tokens of 2 x 2."""
    return write_tower(tower_folder / "cnn", "cnn")


@pytest.fixture(scope="session")
def vit_encoder(tower_folder):
    """Name of a random ViT tower for 64 x 64 images: three maps of 4 x 4."""
    return write_tower(tower_folder / "vit", "vit")


@pytest.fixture(scope="session")
def other_cnn_encoder(tower_folder):
    """Name of the same architecture with other weights."""
    return write_tower(tower_folder / "other-cnn", "cnn", seed=2)


def draw_part(number: int, defect: bool, size: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A woven texture ``(size, size, 3)``, with a black square on request, and the mask of the square."""
    random = np.random.default_rng(number)
    rows, columns = np.mgrid[:size, :size]
    weave = 0.5 + 0.15 * np.sin(rows / 3.0 + random.uniform(0, 6)) + 0.15 * np.sin(columns / 4.0)
    image = np.stack([weave, 0.9 * weave, 0.7 * weave], axis=2) + random.normal(0, 0.02, (size, size, 3))
    mask = np.zeros((size, size), dtype=np.uint8)
    if defect:
        side = size // 3
        top, left = random.integers(0, size - side, 2)
        mask[top : top + side, left : left + side] = 255
        image[mask > 0] = 0.02
    return (image.clip(0, 1) * 255).astype(np.uint8), mask


def write_parts(root: Path, train: int = 3, good: int = 2, bad: int = 2) -> Path:
    """Write the category ``woven`` in the layout of MVTec AD."""
    category = root / "woven"
    folders = {name: category / name for name in ("train/good", "test/good", "test/square", "ground_truth/square")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for number in range(train):
        Image.fromarray(draw_part(number, defect=False)[0]).save(folders["train/good"] / f"{number:03}.png")
    for number in range(good):
        Image.fromarray(draw_part(100 + number, defect=False)[0]).save(folders["test/good"] / f"{number:03}.png")
    for number in range(bad):
        image, mask = draw_part(200 + number, defect=True)
        Image.fromarray(image).save(folders["test/square"] / f"{number:03}.png")
        Image.fromarray(mask).save(folders["ground_truth/square"] / f"{number:03}_mask.png")
    return root


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Root of a data set in the layout of MVTec AD: category ``woven``, 3 training and 4 test images with masks."""
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def parts_datamodule(parts):
    """Function that makes a fresh datamodule of the tiny data set; keyword arguments go to MVTecAD."""
    from anomalib.data import MVTecAD

    def make(**arguments):
        defaults = {"train_batch_size": 2, "eval_batch_size": 2, "num_workers": 0, "val_split_mode": "none"}
        return MVTecAD(root=parts, category="woven", **(defaults | arguments))

    return make


@pytest.fixture
def folder_datamodule(parts):
    """Function that makes a fresh ``Folder`` datamodule of the tiny data set; keyword arguments go to Folder."""
    from anomalib.data import Folder

    def make(**arguments):
        defaults = {
            "name": "woven",
            "root": parts / "woven",
            "normal_dir": "train/good",
            "train_batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 0,
            "val_split_mode": "none",
        }
        return Folder(**(defaults | arguments))

    return make


@pytest.fixture
def make_engine(tmp_path):
    """Function that makes an engine without bars and summaries; keyword arguments go to the trainer."""
    from anomalib.engine import Engine

    def make(**arguments):
        defaults = {
            "default_root_dir": tmp_path / "results",
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Engine(**(defaults | arguments))

    return make
