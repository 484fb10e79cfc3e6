"""Shapes of defects: noise fields, blobs, rectangles and strokes as pure functions.

Blobs, rectangles and strokes are returned as *signed distances* in pixels, positive inside. A distance serves the
anti-aliased edge (:func:`soft_edge`), the rim and the shading of a defect alike, which a binary mask could not.
Scalars come from ``random.Random``, noise tensors from CPU generators, so a seed gives the same shape on any device.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F


def seeded(seed: int) -> torch.Generator:
    """CPU generator that starts from ``seed``."""
    return torch.Generator().manual_seed(seed)


def lattice_angles(count: int, cells: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw gradient directions for :func:`perlin_noise`.

    Returns:
        Angles in radians, ``(count, cells[0] + 1, cells[1] + 1)``, on the CPU.
    """
    return 2.0 * math.pi * torch.rand(count, cells[0] + 1, cells[1] + 1, generator=generator)


def perlin_noise(size: tuple[int, int], angles: Tensor) -> Tensor:
    """Gradient noise (Perlin, "Improving noise", SIGGRAPH 2002) from given lattice gradients.

    Pixel ``i`` of ``H`` lies at lattice coordinate ``(i + 0.5) / H * cells``.

    Args:
        size: Height and width of the result.
        angles: Gradient directions in radians, ``(N, cells_y + 1, cells_x + 1)``.

    Returns:
        Noise in [-1, 1], ``(N, H, W)``, on the device of ``angles``.
    """
    device = angles.device

    def axis(pixels: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
        at = (torch.arange(pixels, device=device, dtype=torch.float32) + 0.5) * (cells / pixels)
        low = at.floor().clamp_(max=cells - 1)
        offset = at - low
        fade = offset**3 * (offset * (offset * 6.0 - 15.0) + 10.0)
        return low.long(), offset, fade

    row, dy, fade_y = axis(size[0], angles.shape[1] - 1)
    col, dx, fade_x = axis(size[1], angles.shape[2] - 1)
    grad_y, grad_x = angles.sin(), angles.cos()

    def corner(down: int, right: int) -> Tensor:
        pick_y = grad_y[:, row + down][:, :, col + right]
        pick_x = grad_x[:, row + down][:, :, col + right]
        return pick_y * (dy - down)[:, None] + pick_x * (dx - right)

    top = torch.lerp(corner(0, 0), corner(0, 1), fade_x)
    bottom = torch.lerp(corner(1, 0), corner(1, 1), fade_x)
    return torch.lerp(top, bottom, fade_y[:, None]) * math.sqrt(2.0)


def fractal_noise(
    size: tuple[int, int], cells: int, octaves: int, generator: torch.Generator, device: torch.device, count: int = 1
) -> Tensor:
    """Sum of Perlin octaves, each with twice the frequency and half the amplitude of the one before.

    Args:
        size: Height and width of the result.
        cells: Lattice cells along each axis in the coarsest octave.
        octaves: Number of octaves; octaves finer than two pixels a cell are left out.
        generator: CPU generator of the gradients.
        device: Where the noise is computed.
        count: Number of independent fields.

    Returns:
        Noise of about unit range around zero, ``(count, H, W)``.
    """
    total = torch.zeros(count, *size, device=device)
    for octave in range(octaves):
        fine = cells * 2**octave
        angles = lattice_angles(count, (fine, fine), generator)
        if octave and fine * 2 > min(size):
            continue
        total += perlin_noise(size, angles.to(device)) * 0.5**octave
    return total


def smooth_noise(
    size: tuple[int, int], cells: float, generator: torch.Generator, device: torch.device, channels: int = 1
) -> Tensor:
    """Value noise: a random lattice, cubically interpolated. One operation, so cheap enough for every defect.

    Args:
        size: Height and width of the result.
        cells: Features along the longer side.
        generator: CPU generator of the lattice.
        device: Where the noise is computed.
        channels: Number of independent fields.

    Returns:
        Noise of about unit standard deviation at the lattice points, ``(channels, H, W)``.
    """
    longest = max(size)
    lattice = [max(2, round(cells * side / longest) + 1) for side in size]
    values = torch.randn(1, channels, *lattice, generator=generator).to(device)
    return F.interpolate(values, size=size, mode="bicubic", align_corners=True)[0]


def curve_noise(points: int, roughness: float, generator: torch.Generator) -> Tensor:
    """Random curve that starts and ends at zero, as a sum of sine modes (a smoothed Brownian bridge).

    Args:
        points: Number of samples.
        roughness: 0 keeps only the slow bends, 1 gives a Brownian bridge with its kinks.
        generator: CPU generator of the mode amplitudes.

    Returns:
        Offsets of about unit standard deviation in the middle, ``(points,)``, on the CPU.
    """
    modes = torch.arange(1, 33, dtype=torch.float32)
    fall_off = modes ** -(1.0 + 1.5 * (1.0 - roughness))
    amplitude = torch.randn(32, generator=generator) * fall_off
    at = torch.linspace(0.0, math.pi, points)
    return (amplitude[:, None] * torch.sin(modes[:, None] * at)).sum(0)


def soft_edge(distance: Tensor, softness: float = 1.0) -> Tensor:
    """Opacity in [0, 1] of a signed distance: 0.5 on the outline, linear over ``softness`` pixels."""
    return (distance / softness + 0.5).clamp(0.0, 1.0)


def blob_distance(
    ys: Tensor,
    xs: Tensor,
    radius: float,
    rng: random.Random,
    *,
    elongation: float = 1.0,
    angle: float = 0.0,
    roughness: float = 0.2,
) -> Tensor:
    """Signed distance to an irregular closed outline around the origin.

    The outline is an ellipse whose radius is modulated by harmonics with 1/k amplitudes (low-frequency noise on a
    circle). Its area is about ``pi * radius ** 2`` whatever the roughness and elongation.

    Args:
        ys: Row coordinates in pixels, ``(h, 1)``.
        xs: Column coordinates in pixels, ``(1, w)``.
        radius: Radius of the circle of equal area, in pixels.
        rng: Source of the harmonics.
        elongation: Length over width.
        angle: Direction of the long axis, in radians.
        roughness: Relative amplitude of the outline's waves; 0 gives the ellipse.

    Returns:
        Approximate distance in pixels, positive inside, ``(h, w)``.
    """
    order = torch.arange(2, 9, dtype=torch.float32)
    amplitude = torch.tensor([rng.gauss(0.0, 1.0) for _ in range(7)]) * roughness / order.sqrt()
    phase = torch.tensor([rng.uniform(0.0, 2.0 * math.pi) for _ in range(7)])
    turn = torch.linspace(-math.pi, math.pi, 129)
    outline = 1.0 + (amplitude[:, None] * torch.cos(order[:, None] * turn + phase[:, None])).sum(0)
    outline = outline.clamp_(0.35, 2.0)
    outline = outline * (radius / float(outline.square().mean().sqrt()))

    stretch = math.sqrt(elongation)
    along = (math.cos(angle) * xs + math.sin(angle) * ys) / stretch
    across = (math.cos(angle) * ys - math.sin(angle) * xs) * stretch
    rho = torch.hypot(along, across)
    step = (torch.atan2(across, along) * (64.0 / math.pi) + 64.0).clamp_(0.0, 128.0)
    return look_up(outline.to(ys.device), step) - rho


def rectangle_distance(ys: Tensor, xs: Tensor, height: float, width: float, angle: float = 0.0) -> Tensor:
    """Signed distance to a rectangle around the origin (exact inside, Chebyshev outside), ``(h, w)``.

    Args:
        ys: Row coordinates in pixels, ``(h, 1)``.
        xs: Column coordinates in pixels, ``(1, w)``.
        height: Side across ``angle``, in pixels.
        width: Side along ``angle``, in pixels.
        angle: Direction of the width, in radians.
    """
    along = math.cos(angle) * xs + math.sin(angle) * ys
    across = math.cos(angle) * ys - math.sin(angle) * xs
    return torch.minimum(width / 2.0 - along.abs(), height / 2.0 - across.abs())


def stroke_coordinates(
    ys: Tensor, xs: Tensor, start: tuple[float, float], angle: float, length: float, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Position along and signed distance from a curved centre line.

    The centre line is ``start + t * direction + offsets[t] * normal``: a function over a straight axis, so one look-up
    a pixel replaces the distance to every segment of a polyline.

    Args:
        ys: Row coordinates in pixels, ``(h, 1)``.
        xs: Column coordinates in pixels, ``(1, w)``.
        start: Row and column where the stroke begins.
        angle: Direction of the axis, in radians.
        length: Length of the axis in pixels.
        offsets: Centre line beside the axis, in pixels, ``(points,)``, on the device of ``ys``.

    Returns:
        Position in units of ``points - 1`` (unclamped, below 0 before the start) and distance across in pixels with
        its sign, each ``(h, w)``.
    """
    scale = (offsets.numel() - 1) / length
    dy, dx = ys - start[0], xs - start[1]
    along = (math.cos(angle) * dx + math.sin(angle) * dy) * scale
    across = math.cos(angle) * dy - math.sin(angle) * dx
    slope = torch.gradient(offsets)[0] * scale
    at = along.clamp(0.0, offsets.numel() - 1.0)
    # A vertical gap to a steep curve overstates the distance by the secant of the slope.
    gap = (across - look_up(offsets, at)) * look_up(torch.rsqrt(1.0 + slope.square()), at)
    return along, gap


def stroke_distance(position: Tensor, gap: Tensor, half_width: Tensor) -> Tensor:
    """Signed distance to a stroke of varying width, negative beyond both ends.

    Args:
        position: First result of :func:`stroke_coordinates`, ``(h, w)``.
        gap: Second result of :func:`stroke_coordinates`, ``(h, w)``.
        half_width: Half the width along the stroke in pixels, ``(points,)``.
    """
    last = half_width.numel() - 1.0
    inside = look_up(half_width, position.clamp(0.0, last)) - gap.abs()
    beyond = torch.maximum(-position, position - last)
    return torch.where(beyond > 0.0, inside.clamp(max=0.0) - 1.0, inside)


def look_up(table: Tensor, position: Tensor) -> Tensor:
    """Linear interpolation in a table ``(points,)`` at positions in ``[0, points - 1]`` of any shape."""
    low = position.floor().clamp_(max=table.numel() - 2.0)
    index = low.long()
    return torch.lerp(table[index], table[index + 1], position - low)
