"""Encoder folders of the three kinds of CLIP tower and of three kinds of timm ViT: small, random, written once."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_vtfusion.components.encoders import VisionTextEncoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION = {
    "vit": {"layers": 3, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64},
    "timm": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64},
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
VITS = {  # timm's name, what makes it small, side it is made for
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"depth": 6, "embed_dim": 48, "num_heads": 2}, 56),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 6, "embed_dim": 48, "num_heads": 2}, 64),
    "plain": ("vit_tiny_patch16_224", {"depth": 5, "embed_dim": 48, "num_heads": 2}, 64),
}
VIT_STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.25, 0.2]}


def model_config(kind):
    return {"embed_dim": 32, "vision_cfg": dict(VISION[kind]), "text_cfg": dict(TEXT), "custom_text": kind == "timm"}


def write_folder(folder: Path, kind: str, seed: int = 1) -> Path:
    """An encoder folder in open_clip's format with random weights."""
    folder.mkdir(parents=True)
    config = {"model_cfg": model_config(kind), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        for module in model.modules():  # batch statistics that evaluation would notice
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_vit_folder(folder: Path, kind: str, seed: int = 1) -> Path:
    """A folder in timm's format with random weights, whose layer scales hide nothing."""
    name, model_args, side = VITS[kind]
    config = {
        "architecture": name,
        "num_classes": 0,
        "model_args": model_args | {"img_size": side},
        "pretrained_cfg": VIT_STATISTICS | {"input_size": [3, side, side], "num_classes": 0},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(f"local-dir:{folder}")
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def vit_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("image-encoders")
    return {kind: write_vit_folder(root / kind, kind) for kind in VITS}


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    return {kind: write_folder(root / kind, kind) for kind in VISION}


@pytest.fixture(scope="session")
def encoders(encoder_folders):
    return {kind: VisionTextEncoder(f"local-dir:{folder}") for kind, folder in encoder_folders.items()}


@pytest.fixture(scope="session")
def write_encoder_folder():
    return write_folder


@pytest.fixture(scope="session")
def encoder_config():
    return model_config
