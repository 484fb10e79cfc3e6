"""Image sources of the pretraining, decoded once into uint8 arrays.

- Tiny-ImageNet-200 (Stanford CS231n): 200 classes of 500 training images of 64 px, names from ``words.txt``. ImageNet
  terms: non-commercial research and education.
- Describable Textures Dataset (DTD), the ten classes that come with DeepTexture: 1,200 textures. Released for research.
- ImageNet sample images: one larger photograph for each of 1,000 classes. ImageNet terms.

No image is kept in the repository or in the weights; only what was learnt from them is.
Every tenth texture and photograph is held out of the training and used by the zero-shot check alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LARGE_SIZE = 320
SMALL_SIZE = 64
HOLD_OUT_EVERY = 10
_IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png"}


@dataclass(frozen=True)
class Source:
    """A pool of images of one size with a class index for each.

    Attributes:
        name: Short name used in logs.
        images: Pixels ``(N, H, W, 3)``, uint8, possibly memory-mapped.
        labels: Indices ``(N,)`` into the class names shared by all sources.
    """

    name: str
    images: np.ndarray
    labels: Tensor

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` as uint8 ``(B, 3, H, W)``."""
        # Sorted reads are kinder to a memory map; the order is restored afterwards.
        order = torch.argsort(indices)
        rows = torch.from_numpy(self.images[indices[order].numpy()])
        result = torch.empty_like(rows)
        result[order] = rows
        return result.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out pools that share one list of class names.

    Attributes:
        class_names: Readable names, without duplicates.
        training: Pools to learn from, by name.
        held_out: Pools never trained on, by name.
    """

    class_names: tuple[str, ...]
    training: dict[str, Source]
    held_out: dict[str, Source]


def read_synset_names(path: Path) -> dict[str, str]:
    """Read ``words.txt``: synset id, tab, synonyms separated by commas; the first synonym is kept."""
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        synset, _, synonyms = line.partition("\t")
        if synonyms:
            names[synset.strip()] = synonyms.split(",")[0].strip()
    return names


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)


def list_tiny_imagenet(root: Path) -> list[tuple[Path, str]]:
    """List the training images of Tiny-ImageNet-200 with their class names.

    Args:
        root: Folder that holds ``words.txt``, ``wnids.txt`` and ``train/<synset>/images``.

    Raises:
        FileNotFoundError: If ``root`` is not laid out like Tiny-ImageNet-200.
    """
    words = root / "words.txt"
    if not words.is_file():
        msg = f"{words} not found; expected the unpacked folder tiny-imagenet-200 with words.txt and train/"
        raise FileNotFoundError(msg)
    names = read_synset_names(words)
    folders = sorted(p for p in (root / "train").iterdir() if p.is_dir())
    return [(path, names[folder.name]) for folder in folders for path in _images_in(folder / "images")]


def list_textures(root: Path) -> list[tuple[Path, str]]:
    """List texture images from one folder per DTD class: ``root/banded/*.jpg`` is "banded texture"."""
    prefixes = [(folder, _images_in(folder)) for folder in sorted(root.iterdir()) if folder.is_dir()]
    pairs = [
        (path, f"{folder.name} texture")
        for folder, paths in prefixes
        for path in paths
        if path.name.startswith(folder.name)  # other folders hold pictures of the publisher's viewer
    ]
    if not pairs:
        msg = f"no texture images under {root}; expected one folder per class, such as banded/banded_0002.jpg"
        raise FileNotFoundError(msg)
    return pairs


def list_photographs(root: Path) -> list[tuple[Path, str]]:
    """List photographs named ``<synset>_<class_name>.JPEG``."""
    pairs = []
    for path in _images_in(root):
        match = re.fullmatch(r"n\d{8}_(.+)", path.stem)
        if match:
            pairs.append((path, match.group(1).replace("_", " ")))
    if not pairs:
        msg = f"no photographs under {root}; expected files named like n01440764_tench.JPEG"
        raise FileNotFoundError(msg)
    return pairs


def decode(path: Path, size: int) -> np.ndarray:
    """Read an image as RGB uint8 ``(size, size, 3)``: shorter side scaled to ``size``, centre kept."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        if rgb.size != (size, size):
            scale = size / min(rgb.size)
            width, height = (max(size, round(side * scale)) for side in rgb.size)
            rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
            left, top = (width - size) // 2, (height - size) // 2
            rgb = rgb.crop((left, top, left + size, top + size))
        return np.asarray(rgb)


def _decoded(pairs: list[tuple[Path, str]], size: int, cache: Path) -> np.ndarray:
    """Decode all images once into ``cache`` and return the array memory-mapped."""
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".part.npy")
        shape = (len(pairs), size, size, 3)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for row, (path, _) in enumerate(pairs):
            array[row] = decode(path, size)
        array.flush()
        partial.rename(cache)
    array = np.load(cache, mmap_mode="c")  # copy-on-write: torch wants writable memory and the file stays as it is
    if array.shape != (len(pairs), size, size, 3):
        msg = f"{cache} holds {array.shape[0]} images but {len(pairs)} were found; delete it to decode again"
        raise ValueError(msg)
    return array


def load_corpus(tiny_imagenet: Path, textures: Path, photographs: Path, cache: Path) -> Corpus:
    """Decode the three sources (once) and give every image a class index.

    Args:
        tiny_imagenet: Unpacked Tiny-ImageNet-200.
        textures: Folder with one folder of images per texture class.
        photographs: Folder of photographs named ``<synset>_<class_name>.JPEG``.
        cache: Folder for the decoded arrays.

    Raises:
        FileNotFoundError: If a source is not where it should be.
    """
    listed = {
        "tiny-imagenet": (list_tiny_imagenet(tiny_imagenet), SMALL_SIZE),
        "textures": (list_textures(textures), LARGE_SIZE),
        "photographs": (list_photographs(photographs), LARGE_SIZE),
    }
    class_names = tuple(dict.fromkeys(name for pairs, _ in listed.values() for _, name in pairs))
    index = {name: i for i, name in enumerate(class_names)}
    training, held_out = {}, {}
    for source, (pairs, size) in listed.items():
        images = _decoded(pairs, size, cache / f"{source}-{size}.npy")
        labels = torch.tensor([index[name] for _, name in pairs])
        if source == "tiny-imagenet":
            training[source] = Source(source, images, labels)
            continue
        held = np.arange(len(pairs)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        training[source] = Source(source, np.ascontiguousarray(images[~held]), labels[torch.from_numpy(~held)])
        held_out[source] = Source(source, np.ascontiguousarray(images[held]), labels[torch.from_numpy(held)])
    return Corpus(class_names, training, held_out)
