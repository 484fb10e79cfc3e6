"""Rendered surfaces and parts, in pairs: two views of the same kind of product, different in phase, noise and light.

Real inspection images are often grey, grainy and unevenly lit, which photographs rarely are; these renderings bring
that into the training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pretrain.batches import uniform

KINDS = {
    "stripes": "striped surface",
    "weave": "woven fabric",
    "brushed": "brushed metal",
    "grain": "grey tile",
    "grid": "wire grid",
    "dots": "perforated plate",
    "clouds": "stone surface",
    "disc": "metal disc",
    "ring": "washer",
    "plate": "metal plate",
}


def smooth_noise(count: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    """Noise ``(count, 1, size, size)`` of about unit range with ``cells`` bumps along a side."""
    coarse = uniform(generator, (count, 1, cells + 2, cells + 2), -1, 1)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def _coordinates(size: int, angle: float) -> tuple[Tensor, Tensor]:
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _wave(position: Tensor, frequency: float, phase: Tensor, sharpness: float) -> Tensor:
    """Periodic profile in [0, 1]; a high ``sharpness`` makes edges out of a sine."""
    return torch.sigmoid(sharpness * torch.sin(math.pi * frequency * position + phase.view(-1, 1, 1)))


def _relief(kind: str, views: int, size: int, generator: torch.Generator) -> Tensor:
    """Height or albedo pattern ``(views, size, size)`` in [0, 1]; views differ in phase and noise alone."""
    numbers = torch.rand(6, generator=generator).tolist()
    phase = uniform(generator, (2, views), 0, 2 * math.pi)
    u, v = _coordinates(size, math.pi * numbers[0])
    frequency, sharpness = 4 * 6 ** numbers[1], 1 + 7 * numbers[2]
    across, along = _wave(u, frequency, phase[0], sharpness), _wave(v, frequency, phase[1], sharpness)
    if kind == "stripes":
        return across
    if kind == "weave":
        return torch.where(torch.sin(math.pi * frequency * (u + v) / 2 + phase[0].view(-1, 1, 1)) > 0, across, along)
    if kind == "grid":
        return torch.maximum(across, along) ** 2
    if kind == "dots":
        return 1 - across * along
    if kind in {"brushed", "plate"}:
        length, width = 9 + 2 * int(20 * numbers[3]), 1 + 2 * int(2 * numbers[2])
        kernel = (width, length) if numbers[4] < 0.5 else (length, width)
        noise = torch.randn(views, 1, size, size, generator=generator)
        streaks = F.avg_pool2d(noise, kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
        return 0.5 + 0.15 * (length * width) ** 0.5 * (0.3 + numbers[5]) * streaks[:, 0]
    cells = 4 + int(40 * numbers[3] ** 2)
    bumps = sum(smooth_noise(views, size, cells * 2**i, generator)[:, 0] / 2**i for i in range(3))
    amplitude = 0.12 if kind in {"grain", "disc", "ring"} else 0.45
    return 0.5 + amplitude * (0.3 + numbers[4]) * bumps


def _outline(kind: str, views: int, size: int, generator: torch.Generator) -> Tensor | None:
    """Soft shape ``(views, size, size)`` of a part in [0, 1], or None for a surface that fills the image."""
    if kind not in {"disc", "ring", "plate"}:
        return None
    radius = uniform(generator, (1,), 0.5, 0.85).item()
    hole = uniform(generator, (1,), 0.25, 0.6).item()
    angles = uniform(generator, (views,), -0.3, 0.3).tolist()
    shifts = uniform(generator, (views, 2), -0.1, 0.1).tolist()
    shapes = []
    for angle, (dx, dy) in zip(angles, shifts, strict=True):
        u, v = _coordinates(size, angle)
        u, v = u - dx, v - dy
        distance = torch.hypot(u, v) if kind != "plate" else (u.abs() ** 6 + (v.abs() / 0.8) ** 6) ** (1 / 6)
        shape = torch.sigmoid((radius - distance) * size / 2)
        if kind == "ring":
            shape = shape * torch.sigmoid((distance - hole * radius) * size / 2)
        shapes.append(shape)
    return torch.stack(shapes)


def _curvature(views: int, size: int, generator: torch.Generator) -> Tensor:
    """Fall of light towards two edges, as on a curved part, a little different in every view: ``(views, 1, H, W)``."""
    depth, power, upright = uniform(generator, (3,), 0.0, 1.0).tolist()
    depths = 0.9 * depth * uniform(generator, (views, 1, 1), 0.7, 1.1)
    shift = uniform(generator, (views, 1, 1), -0.15, 0.15)
    u, _ = _coordinates(size, 0.0 if upright < 0.5 else math.pi / 2)
    return (1 - depths * (u + shift).abs() ** (1 + 5 * power)).clamp(0.05, 1).unsqueeze(1)


def render(kind: str, views: int, size: int, generator: torch.Generator) -> Tensor:
    """Views ``(views, 3, size, size)`` of one product of a kind of :data:`KINDS`; noise may leave [0, 1] a little."""
    relief = _relief(kind, views, size, generator).clamp(0, 1).unsqueeze(1)
    grey = torch.rand(1, generator=generator).item() < (0.9 if kind in {"grain", "brushed"} else 0.6)
    low, high = uniform(generator, (3, 1, 1), 0.05, 0.6), uniform(generator, (3, 1, 1), 0.3, 0.95)
    if grey:
        low, high = low[:1].expand(3, 1, 1), high[:1].expand(3, 1, 1)
    image = low + (high - low) * relief
    outline = _outline(kind, views, size, generator)
    if outline is not None:
        backdrop = uniform(generator, (3, 1, 1), 0.0, 1.0)
        backdrop = backdrop[:1].expand(3, 1, 1) if grey else backdrop
        image = torch.lerp(backdrop.expand_as(image), image, outline.unsqueeze(1))
    if kind in {"brushed", "plate", "grain"}:
        image = image * _curvature(views, size, generator)
    speckle = uniform(generator, (1,), 0.0, 0.05).item()
    noise = torch.randn(views, 1 if grey else 3, size, size, generator=generator)
    return image + speckle * noise


def product_pairs(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Render ``count`` products twice.

    Args:
        count: Number of products.
        size: Side of the images in pixels.
        generator: CPU generator.

    Returns:
        First and second views, each ``(count, 3, size, size)`` in [0, 1], and the name of each product.
    """
    kinds = list(KINDS)
    # Plain grey and ground surfaces are the most common thing under an inspection camera; they get a larger share.
    shares = [*kinds, "grain", "grain", "brushed", "brushed", "brushed", "plate"]
    order = torch.randint(len(shares), (count,), generator=generator).tolist()
    chosen = [shares[i] for i in order]
    pairs = torch.stack([render(kind, 2, size, generator) for kind in chosen]).clamp(0, 1)
    return pairs[:, 0], pairs[:, 1], [KINDS[kind] for kind in chosen]


def uneven_light(images: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """Multiply images ``(B, 3, H, W)`` by a smooth light field, another for every image."""
    field = smooth_noise(images.shape[0], images.shape[-1], 1, generator)
    amount = uniform(generator, (images.shape[0], 1, 1, 1), 0.0, strength)
    return (images * (1 + amount * field)).clamp(0, 1)
