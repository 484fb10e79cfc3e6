"""Batches of augmented crops, all drawn from an explicit generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pretrain.sources import Source


def uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Draw ``shape`` numbers from ``[low, high)``."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def _affine(width: Tensor, height: Tensor, angle: Tensor, centre: Tensor, mirror: Tensor) -> Tensor:
    """Matrices ``(B, 2, 3)`` that ``affine_grid`` takes, for crops of relative ``width`` and ``height``."""
    theta = torch.zeros(len(width), 2, 3)
    theta[:, 0, 0] = width * angle.cos() * mirror
    theta[:, 0, 1] = -height * angle.sin()
    theta[:, 1, 0] = width * angle.sin() * mirror
    theta[:, 1, 1] = height * angle.cos()
    theta[:, 0, 2] = (1 - width) * centre[:, 0]
    theta[:, 1, 2] = (1 - height) * centre[:, 1]
    return theta


def _sample(images: Tensor, theta: Tensor, size: int) -> Tensor:
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False).div_(255).clamp_(0, 1)


def _mirror(count: int, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)


def random_crops(images: Tensor, size: int, generator: torch.Generator, area: tuple[float, float]) -> Tensor:
    """Cut one random square crop from every image and bring it to ``size`` pixels.

    Crops may be mirrored, are turned by up to ten degrees and stretched by up to 15%.

    Args:
        images: uint8 ``(B, 3, H, W)``.
        size: Side of the result in pixels.
        generator: CPU generator that all choices come from.
        area: Smallest and largest part of the image that a crop covers.

    Returns:
        Float crops ``(B, 3, size, size)`` in [0, 1].
    """
    count = images.shape[0]
    side = uniform(generator, (count,), *area).sqrt()
    stretch = uniform(generator, (count,), -0.15, 0.15).exp()
    angle = uniform(generator, (count,), -0.17, 0.17)
    mirror = _mirror(count, generator)
    centre = uniform(generator, (count, 2), -1, 1)
    theta = _affine((side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0), angle, centre, mirror)
    return _sample(images, theta, size)


def paired_crops(
    images: Tensor, size: int, generator: torch.Generator, area: tuple[float, float], apart: float
) -> tuple[Tensor, Tensor]:
    """Cut two crops of nearly the same scale and angle from every image.

    Args:
        images: uint8 ``(B, 3, H, W)``.
        size: Side of the results in pixels.
        generator: CPU generator.
        area: Smallest and largest part of the image that a crop covers.
        apart: How far the second crop may lie from the first: 1 for anywhere, 0 for the same place.

    Returns:
        Two batches of float crops ``(B, 3, size, size)`` in [0, 1].
    """
    count = images.shape[0]
    side = uniform(generator, (count,), *area).sqrt()
    angle = uniform(generator, (count,), -0.17, 0.17)
    mirror = _mirror(count, generator)
    centre = uniform(generator, (count, 2), -1, 1)
    first = _sample(images, _affine(side, side, angle, centre, mirror), size)
    zoom = uniform(generator, (count,), -0.06, 0.06).exp()
    turned = angle + uniform(generator, (count,), -0.06, 0.06)
    if apart >= 1:
        moved, mirror = uniform(generator, (count, 2), -1, 1), _mirror(count, generator)
    else:
        moved = (centre + apart * uniform(generator, (count, 2), -1, 1)).clamp(-1, 1)
    wide = (side * zoom).clamp(max=1.0)
    return first, _sample(images, _affine(wide, wide, turned, moved, mirror), size)


def crops_alike(
    image: Tensor, count: int, size: int, generator: torch.Generator, area: tuple[float, float], apart: float
) -> Tensor:
    """Cut several crops of nearly the same scale and angle from one image.

    Args:
        image: uint8 ``(3, H, W)``.
        count: Number of crops.
        size: Side of the results in pixels.
        generator: CPU generator.
        area: Smallest and largest part of the image that a crop covers.
        apart: How far crops may lie from each other: 1 for anywhere, 0 for the same place.

    Returns:
        Float crops ``(count, 3, size, size)`` in [0, 1].
    """
    side = uniform(generator, (1,), *area).sqrt() * uniform(generator, (count,), -0.06, 0.06).exp()
    angle = uniform(generator, (1,), -0.17, 0.17) + uniform(generator, (count,), -0.06, 0.06)
    moved = uniform(generator, (1, 2), -1, 1) * (1 - apart) + apart * uniform(generator, (count, 2), -1, 1)
    theta = _affine(side.clamp(max=1.0), side.clamp(max=1.0), angle, moved, _mirror(1, generator).expand(count))
    return _sample(image.expand(count, -1, -1, -1), theta, size)


def photometric(images: Tensor, generator: torch.Generator, strength: float = 0.4, grey: float = 0.15) -> Tensor:
    """Change brightness, contrast and saturation of every image, and make some of them grey.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        generator: CPU generator.
        strength: Largest relative change.
        grey: Probability of a grey image.
    """
    count = images.shape[0]
    brightness = uniform(generator, (count, 1, 1, 1), 1 - strength, 1 + strength)
    contrast = uniform(generator, (count, 1, 1, 1), 1 - strength, 1 + strength)
    saturation = uniform(generator, (count, 1, 1, 1), 1 - strength, 1 + strength)
    saturation = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < grey, 0.0, saturation)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luma = (images * weights).sum(1, keepdim=True)
    result = luma + (images - luma) * saturation.to(images)
    mean = result.mean((1, 2, 3), keepdim=True)
    return (((result - mean) * contrast.to(images) + mean) * brightness.to(images)).clamp(0, 1)


def names_batch(
    sources: dict[str, Source], batch: int, size: int, generator: torch.Generator, larger: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Draw a batch for the class-name contrast.

    Args:
        sources: Training pools; "tiny-imagenet" fills what the larger pictures leave.
        batch: Images in the batch.
        size: Side of the crops in pixels.
        generator: CPU generator.
        larger: Part of the batch taken from the other pools, shared evenly.

    Returns:
        Images ``(B, 3, size, size)`` in [0, 1] and class indices ``(B,)``.
    """
    others = [name for name in sources if name != "tiny-imagenet"]
    each = round(batch * larger / max(1, len(others)))
    parts, labels = [], []
    for name, source in sources.items():
        count = each if name in others else batch - each * len(others)
        rows = torch.randint(len(source.labels), (count,), generator=generator)
        area = (0.1, 0.8) if name in others else (0.4, 1.0)
        parts.append(random_crops(source.take(rows), size, generator, area))
        labels.append(source.labels[rows])
    return photometric(torch.cat(parts), generator), torch.cat(labels)
