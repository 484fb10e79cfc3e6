"""Segmentation network that refines the training-free map, and the image head that refines its score."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_vtfusion.components.predictions import TOP_FRACTION

# Widths of the three pyramid levels, from the encoder's grid h x w up to 4h x 4w.
WIDTHS = (128, 64, 32)
# Bound of the map's residual: the network may turn a verdict round, not drown the evidence.
MAX_RESIDUAL = 4.0
# Bound of the score's residual. Labels of a few synthetic images teach an image head less than the map already knows.
MAX_SCORE_RESIDUAL = 1.0


def bounded(residual: Tensor, limit: float) -> Tensor:
    """Squash a residual logit smoothly into ``(-limit, limit)``."""
    return limit * torch.tanh(residual / limit)


class PyramidLevel(nn.Module):
    """3x3 convolution, modulated by the text (FiLM, Perez et al., 2018) when a guide is given.

    Args:
        inputs: Input channels.
        width: Output channels.
        guide: Width of the text guide, 0 for none. The modulation starts as the identity.
    """

    def __init__(self, inputs: int, width: int, guide: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, width, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.modulation = nn.Linear(guide, 2 * width) if guide else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, features: Tensor, guide: Tensor) -> Tensor:
        """Features ``(B, inputs, H, W)`` and text guide ``(B, guide)`` to ``(B, width, H, W)``."""
        features = self.norm(self.convolution(features))
        if self.modulation is not None:
            scale, shift = self.modulation(guide)[:, :, None, None].chunk(2, dim=1)
            features = features * (1 + scale) + shift
        return F.gelu(features)


class SegmentationNet(nn.Module):
    """Three-level pyramid with two upsamplings; its output is a residual on the training-free logits.

    Args:
        dim: Width ``d`` of the fused map.
        skip: Width of the finest encoder layer, which joins at the second level.
        evidence: Number of evidence channels, which join at every level.
        text_guidance: Modulate every level by the text.
    """

    def __init__(self, dim: int, skip: int, evidence: int, text_guidance: bool) -> None:
        super().__init__()
        guide = dim if text_guidance else 0
        self.skip = nn.Conv2d(skip, WIDTHS[1], kernel_size=1)
        inputs = (dim, WIDTHS[0] + WIDTHS[1], WIDTHS[1])
        self.levels = nn.ModuleList(
            PyramidLevel(channels + evidence, width, guide) for channels, width in zip(inputs, WIDTHS, strict=True)
        )
        self.output = nn.Conv2d(WIDTHS[2], 1, kernel_size=1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, fused_map: Tensor, skip_map: Tensor, evidence: Tensor, guide: Tensor) -> Tensor:
        """Residual logits at four times the encoder's grid.

        Args:
            fused_map: ``(B, d, h, w)``.
            skip_map: Finest encoder layer ``(B, skip, h', w')``.
            evidence: Standardised predictions and training-free logits ``(B, E, h', w')``.
            guide: Text guide ``(B, d)``.

        Returns:
            ``(B, 1, 4h, 4w)``.
        """
        # In channels-last order, resizing is ten times as fast and the convolutions a fifth faster. A clone, because
        # the strides of a single image pass for that order without being it.
        fused_map, skip_map, evidence = (
            part.clone(memory_format=torch.channels_last) for part in (fused_map, skip_map, evidence)
        )
        height, width = fused_map.shape[-2:]
        features = self.levels[0](self._with_evidence(fused_map, evidence), guide)
        features = self._resize(features, (2 * height, 2 * width))
        skip = self._resize(self.skip(skip_map), (2 * height, 2 * width))
        features = self.levels[1](self._with_evidence(torch.cat([features, skip], dim=1), evidence), guide)
        features = self._resize(features, (4 * height, 4 * width))
        features = self.levels[2](self._with_evidence(features, evidence), guide)
        return bounded(self.output(features), MAX_RESIDUAL)

    def _with_evidence(self, features: Tensor, evidence: Tensor) -> Tensor:
        return torch.cat([features, self._resize(evidence, features.shape[-2:])], dim=1)

    @staticmethod
    def _resize(features: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        if features.shape[-2:] == tuple(size):
            return features
        return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


class ImageHead(nn.Module):
    """Residual of the image score from pooled features and statistics of the maps (SuperSimpleNet, Rolih et al., 2024).

    Args:
        dim: Width ``d`` of the fused map.
        hidden: Width of the hidden layer.
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.LayerNorm(2 * dim), nn.Linear(2 * dim, hidden), nn.GELU())
        self.output = nn.Linear(hidden + 8, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, fused_map: Tensor, logits: Tensor, base: Tensor) -> Tensor:
        """Residual ``(B, 1)`` from features ``(B, d, h, w)``, refined and training-free logits ``(B, 1, H, W)``."""
        # Attention by the map: pool where the map is high, and everywhere.
        weights = F.interpolate(logits, size=fused_map.shape[-2:], mode="bilinear", align_corners=False)
        weights = weights.flatten(2).softmax(dim=-1)
        attended = (fused_map.flatten(2) * weights).sum(dim=-1)
        pooled = torch.cat([fused_map.mean(dim=(2, 3)), attended], dim=1)
        statistics = torch.cat([self._statistics(logits), self._statistics(base)], dim=1)
        return bounded(self.output(torch.cat([self.network(pooled), statistics], dim=1)), MAX_SCORE_RESIDUAL)

    @staticmethod
    def _statistics(logits: Tensor) -> Tensor:
        """Mean, spread, maximum and top mean of a map: ``(B, 4)``."""
        flat = logits.flatten(1)
        top = flat.topk(max(1, round(TOP_FRACTION * flat.shape[1])), dim=1).values
        return torch.stack([flat.mean(dim=1), flat.std(dim=1), top[:, 0], top.mean(dim=1)], dim=1)
