"""Weights files, wherever they are: on the disk, in the hub's cache, or on the hub.

Each way of not finding one ends in one error that says what to do; ``hint`` is the caller's own way out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def hub_file(repo: str, names: Sequence[str], hint: str) -> Path:
    """Path of a file of a Hugging Face repository: from the cache if it is there, else downloaded.

    Args:
        repo: ``"ORG/REPO"``.
        names: Names the file may have, the best first.
        hint: What else a user without the file can do.

    Returns:
        The path in the cache.

    Raises:
        FileNotFoundError: If none of the files is in the cache or can be downloaded.
    """
    for name in names:
        cached = try_to_load_from_cache(repo, name, cache_dir=hub_constants.HF_HUB_CACHE)
        if isinstance(cached, str):
            return Path(cached)
    problem: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, cache_dir=hub_constants.HF_HUB_CACHE))
        except Exception as error:  # the hub client raises many unrelated types
            problem = error
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                break  # the hub was not reached, so another file name would only cost another timeout
    raise FileNotFoundError(
        f"{names[0]} of Hugging Face repository {repo} is not in the cache {hub_constants.HF_HUB_CACHE} and could not "
        f"be downloaded. Fetch it on a connected machine (hf download {repo} {names[0]}) and copy the cache, {hint}. "
        f"({first_line(problem)})"
    ) from problem


def existing_file(weights: str, hint: str) -> Path:
    """Path of a weights file that exists.

    Args:
        weights: Its path; ``~`` is the home folder.
        hint: What else a user without the file can do.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not end as weights do.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Weights file {path} does not exist; give an existing file, {hint}.")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"Weights file {path} must end in {', '.join(WEIGHT_SUFFIXES)}.")
    return path


def looks_like_path(weights: str) -> bool:
    """Whether ``weights`` is meant as a path and not as a tag."""
    return Path(weights).suffix in WEIGHT_SUFFIXES or "/" in weights or os.sep in weights or Path(weights).is_file()


def first_line(error: Exception | None, lines: int = 1) -> str:
    """Kind and first lines of an error, at most 400 characters, for the end of another's message."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:lines])
    return f"{type(error).__name__}: {text[:400]}"
