"""Write a trained encoder in open_clip's local-dir format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
EMBEDDING = "text.token_embedding.weight"


def full_embedding(rows: Tensor, ids: Tensor, vocabulary_size: int) -> Tensor:
    """Put trained rows ``(n, C)`` back at their token ids; rows of tokens never seen are zero and compress away."""
    table = rows.new_zeros(vocabulary_size, rows.shape[1])
    table[ids] = rows
    return table


def export_encoder(encoder: nn.Module, vocabulary_ids: Tensor, config: dict, folder: Path) -> Path:
    """Write ``open_clip_config.json`` and fp16 weights that ``open_clip`` loads as ``local-dir:FOLDER``.

    Args:
        encoder: open_clip model whose token table holds only the rows of ``vocabulary_ids``.
        vocabulary_ids: Token ids of those rows ``(n,)``.
        config: Contents of the configuration file.
        folder: Folder to write to.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    vocabulary_size = config["model_cfg"]["text_cfg"]["vocab_size"]
    state[EMBEDDING] = full_embedding(state[EMBEDDING], vocabulary_ids.cpu(), vocabulary_size)
    halved = {n: v.to(torch.float16) if v.is_floating_point() else v for n, v in state.items()}
    save_file({name: value.contiguous() for name, value in halved.items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def export_timm_backbone(encoder_folder: Path, folder: Path) -> Path:
    """Write the image tower alone as a folder that timm, and so any Anomalib model with a timm backbone, can load.

    Example:
        >>> from anomalib.models import Patchcore
        >>> folder = export_timm_backbone(encoder_folder, Path("vtfusion-tiny-timm"))  # doctest: +SKIP
        >>> Patchcore(backbone=f"local-dir:{folder}", layers=["layer2", "layer3"])  # doctest: +SKIP

    Args:
        encoder_folder: Encoder in open_clip's local-dir format.
        folder: Folder to write ``config.json`` and ``model.safetensors`` to.

    Returns:
        The folder.
    """
    config = json.loads((encoder_folder / CONFIG_NAME).read_text(encoding="utf-8"))
    state = load_file(encoder_folder / WEIGHTS_NAME)
    prefix = "visual.trunk."
    trunk = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trunk, folder / "model.safetensors")
    timm_config = {
        "architecture": config["model_cfg"]["vision_cfg"]["timm_model_name"],
        "num_classes": 0,
        "pretrained_cfg": {
            "mean": config["preprocess_cfg"]["mean"],
            "std": config["preprocess_cfg"]["std"],
            "num_classes": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(timm_config, indent=2) + "\n", encoding="utf-8")
    return folder
