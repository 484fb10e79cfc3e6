"""Feature noise: anomalies made in feature space, where no drawing routine has left its signature."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureNoise:
    """Noise for a batch, replayable.

    Attributes:
        region: Share of noise ``(B, 1, h, w)`` in ``{0, 1}`` on a coarse grid; zero for images without noise.
        strength: Length ``(B,)`` of the noise relative to a feature's own.
        seed: Seed of the noise itself.
    """

    region: Tensor
    strength: Tensor
    seed: int


def sample_feature_noise(
    batch: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    share: float = 0.25,
    strength: tuple[float, float] = (0.3, 1.0),
) -> FeatureNoise:
    """Choose which images get noise, where and how strong.

    Source: noise near the normal manifold after GLASS (Chen et al., 2024); smooth regions after SuperSimpleNet.

    Args:
        batch: Number of images ``B``.
        grid: Grid ``(h, w)`` of the regions.
        generator: CPU generator; all randomness comes from it.
        share: Share of images with noise.
        strength: Range of the noise's length relative to a feature's own.
    """
    smooth = F.interpolate(torch.rand(batch, 1, 4, 4, generator=generator), size=grid, mode="bicubic")
    # Between 2 % and 25 % of the cells: the highest ones of a smooth random field.
    quantile = 0.75 + 0.23 * torch.rand(batch, generator=generator)
    flat = smooth.flatten(1).sort(dim=1).values
    threshold = flat.gather(1, (quantile * (flat.shape[1] - 1)).long()[:, None])
    region = (smooth > threshold[:, :, None, None]).float()
    region *= (torch.rand(batch, generator=generator) < share).float()[:, None, None, None]
    low, high = strength
    lengths = low + (high - low) * torch.rand(batch, generator=generator)
    return FeatureNoise(region, lengths, int(torch.randint(2**31, (1,), generator=generator)))


def add_feature_noise(feature_map: Tensor, noise: FeatureNoise) -> Tensor:
    """Add the noise to a map ``(B, C, h, w)`` of any grid, inside its region."""
    generator = torch.Generator().manual_seed(noise.seed)
    direction = torch.randn(feature_map.shape, generator=generator).to(feature_map)
    direction = F.normalize(direction, dim=1) * feature_map.norm(dim=1, keepdim=True)
    region = F.interpolate(noise.region.to(feature_map), size=feature_map.shape[-2:], mode="nearest")
    return feature_map + region * noise.strength.to(feature_map)[:, None, None, None] * direction
