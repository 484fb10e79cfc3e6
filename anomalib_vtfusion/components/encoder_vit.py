"""Image features of a frozen ViT of ``timm``: its middle blocks, averaged in two groups.

Self-supervised towers (DINOv2, DINOv3) tell parts and textures apart better than those trained on captions. Guo et al.
2024, "Dinomaly" (arXiv 2405.14325), average the eight middle ones of twelve blocks in two groups of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder_towers import check_layers, check_multiple
from .encoder_vit_weights import build_vit, fill_vit, find_vit
from .encoder_weights import hash_state


class AveragedViT(nn.Module):
    """Maps of a ``timm`` ViT: two groups of blocks, each averaged, without prefix tokens (class, registers).

    Args:
        image_encoder: ``timm`` name with or without a pretrained tag, a folder in ``timm`` format
            (``"local-dir:PATH"`` or the path itself), or ``"hf-hub:ORG/REPO"``.
        weights: Path of a weights file; ``None`` for the tag's, folder's or repository's own, ``""`` for random ones
            (always the same).
        layers: Blocks to average, counted from 0: the first half of them makes the first map, the rest the second, and
            a single one the only map. ``None`` takes the middle two thirds of all blocks.
        image_size: Input ``(H, W)``; ``None`` takes what the model was made for. Position embeddings are interpolated.

    Attributes:
        layers: Indices of the averaged blocks in ascending order.
        groups: The same, a tuple for each map.
        image_size: Input ``(H, W)``.
        grid: Size ``(h, w)`` of the maps.
        channels: Channels of each map.
        weights_hash: SHA-256 of the weights as loaded, the same for every image size and choice of blocks.

    Raises:
        ValueError: If the name or a block is unknown, it is not a ViT, the size does not fit, or the weights do not.
        FileNotFoundError: If a file is missing and cannot be downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_encoder: str,
        weights: str | None,
        layers: Sequence[int] | None,
        image_size: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        source = find_vit(image_encoder)
        vit: Any = build_vit(source)  # timm puts attributes on it that its classes do not declare
        # What is wrong with layers or size shows before weights are fetched.
        depth, edge = len(vit.blocks), len(vit.blocks) // 6
        self.layers = check_layers(range(edge, depth - edge) if layers is None else layers, depth)
        size = image_size or vit.patch_embed.img_size
        check_multiple(*size, *vit.patch_embed.patch_size)
        fill_vit(vit, source, weights)
        self.weights_hash = hash_state([vit.state_dict()])

        vit.set_input_size(size)
        vit.prune_intermediate_layers(list(self.layers), prune_norm=True)
        self.vit = vit
        half = len(self.layers) // 2
        self.groups = [group for group in (self.layers[:half], self.layers[half:]) if group]
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.channels = [vit.embed_dim] * len(self.groups)
        for name in ("mean", "std"):
            statistics = torch.tensor(vit.pretrained_cfg[name], dtype=torch.float32)
            self.register_buffer(name, statistics.view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run the tower up to the last block that is asked for.

        Args:
            images: RGB images ``(B, 3, H, W)`` in ``[0, 1]``.

        Returns:
            One map ``(B, C, h, w)`` for each group, as the blocks made them (no norm after them).
        """
        normalised = (images - self.mean) / self.std
        blocks = self.vit.forward_intermediates(normalised, indices=list(self.layers), intermediates_only=True)
        by_index = dict(zip(self.layers, blocks, strict=True))
        return [torch.stack([by_index[index] for index in group]).mean(dim=0) for group in self.groups]


class AntialiasedResize(nn.Module):
    """Antialiased bilinear resizing between two fixed sizes, as two products with constant matrices.

    Equal to ``F.interpolate(mode="bilinear", antialias=True)``, which not every runtime of exported graphs has.

    Args:
        size: Input ``(H, W)``.
        new_size: Output ``(H', W')``.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], new_size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", _weights(size[0], new_size[0]), persistent=False)
        self.register_buffer("columns", _weights(size[1], new_size[1]).T.contiguous(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Resize images ``(B, C, H, W)`` to ``(B, C, H', W')``."""
        return self.rows @ images @ self.columns


def _weights(size: int, new_size: int) -> Tensor:
    """Shares ``(new_size, size)`` of the pixels of a line in those of the resized line."""
    line = torch.eye(size)[None, None]  # the picture of each pixel on its own, one a column
    return F.interpolate(line, size=(new_size, size), mode="bilinear", antialias=True, align_corners=False)[0, 0]
