"""Residual adapters that turn frozen features into task-specific ones, for images and for text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local_aggregation(feature_map: Tensor) -> Tensor:
    """Average each location with its 3x3 neighbourhood and list the locations as tokens.

    Args:
        feature_map: ``(B, C, h, w)``.

    Returns:
        Tokens ``(B, h * w, C)``, row-major. Source: PatchCore (Roth et al., 2022), section 3.1.
    """
    averaged = F.avg_pool2d(feature_map, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    return averaged.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay tokens ``(B, h * w, C)`` out as a map ``(B, C, h, w)``."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def resize_map(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a map ``(B, C, h, w)`` to ``grid``, bilinearly; a map that already fits is returned as it is."""
    if tuple(feature_map.shape[-2:]) == tuple(grid):
        return feature_map
    return F.interpolate(feature_map, size=grid, mode="bilinear", align_corners=False)


class ResidualAdapter(nn.Module):
    """``x + s * MLP(norm(x))`` on the last dimension; the identity until it is trained.

    The last layer of the MLP starts at zero and ``s`` is learnable and small, so that training leaves the frozen
    features slowly (CLIP-Adapter, Gao et al., 2021).

    Args:
        dim: Width of the features.
        hidden: Width of the bottleneck.
        scale: First value of ``s``.
    """

    def __init__(self, dim: int, hidden: int, scale: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        last = nn.Linear(hidden, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Adapt features of any leading shape ``(..., dim)``."""
        # The residual is measured in units of the feature's own length: towers differ by orders of magnitude.
        length = features.norm(dim=-1, keepdim=True)
        return features + self.scale * length * self.mlp(self.norm(features))


class ImageAdapter(nn.Module):
    """Adapts the tokens of each encoder layer and joins them in one fused map.

    Args:
        channels: Width ``C_l`` of each layer.
        grids: Grid ``(h_l, w_l)`` of each layer.
        embed_dim: Width ``D`` of the joint image-text space.
        dim: Width ``d`` of the fused map.
        adapt: False leaves the tokens as the tower made them and gives no joint-space tokens of its own (the ablation
            of the adaptive image features); only the projection to the fused map is left.
    """

    def __init__(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        embed_dim: int,
        dim: int,
        adapt: bool = True,
    ) -> None:
        super().__init__()
        self.grids = grids
        self.grid = min(grids)  # the coarsest layer's grid carries the fused map
        self.adapters = nn.ModuleList(ResidualAdapter(c, max(c // 4, 32)) if adapt else nn.Identity() for c in channels)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.to_fused = nn.Linear(sum(channels), dim)
        self.to_joint = nn.ModuleList(nn.Linear(c, embed_dim) for c in channels) if adapt else None

    def adapt(self, layer: int, tokens: Tensor) -> Tensor:
        """Adapt tokens ``(..., C_l)`` of one layer and scale them to unit length."""
        return F.normalize(self.adapters[layer](tokens), dim=-1)

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        """Adapt the aggregated tokens ``(B, N_l, C_l)`` of all layers; unit length."""
        return [self.adapt(layer, layer_tokens) for layer, layer_tokens in enumerate(tokens)]

    def fuse(self, adapted: list[Tensor]) -> Tensor:
        """Join adapted tokens in the fused map ``(B, d, h, w)`` on the coarsest grid."""
        maps = [
            resize_map(to_map(norm(tokens), grid), self.grid)
            for tokens, norm, grid in zip(adapted, self.norms, self.grids, strict=True)
        ]
        return self.to_fused(torch.cat(maps, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def joint_tokens(self, adapted: list[Tensor]) -> list[Tensor]:
        """Adapted tokens in the joint space: unit vectors ``(B, D, h_l, w_l)`` a layer; empty if not adapted."""
        if self.to_joint is None:
            return []
        return [
            to_map(F.normalize(project(norm(tokens)), dim=-1), grid)
            for tokens, norm, project, grid in zip(adapted, self.norms, self.to_joint, self.grids, strict=True)
        ]


class TextAdapter(nn.Module):
    """Residual adapter on unit text embeddings ``(T, D)``; unit length again afterwards.

    Args:
        embed_dim: Width ``D`` of the joint space.
        adapt: False returns the embeddings unchanged (the ablation of the adaptive text features).
    """

    def __init__(self, embed_dim: int, adapt: bool = True) -> None:
        super().__init__()
        self.adapter = ResidualAdapter(embed_dim, max(embed_dim // 4, 32)) if adapt else nn.Identity()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Adapt embeddings ``(T, D)``."""
        return F.normalize(self.adapter(embeddings), dim=-1)
