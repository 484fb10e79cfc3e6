"""A folder of texture images, read when needed."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""File names that count as images, in lower case."""

TEXTURE_SIDE = 256
"""Longer side, in pixels, to which textures are shrunk on reading."""

CACHED = 256
"""Textures kept in memory (at most 0.2 MB each)."""


class TextureFolder:
    """Images of a folder and its sub-folders, in sorted order, each decoded on first use.

    Args:
        root: Folder with at least one readable image.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no image file.
        NotADirectoryError: If the path is a file.
        ValueError: If the first image cannot be read.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.exists():
            msg = f"texture_source: folder {root} does not exist; give a folder of texture images or None"
            raise FileNotFoundError(msg)
        if not root.is_dir():
            msg = f"texture_source: {root} is a file; give the folder that holds the texture images"
            raise NotADirectoryError(msg)
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.paths:
            msg = f"texture_source: no image in {root}; looked for {', '.join(sorted(SUFFIXES))} in it and below"
            raise FileNotFoundError(msg)
        self._cache: dict[int, Tensor] = {}
        self.read(0)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """Texture number ``index`` modulo their count: RGB in [0, 1], ``(3, h, w)``, on the CPU.

        Raises:
            ValueError: If the file cannot be decoded.
        """
        index %= len(self.paths)
        if index not in self._cache:
            if len(self._cache) >= CACHED:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = self._decode(self.paths[index])
        return self._cache[index].float() / 255.0

    @staticmethod
    def _decode(path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            msg = f"texture_source: cannot read {path} as an image ({error}); remove or replace the file"
            raise ValueError(msg) from error
        image.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
