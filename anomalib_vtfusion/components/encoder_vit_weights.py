"""Finding and loading a ViT of ``timm``, by name, folder or hub repository, and its weights.

Only what ``timm`` calls ``vision_transformer`` (DINOv2 and most others) and ``eva`` (DINOv3) is taken: equal blocks of
equal resolution, with prefix tokens that can be told from patches.
"""

from __future__ import annotations

import difflib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import eva, get_pretrained_cfg, is_model, is_model_in_modules, load_state_dict, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from .encoder_files import WEIGHT_SUFFIXES, existing_file, first_line, hub_file
from .encoder_weights import HUB_PREFIX, LOCAL_PREFIX, own_random_state

logger = logging.getLogger(__name__)

_HINT = "or leave image_encoder out"
_FAMILIES = ("vision_transformer", "eva")
_CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# Parts of a classifier, which released weights may hold and features do without.
_HEADS = ("head", "fc_norm.", "attn_pool.")


@dataclass
class ViTSource:
    """What a name resolves to.

    Attributes:
        given: The name as given, for messages.
        timm_name: Name for ``timm.create_model``.
        repo: Repository of its weights on the hub, if that is where they are.
        folder: Folder of its weights, if that is where they are.
    """

    given: str
    timm_name: str
    repo: str | None = None
    folder: Path | None = None


def find_vit(image_encoder: str) -> ViTSource:
    """Find out what an image encoder's name stands for; nothing is built or downloaded but a hub repository's config.

    Args:
        image_encoder: ``timm`` name with or without a pretrained tag, a folder in ``timm`` format
            (``"local-dir:PATH"`` or the path itself), or ``"hf-hub:ORG/REPO"``.

    Returns:
        The source.

    Raises:
        ValueError: If the name or tag is unknown, the folder's configuration is unusable, or it is not a ViT.
        FileNotFoundError: If the folder or its configuration is missing.
    """
    if image_encoder.startswith(HUB_PREFIX):
        repo = image_encoder.removeprefix(HUB_PREFIX)
        folder = hub_file(repo, [_CONFIG], f"or give a folder with it as {LOCAL_PREFIX}PATH, {_HINT}").parent
        return _from_folder(image_encoder, folder, repo)
    folder = Path(image_encoder.removeprefix(LOCAL_PREFIX)).expanduser()
    if image_encoder.startswith(LOCAL_PREFIX) or (image_encoder and folder.is_dir()):
        return _from_folder(image_encoder, folder, None)
    architecture = image_encoder.partition(".")[0]
    if not is_model(architecture):
        raise ValueError(f"Unknown image_encoder {image_encoder!r}: {_close_names(image_encoder)}")
    _check_family(image_encoder, architecture)
    try:
        config = get_pretrained_cfg(image_encoder)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)) or "(it has none)"
        raise ValueError(f"image_encoder {image_encoder!r} has an unknown tag; with known ones: {tags}.") from error
    return ViTSource(image_encoder, image_encoder, repo=config.hf_hub_id if config else None)


def build_vit(source: ViTSource) -> VisionTransformer | Eva:
    """Build a ViT with random weights, always the same, at the input size it was made for and without classifier.

    Raises:
        ValueError: If ``timm`` cannot build it.
    """
    try:
        with own_random_state():
            # A fixed size: position embeddings are then resized once, and are constants of an exported graph.
            vit: Any = timm.create_model(source.timm_name, num_classes=0, dynamic_img_size=False)
    except Exception as error:
        raise ValueError(f"timm cannot build image_encoder {source.given!r}: {first_line(error)}") from error
    return vit


def fill_vit(vit: VisionTransformer | Eva, source: ViTSource, weights: str | None) -> None:
    """Load every tensor or raise: a model that fits only in part is to be thrown away by the caller.

    Args:
        vit: What ``build_vit`` gave for the source.
        source: Where its own weights are.
        weights: Path of a weights file; ``None`` for its own, ``""`` for random ones.

    Raises:
        ValueError: If it has no weights of its own, or the file does not fit.
        FileNotFoundError: If the file is missing and cannot be downloaded.
    """
    if weights == "":
        logger.warning("image_encoder %r has random weights: its features know nothing of images.", source.given)
        return
    path = _own_weights(source) if weights is None else existing_file(weights, _HINT)
    convert: Any = eva.checkpoint_filter_fn if isinstance(vit, Eva) else vision_transformer.checkpoint_filter_fn
    try:
        result = vit.load_state_dict(convert(load_state_dict(str(path), weights_only=True), vit), strict=False)
        surplus = [name for name in result.unexpected_keys if not name.startswith(_HEADS)]
        if result.missing_keys or surplus:
            raise ValueError(f"missing {result.missing_keys}, unexpected {surplus}")  # noqa: TRY301
    except Exception as error:
        raise ValueError(
            f"{path} does not hold weights of image_encoder {source.given!r}: {first_line(error, lines=3)}"
        ) from error


def _from_folder(given: str, folder: Path, repo: str | None) -> ViTSource:
    config = folder / _CONFIG
    if not config.is_file():
        raise FileNotFoundError(
            f"{config} does not exist: a folder of image_encoder holds {_CONFIG} and {_FILES[0]}, as timm saves them, "
            f"{_HINT}."
        )
    try:
        architecture = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not a timm configuration with an 'architecture' entry: {error!r}.") from error
    if not is_model(architecture):
        raise ValueError(f"{config} names an unknown architecture {architecture!r}: {_close_names(str(architecture))}")
    _check_family(given, architecture)
    return ViTSource(given, f"{LOCAL_PREFIX}{folder}", repo, None if repo else folder)


def _own_weights(source: ViTSource) -> Path:
    if source.folder is not None:
        file = next((source.folder / name for name in _FILES if (source.folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{source.folder / _FILES[0]} does not exist; put it there, give a file as image_weights=, {_HINT}."
            )
        return file
    if source.repo is None:
        raise ValueError(
            f"image_encoder {source.given!r} has no weights of its own: set image_weights to a file "
            f'({", ".join(WEIGHT_SUFFIXES)}), or to "" for random ones.'
        )
    return hub_file(source.repo, _FILES[:2], f"or give the file's path as image_weights=, {_HINT}")


def _check_family(given: str, architecture: str) -> None:
    if not is_model_in_modules(architecture, _FAMILIES):
        raise ValueError(
            f"image_encoder {given!r} is not a plain ViT ({architecture} is none of timm's {' or '.join(_FAMILIES)}); "
            "choose one such as vit_base_patch14_reg4_dinov2.lvd142m or vit_base_patch16_dinov3.lvd1689m."
        )


def _close_names(name: str) -> str:
    known = [
        n for family in _FAMILIES for tags in (False, True) for n in timm.list_models(module=family, include_tags=tags)
    ]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models('vit_*') for the names."
    return f"{hint} A folder with {_CONFIG} is given as {LOCAL_PREFIX}PATH."
