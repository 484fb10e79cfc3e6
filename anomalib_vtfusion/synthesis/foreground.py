"""Where the object is: a classical foreground mask, so that defects land on the part and not beside it."""

from __future__ import annotations

import math

import kornia
import torch
from torch import Tensor
from torch.nn import functional as F

WORKING_SIZE = 64
"""Longer side, in pixels, at which the object is looked for."""

RIM = 2
"""Frame, in pixels at that size, that is never called object."""

LOWERED = 0.6
"""Factor on Otsu's threshold before a quiet background that has a colour."""


@torch.no_grad()
def foreground_mask(images: Tensor) -> Tensor:
    """Object mask from the distance to the colour of the image's border.

    The border's median colour models the background; Otsu's threshold on the distance from it gives the object, which
    is then closed and opened. Where the border has no clear colour, where nothing or nearly everything stands out, or
    where what stands out runs along the border, the image is taken as a texture and the mask is all ones.

    Args:
        images: RGB in [0, 1], ``(B, 3, H, W)``.

    Returns:
        Mask of {0, 1}, ``(B, 1, H, W)``, float32 on the device of ``images``.
    """
    mask, factor = foreground_of_thumbnails(thumbnails(images)), shrink_factor(images)
    return enlarge(mask, factor, (images.shape[-2], images.shape[-1]))


def shrink_factor(images: Tensor) -> int:
    """Whole number by which images are shrunk to fit ``WORKING_SIZE``."""
    return max(1, math.ceil(max(images.shape[-2:]) / WORKING_SIZE))


def thumbnails(images: Tensor) -> Tensor:
    """Copies averaged over squares of :func:`shrink_factor` pixels, ``(B, 3, h, w)`` float32."""
    factor = shrink_factor(images)
    if factor == 1:
        return images.float()
    return F.avg_pool2d(images.float(), factor, ceil_mode=True, count_include_pad=False)


def enlarge(mask: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Bring a mask of thumbnails to full size with smooth outlines, ``(B, 1, h, w)`` to ``(B, 1, *size)``."""
    if factor == 1:
        return mask
    rounded = F.avg_pool2d(mask, 3, stride=1, padding=1, count_include_pad=False)
    full = F.interpolate(rounded, scale_factor=float(factor), mode="bilinear")
    return (full[..., : size[0], : size[1]] > 0.5).float()


def foreground_of_thumbnails(small: Tensor) -> Tensor:
    """:func:`foreground_mask` at the size of its argument, ``(B, 3, h, w)`` to ``(B, 1, h, w)``."""
    border = _border(small)
    colour = border.median(dim=-1).values
    distance = (small - _shaded(small, colour)).abs().amax(1)
    spread = (border - colour[:, :, None]).abs().mean((1, 2))
    threshold, separation = _otsu(distance)
    # Otsu splits bright from faint parts of an object as well; where shadows are known, the threshold can be lower.
    threshold = torch.where(_colourful(colour) & (spread < 0.35 * threshold), LOWERED * threshold, threshold)
    raw = (distance > threshold[:, None, None]).float()[:, None]

    kernel = torch.ones(3, 3, device=small.device)
    mask = kornia.morphology.closing(raw, torch.ones(5, 5, device=small.device))
    mask = kornia.morphology.opening(mask, kernel)
    # Shelves and vignetting at the rim of the image are no objects; an object that touches it loses a sliver only.
    mask = F.pad(mask[..., RIM:-RIM, RIM:-RIM], (RIM, RIM, RIM, RIM))

    share = mask.mean((1, 2, 3))
    at_border = _border(raw).mean((1, 2))
    is_object = (
        (share > 0.02) & (share < 0.9) & (at_border < 0.25) & (separation > 0.6) & (spread < 0.6 * threshold)
    ) & (threshold > 0.04)
    return torch.where(is_object[:, None, None, None], mask, torch.ones_like(mask))


def _shaded(small: Tensor, colour: Tensor) -> Tensor:
    """Background as it would look in the shadow that a pixel may lie in, ``(B, 3, h, w)``.

    A shadow keeps the hue, so it is only told from an object on a background that has one; elsewhere the background is
    its plain colour.
    """
    plain = colour[:, :, None, None].expand_as(small)
    light = (small * plain).sum(1, keepdim=True) / plain.square().sum(1, keepdim=True).clamp(min=1e-4)
    return torch.where(_colourful(colour)[:, None, None, None], plain * light.clamp(0.6, 1.0), plain)


def _colourful(colour: Tensor) -> Tensor:
    """Whether a background colour ``(B, 3)`` has a clear hue, bool ``(B,)``."""
    return colour.amax(1) - colour.amin(1) > 0.15


def _border(values: Tensor) -> Tensor:
    """Pixels of the outer frame, two pixels wide, ``(B, C, h, w)`` to ``(B, C, n)``."""
    top, bottom = values[..., :2, :].flatten(2), values[..., -2:, :].flatten(2)
    left, right = values[..., 2:-2, :2].flatten(2), values[..., 2:-2, -2:].flatten(2)
    return torch.cat([top, bottom, left, right], dim=-1)


def _otsu(values: Tensor, bins: int = 64) -> tuple[Tensor, Tensor]:
    """Otsu's threshold of values in [0, 1], ``(B, h, w)``.

    Returns:
        Threshold and share of the variance it explains (0 to 1), each ``(B,)``.
    """
    index = (values.flatten(1) * bins).long().clamp_(0, bins - 1)
    weight = torch.zeros(values.shape[0], bins, device=values.device)
    weight.scatter_add_(1, index, torch.ones_like(index, dtype=weight.dtype))
    weight = weight / weight.sum(1, keepdim=True)
    level = (torch.arange(bins, device=values.device) + 0.5) / bins
    below = weight.cumsum(1)
    mass = (weight * level).cumsum(1)
    mean = mass[:, -1:]
    between = (mean * below - mass).square() / (below * (1.0 - below)).clamp(min=1e-6)
    variance = (weight * (level - mean).square()).sum(1).clamp(min=1e-8)
    best, at = between.max(1)
    return (at + 1.0) / bins, best / variance
