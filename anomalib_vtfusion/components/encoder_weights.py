"""Finding, loading and hashing the weights of a CLIP-like model.

One place answers "which architecture, which file, which normalisation" for every way of naming an encoder, and turns
each way it can go wrong into one error that says what was expected. Nothing here knows what the towers compute.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants as hub_constants
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from torch import Tensor, nn

from .encoder_files import WEIGHT_SUFFIXES, existing_file, first_line, hub_file, looks_like_path

logger = logging.getLogger(__name__)

SHIPPED_ENCODER = "vtfusion-tiny"
SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "weights" / SHIPPED_ENCODER
# Weights taken for a model name when none are asked for: those that WinCLIP uses.
DEFAULT_TAGS = {"ViT-B-16-plus-240": "laion400m_e32"}
# Initial weights for the rest of the network, beside an encoder's own.
PRIOR_NAME = "vtfusion_prior.safetensors"
LOCAL_PREFIX = "local-dir:"
HUB_PREFIX = "hf-hub:"
_RANDOM_SEED = 0
_SHIPPED_HINT = f'or use the encoder shipped with this package: encoder="{SHIPPED_ENCODER}"'
_HUB_HINT = f"or give the file's path as weights=, {_SHIPPED_HINT}"


@dataclass
class LoadedClip:
    """A built model with everything needed to feed it.

    Attributes:
        model: The ``open_clip`` model on the CPU, in float32.
        tokenizer: Callable from a list of strings to token ids.
        mean: Channel means of the image normalisation, for images in ``[0, 1]``.
        std: Channel standard deviations of the image normalisation.
        prior: File with initial weights for the rest of the network beside the model's own weights, or None.
    """

    model: nn.Module
    tokenizer: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    prior: Path | None = None


@dataclass
class _Source:
    """What a name resolves to: an ``open_clip`` name, its configuration, a weights file (or none) and preprocessing."""

    open_clip_name: str
    model_cfg: dict[str, Any]
    checkpoint: Path | None
    preprocess: Mapping[str, Any]
    quick_gelu: bool = False


def load_clip(encoder: str, weights: str | None = None) -> LoadedClip:
    """Build the model that ``encoder`` names, at the input size it was made for, and fill it with ``weights``.

    Args:
        encoder: ``open_clip`` model name, ``"vtfusion-tiny"``, a folder in ``open_clip`` format (``"local-dir:PATH"``
            or the path itself), a weights file in such a folder, or ``"hf-hub:ORG/REPO"``.
        weights: ``open_clip`` pretrained tag or path to a weights file. ``None`` means the default tag of a model name
            and the folder's own weights for a folder; ``""`` means random weights for a model name.

    Returns:
        The model, its tokenizer and its image normalisation.

    Raises:
        ValueError: If the encoder or tag is unknown, or the weights do not fit the model.
        FileNotFoundError: If a file is missing and cannot be downloaded.
    """
    source = _resolve(encoder, weights)
    if source.model_cfg.get("text_cfg", {}).get("hf_model_name"):
        raise ValueError(
            f"Encoder {encoder!r} has a Hugging Face text tower, which is not supported; "
            "choose a model whose text tower is open_clip's own, such as ViT-B-16-plus-240."
        )
    with own_random_state(), _quiet_root_logger():
        model = open_clip.create_model(
            source.open_clip_name,
            load_weights=False,
            force_quick_gelu=source.quick_gelu,
        )
        if source.checkpoint is not None:
            _fill(model, source.checkpoint, encoder)
        tokenizer = _tokenizer(source.open_clip_name)
    if source.checkpoint is None:
        logger.warning("Encoder %r has random weights: its features know nothing of images or text.", encoder)
    mean, std = (tuple(float(value) for value in source.preprocess[key]) for key in ("mean", "std"))
    prior = source.checkpoint and source.checkpoint.with_name(PRIOR_NAME)
    found = prior if prior is not None and prior.is_file() else None
    return LoadedClip(model=model, tokenizer=tokenizer, mean=mean, std=std, prior=found)  # type: ignore[arg-type]


def hash_state(states: Sequence[Mapping[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in sorted order of names.

    Args:
        states: State dictionaries; equal names in different dictionaries are kept apart.

    Returns:
        The digest as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for index, state in enumerate(states):
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{index}:{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _resolve(encoder: str, weights: str | None) -> _Source:
    if not encoder:
        raise ValueError(f"encoder is empty: give an open_clip model name, {LOCAL_PREFIX}PATH or {SHIPPED_ENCODER!r}.")
    if encoder == SHIPPED_ENCODER:
        return _from_folder(SHIPPED_FOLDER, None, weights)
    if encoder.startswith(LOCAL_PREFIX):
        return _from_folder(Path(encoder.removeprefix(LOCAL_PREFIX)).expanduser(), None, weights)
    if encoder.startswith(HUB_PREFIX):
        return _from_hub(encoder, weights)
    path = Path(encoder).expanduser()
    if path.is_dir():
        return _from_folder(path, None, weights)
    if path.suffix in {*WEIGHT_SUFFIXES, ".json"}:
        if not path.is_file():
            raise FileNotFoundError(f"Encoder file {path} does not exist.")
        return _from_folder(path.parent, path if path.suffix != ".json" else None, weights)
    return _from_name(encoder, weights)


def _from_name(encoder: str, weights: str | None) -> _Source:
    name = encoder.replace("/", "-")
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        known = [SHIPPED_ENCODER, *open_clip.list_models()]
        by_lower_case = {candidate.lower(): candidate for candidate in known}
        close = [by_lower_case[match] for match in difflib.get_close_matches(name.lower(), by_lower_case, n=3)]
        hint = f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models() for the names."
        raise ValueError(
            f"Unknown encoder {encoder!r}: {hint} A folder with {HF_CONFIG_NAME} is given as {LOCAL_PREFIX}PATH."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    preprocess = _preprocess_of_tags(name, tags)
    if weights is None:
        weights = DEFAULT_TAGS.get(name)
        if weights is None:
            raise ValueError(
                f"Encoder {encoder!r} has no default weights: set weights to a file ({', '.join(WEIGHT_SUFFIXES)}), to "
                f'"" for random ones, or to one of the tags {", ".join(tags) if tags else "(this model has none)"}.'
            )
    if not weights:
        return _Source(name, model_cfg, None, preprocess)
    tag_cfg = open_clip.get_pretrained_cfg(name, weights)
    if tag_cfg:
        # Weights trained with QuickGELU need it whether or not the name carries open_clip's "-quickgelu" suffix.
        return _Source(name, model_cfg, _download(tag_cfg, weights), tag_cfg, bool(tag_cfg.get("quick_gelu", False)))
    if looks_like_path(weights):
        return _Source(name, model_cfg, existing_file(weights, _SHIPPED_HINT), preprocess)
    raise ValueError(
        f"Unknown weights {weights!r} for encoder {encoder!r}: give a file ({', '.join(WEIGHT_SUFFIXES)}) or one of "
        f"the tags {', '.join(tags) if tags else '(this model has none)'}."
    )


def _from_folder(folder: Path, file: Path | None, weights: str | None) -> _Source:
    config = folder / HF_CONFIG_NAME
    if not config.is_file():
        alternative = "" if folder == SHIPPED_FOLDER else f", {_SHIPPED_HINT}"
        raise FileNotFoundError(
            f"{config} does not exist: an encoder folder holds {HF_CONFIG_NAME} and "
            f"{HF_SAFE_WEIGHTS_NAME}{alternative}."
        )
    model_cfg, preprocess = _read_config(config)
    if weights:
        file = existing_file(weights, _SHIPPED_HINT)
    elif file is None:
        names = (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", HF_WEIGHTS_NAME, "model.safetensors")
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder / HF_SAFE_WEIGHTS_NAME} does not exist; put it there, {_SHIPPED_HINT}.")
    return _Source(f"{LOCAL_PREFIX}{folder}", model_cfg, file, preprocess)


def _from_hub(encoder: str, weights: str | None) -> _Source:
    repo = encoder.removeprefix(HUB_PREFIX)
    config = hub_file(repo, [HF_CONFIG_NAME], _HUB_HINT)
    names = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    checkpoint = existing_file(weights, _SHIPPED_HINT) if weights else hub_file(repo, names, _HUB_HINT)
    model_cfg, preprocess = _read_config(config)
    return _Source(f"{LOCAL_PREFIX}{config.parent}", model_cfg, checkpoint, preprocess)


def _read_config(config: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        model_cfg = content["model_cfg"]
        complete = {"embed_dim", "vision_cfg", "text_cfg"} <= set(model_cfg)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not an open_clip configuration with a 'model_cfg' entry: {error!r}.") from error
    if not complete:
        raise ValueError(f"'model_cfg' in {config} must have embed_dim, vision_cfg and text_cfg.")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return model_cfg, preprocess | (content.get("preprocess_cfg") or {})


def _preprocess_of_tags(name: str, tags: Sequence[str]) -> Mapping[str, Any]:
    """Normalisation for weights that are not a tag: that of the model's tags where they agree, else OpenAI's."""
    found = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in (open_clip.get_pretrained_cfg(name, t) for t in tags)}
    if len(found) == 1:
        mean, std = found.pop()
        return {"mean": mean, "std": std}
    return {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


def _download(tag_cfg: Mapping[str, Any], tag: str) -> Path:
    """Weights file of a tag: from the local cache if it is there, else downloaded as ``open_clip`` does."""
    if tag_cfg.get("hf_hub"):
        repo, filename = os.path.split(tag_cfg["hf_hub"])
        if not filename:
            names = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        elif filename.endswith((".bin", ".pth")):
            names = [filename[:-4] + ".safetensors", filename]
        else:
            names = [filename]
        return hub_file(repo, names, _HUB_HINT)
    url = tag_cfg["url"]
    target = Path("~/.cache/clip").expanduser() / Path(url).name
    try:
        if hub_constants.is_offline_mode() and not target.is_file():
            raise OSError("offline mode is set")  # noqa: TRY301
        return Path(open_clip.download_pretrained_from_url(url))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"Weights {tag!r} are not on this machine and could not be downloaded: put {Path(url).name} (from {url}) "
            f"at {target}, give its path as weights=, {_SHIPPED_HINT}. ({first_line(error)})"
        ) from error


def _fill(model: nn.Module, checkpoint: Path, encoder: str) -> None:
    """Load every tensor or raise: a model that fits only in part is thrown away by the caller."""
    try:
        open_clip.load_checkpoint(model, str(checkpoint), strict=True)
    except Exception as error:
        raise ValueError(
            f"{checkpoint} does not hold weights of encoder {encoder!r}: {first_line(error, lines=3)}"
        ) from error


def _tokenizer(open_clip_name: str) -> Any:
    try:
        return open_clip.get_tokenizer(open_clip_name)
    except Exception as error:
        raise FileNotFoundError(
            f"The tokenizer of {open_clip_name} could not be loaded: it needs the package 'transformers' and its files "
            f"in the Hugging Face cache {hub_constants.HF_HUB_CACHE}; {_SHIPPED_HINT}. ({first_line(error)})"
        ) from error


@contextmanager
def own_random_state() -> Iterator[None]:
    """Seed the CPU generator for the build and restore it afterwards; other devices are untouched."""
    generator = torch.random.default_generator
    state = generator.get_state()
    generator.manual_seed(_RANDOM_SEED)
    try:
        yield
    finally:
        generator.set_state(state)


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep ``open_clip``'s messages on the root logger away, and keep them from installing a handler there."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def other_sources(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addHandler(handler)
    root.addFilter(other_sources)
    try:
        yield
    finally:
        root.removeFilter(other_sources)
        root.removeHandler(handler)
