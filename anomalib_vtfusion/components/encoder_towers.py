"""One view of every kind of CLIP image tower: chosen layers, dense joint-space tokens and the pooled embedding.

The three kinds differ in where dense tokens come from; each makes one pass and returns unnormalised values:

- ``ViTTower``: last block's patch tokens through the tower's final norm and projection.
- ``TimmTower``: the tower's own head (pooling, norm, projection) applied to each location as if it were the whole
  picture. For average pooling with a linear projection the mean of these tokens *is* the pooled embedding; for
  attention pooling it is the value path.
- ``ResNetTower``: value and output projection of the attention pool at each location (Zhou et al. 2022, "Extract Free
  Dense Labels from CLIP", Sec. 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import AttentionalPooler, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_vtfusion.components.encoder_attention import keep_tokens_in_place


class ImageTower(nn.Module):
    """Base of the three kinds.

    Args:
        visual: Image tower of an ``open_clip`` model.
        layers: Indices of the layers to return, or ``None`` for ``default_layers``.
        image_size: Input ``(H, W)``.

    Raises:
        ValueError: If a layer index does not exist or the tower cannot take images of this size.
    """

    def __init__(self, visual: nn.Module, layers: Sequence[int] | None, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.visual = visual
        self.image_size = image_size
        self._fit_size(*image_size)
        # Channels last: convolutions and poolings take a quarter less time, and maps become tokens without a copy.
        self.visual.to(memory_format=torch.channels_last)
        self.layers = check_layers(self.default_layers if layers is None else layers, self.num_layers)
        # The last layer is always taken: the joint-space tokens, or at least their grid, come from it.
        self._indices = sorted({*self.layers, self.num_layers - 1})

    @property
    def num_layers(self) -> int:
        """Number of layers one can choose from."""
        raise NotImplementedError

    @property
    def default_layers(self) -> tuple[int, ...]:
        """Layers used when none are chosen."""
        raise NotImplementedError

    def _fit_size(self, height: int, width: int) -> None:
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the tower once.

        Args:
            images: Normalised images ``(B, 3, H, W)``.

        Returns:
            Maps of the chosen layers, each ``(B, C_l, h_l, w_l)``; dense tokens ``(B, D, h, w)`` in the joint space;
            pooled embedding ``(B, D)``. None of them has unit length.
        """
        maps, tokens, pooled = self._run(images.contiguous(memory_format=torch.channels_last))
        chosen = [feature for index, feature in zip(self._indices, maps, strict=True) if index in self.layers]
        return chosen, tokens, pooled

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        raise NotImplementedError


class ViTTower(ImageTower):
    """``open_clip``'s own vision transformer; layers are its blocks."""

    visual: VisionTransformer

    def __init__(self, visual: VisionTransformer, layers: Sequence[int] | None, image_size: tuple[int, int]) -> None:
        super().__init__(visual, layers, image_size)
        keep_tokens_in_place(self.visual.transformer.resblocks)

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.visual.transformer.resblocks)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """Blocks at a quarter, a half, three quarters and the end."""
        return _spread(self.num_layers)

    def _fit_size(self, height: int, width: int) -> None:
        patch_height, patch_width = self.visual.patch_size
        check_multiple(height, width, patch_height, patch_width)
        if self.visual.attn_pool is not None and self.visual.pool_type == "none":
            raise ValueError("Vision transformers with a separate contrastive attention pooler are not supported.")
        grid = (height // patch_height, width // patch_width)
        if grid != tuple(self.visual.grid_size):
            self.visual.positional_embedding = _resize(self.visual.positional_embedding, self.visual.grid_size, grid)
            self.visual.grid_size, self.visual.image_size = grid, (height, width)

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        output = self.visual.forward_intermediates(images, indices=self._indices)
        maps = output["image_intermediates"]
        tokens = maps[-1].permute(0, 2, 3, 1)
        if self.visual.attn_pool is not None:
            tokens = _attention_values(self.visual.attn_pool, tokens)
        tokens = self.visual.ln_post(tokens)
        if self.visual.proj is not None:
            tokens = tokens @ self.visual.proj
        return maps, tokens.permute(0, 3, 1, 2), output["image_features"]


class TimmTower(ImageTower):
    """A ``timm`` model with ``open_clip``'s adapter; layers are its feature stages (or blocks, where all are alike)."""

    visual: TimmModel

    @property
    def _reductions(self) -> list[int]:
        return [int(info["reduction"]) for info in self.visual.trunk.feature_info]

    @property
    def num_layers(self) -> int:
        """Number of feature stages or blocks."""
        return len(self.visual.trunk.feature_info)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """The stages of stride 8 and 16; four spread blocks where every block has the same stride."""
        reductions = self._reductions
        if len(set(reductions)) == 1:
            return _spread(len(reductions))
        last_with = {stride: index for index, stride in enumerate(reductions)}
        chosen = tuple(last_with[stride] for stride in (8, 16) if stride in last_with)
        return chosen or tuple(range(len(reductions)))[-2:]

    def _fit_size(self, height: int, width: int) -> None:
        stride = max(self._reductions)
        if min(height, width) < stride:
            raise ValueError(f"Image of {height}x{width} is smaller than one patch ({stride}x{stride}) of this tower.")
        if len(set(self._reductions)) == 1:
            check_multiple(height, width, stride, stride)
        if (height, width) != tuple(self.visual.image_size):
            self.visual.image_size = (height, width)
            if hasattr(self.visual.trunk, "set_input_size"):
                self.visual.trunk.set_input_size((height, width))

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        trunk, head = self.visual.trunk, self.visual.head
        features, maps = trunk.forward_intermediates(images, indices=self._indices)
        pooled = head(trunk.forward_head(features))
        cells, height, width = self._cells(features, maps[-1])
        tokens = head(trunk.forward_head(cells))
        return maps, tokens.reshape(-1, height, width, tokens.shape[-1]).permute(0, 3, 1, 2), pooled

    def _cells(self, features: Tensor, last_map: Tensor) -> tuple[Tensor, int, int]:
        """Every location of the last features as a picture of its own, ``(B * h * w, ...)``."""
        if features.ndim == 3:
            height, width = last_map.shape[-2:]
            prefix = features.shape[1] - height * width
            channels = features.shape[2]
            patch = features[:, prefix:].reshape(-1, 1, channels)
            # Heads that read a class token find the patch in its place; average and attention pooling of equal tokens
            # give that token's value.
            return patch.expand(-1, prefix + 1, channels), height, width
        if getattr(self.visual.trunk, "output_fmt", "NCHW") == "NHWC":
            height, width, channels = features.shape[1:]
            return features.reshape(-1, 1, 1, channels), height, width
        channels, height, width = features.shape[1:]
        return features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1), height, width


class ResNetTower(ImageTower):
    """CLIP's modified ResNet; layer 0 is the stem and 1 to 4 are the stages (strides 4, 4, 8, 16, 32)."""

    visual: ModifiedResNet

    @property
    def num_layers(self) -> int:
        """Stem and four stages."""
        return 5

    @property
    def default_layers(self) -> tuple[int, ...]:
        """The stages of stride 8 and 16."""
        return (2, 3)

    def _fit_size(self, height: int, width: int) -> None:
        check_multiple(height, width, 32, 32)
        pool = self.visual.attnpool
        side = math.isqrt(pool.positional_embedding.shape[0] - 1)
        grid = (height // 32, width // 32)
        if grid != (side, side):
            pool.positional_embedding = _resize(pool.positional_embedding, (side, side), grid)
            self.visual.image_size = (height, width)

    def _run(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        output = self.visual.forward_intermediates(images, indices=self._indices)
        maps = output["image_intermediates"]
        pool = self.visual.attnpool
        tokens = pool.c_proj(pool.v_proj(maps[-1].permute(0, 2, 3, 1)))
        return maps, tokens.permute(0, 3, 1, 2), output["image_features"]


def build_image_tower(visual: nn.Module, layers: Sequence[int] | None, image_size: tuple[int, int]) -> ImageTower:
    """Wrap an ``open_clip`` image tower by its kind.

    Args:
        visual: Image tower of an ``open_clip`` model.
        layers: Indices of the layers to return, or ``None`` for the kind's default.
        image_size: Input ``(H, W)``.

    Returns:
        The wrapped tower.

    Raises:
        ValueError: If the tower is of another kind, a layer does not exist or the size does not fit.
    """
    kinds: dict[type[nn.Module], type[ImageTower]] = {
        VisionTransformer: ViTTower,
        TimmModel: TimmTower,
        ModifiedResNet: ResNetTower,
    }
    for visual_type, tower in kinds.items():
        if isinstance(visual, visual_type):
            return tower(visual, layers, image_size)
    raise ValueError(f"Image tower {type(visual).__name__} is not a ViT, timm or ResNet tower of open_clip.")


def _attention_values(pooler: AttentionalPooler, tokens: Tensor) -> Tensor:
    """What the attention pooler would return if it looked at one token only, for each token ``(..., C)``."""
    attention = pooler.attn
    dim = attention.embed_dim
    weight = attention.v_proj_weight if attention.in_proj_weight is None else attention.in_proj_weight[2 * dim :]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * dim :]
    return attention.out_proj(F.linear(pooler.ln_k(tokens), weight, bias))


def _resize(embedding: Tensor, grid: Sequence[int], new_grid: tuple[int, int]) -> nn.Parameter:
    """Interpolate position embeddings ``(1 + h * w, C)`` to a new grid, as ``open_clip`` does while loading.

    ``open_clip`` itself does so for square grids of transformers only.
    """
    whole, spatial = embedding.detach()[:1], embedding.detach()[1:]
    spatial = spatial.T.reshape(1, -1, *grid)
    spatial = F.interpolate(spatial, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return nn.Parameter(torch.cat([whole, spatial.flatten(2)[0].T]).contiguous(), requires_grad=False)


def _spread(depth: int) -> tuple[int, ...]:
    return tuple(sorted({math.ceil(depth * quarter / 4) - 1 for quarter in range(1, 5)}))


def check_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """The layers in ascending order.

    Raises:
        ValueError: If there is none, one is given twice, or one is not in ``0`` to ``count - 1``.
    """
    chosen = tuple(layers)
    unknown = [
        index for index in chosen if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count
    ]
    if unknown:
        raise ValueError(f"Unknown layers {unknown}: this image tower has layers 0 to {count - 1}.")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"layers must name at least one layer, each once; got {chosen}.")
    return tuple(sorted(chosen))


def check_multiple(height: int, width: int, step_height: int, step_width: int) -> None:
    """Refuse image sizes that are no multiple of the patch size.

    Raises:
        ValueError: If a side is smaller than a patch or does not divide into patches.
    """
    if height < step_height or width < step_width:
        raise ValueError(
            f"Image of {height}x{width} is smaller than one patch ({step_height}x{step_width}) of this image tower."
        )
    if height % step_height or width % step_width:
        near = round(height / step_height) * step_height, round(width / step_width) * step_width
        raise ValueError(
            f"Image size {height}x{width} does not divide into patches of {step_height}x{step_width}; "
            f"the nearest that does is {near[0]}x{near[1]}."
        )
