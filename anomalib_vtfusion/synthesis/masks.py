"""Shapes of defects: noise fields, blobs, rectangles and strokes as pure functions.

Blobs, rectangles and strokes are returned as *signed distances* in pixels, positive inside. A distance serves the
anti-aliased edge (:func:`soft_edge`), the rim and the shading of a defect alike, which a binary mask could not.
Scalars come from ``random.Random``, noise tensors from CPU generators, so a seed gives the same shape on any device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

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
    # Noise without detail finer than a few pixels loses nothing by being drawn smaller and enlarged.
    working = (min(size[0], 64), min(size[1], 64))
    total = torch.zeros(count, *working, device=device)
    for octave in range(octaves):
        fine = cells * 2**octave
        angles = lattice_angles(count, (fine, fine), generator)
        if octave and fine * 2 > min(working):
            continue
        total += perlin_noise(working, angles.to(device)) * 0.5**octave
    return total if working == size else F.interpolate(total[None], size=size, mode="bilinear")[0]


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

    The outline is an ellipse whose radius is modulated by harmonics of falling amplitude (low-frequency noise on a
    circle). Its area is about ``pi * radius ** 2`` whatever the roughness and elongation.

    Args:
        ys: Row coordinates in pixels, ``(h, 1)``.
        xs: Column coordinates in pixels, ``(1, w)``.
        radius: Radius of the circle of equal area, in pixels.
        rng: Source of the harmonics' phases.
        elongation: Length over width.
        angle: Direction of the long axis, in radians.
        roughness: Amplitude of the outline's waves; 0 gives the ellipse, 0.5 a ragged patch.

    Returns:
        Approximate distance in pixels, positive inside, ``(h, w)``.
    """
    order = torch.arange(2, 14, dtype=torch.float32)
    # Fixed amplitudes and free phases: with free amplitudes one wave may dominate, and blobs become clover leaves.
    amplitude = roughness * order**-1.4
    phase = torch.tensor([rng.uniform(0.0, 2.0 * math.pi) for _ in range(len(order))])
    turn = torch.linspace(-math.pi, math.pi, 129)
    outline = 1.0 + (amplitude[:, None] * torch.cos(order[:, None] * turn + phase[:, None])).sum(0)
    outline = outline.clamp_(0.5, 1.6)
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


@dataclass(frozen=True)
class Stroke:
    """Curved line of varying width, described over a straight axis.

    The centre line is ``start + t * direction + offsets[t] * normal``; as a function over an axis it needs one look-up
    a pixel instead of a distance to every segment of a polyline. All tables have the same length and lie on the CPU.

    Attributes:
        start: Row and column where the axis begins, in pixels.
        angle: Direction of the axis, in radians.
        length: Length of the axis, in pixels.
        offsets: Centre line beside the axis, in pixels, ``(points,)``.
        half_width: Half the width along the stroke, in pixels, ``(points,)``.
        pressure: Intensity along the stroke, in [0, 1], ``(points,)``.
    """

    start: tuple[float, float]
    angle: float
    length: float
    offsets: Tensor
    half_width: Tensor
    pressure: Tensor

    def at(self, fraction: float) -> tuple[float, float]:
        """Row and column of the centre line at a fraction of the length."""
        along = fraction * self.length
        across = float(self.offsets[round(fraction * (self.offsets.numel() - 1))])
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.start[0] + along * sin + across * cos, self.start[1] + along * cos - across * sin


def stroke_distance(ys: Tensor, xs: Tensor, stroke: Stroke, shifts: Sequence[float] = (0.0,)) -> tuple[Tensor, Tensor]:
    """Signed distance to a stroke, and to copies of it moved sideways.

    Args:
        ys: Row coordinates in pixels, ``(h, 1)``.
        xs: Column coordinates in pixels, ``(1, w)``.
        stroke: The stroke.
        shifts: Sideways moves in pixels.

    Returns:
        Distances in pixels, positive inside, ``(len(shifts), h, w)``, and the pressure at each pixel, ``(h, w)``.
    """
    scale = (stroke.offsets.numel() - 1) / stroke.length
    # A vertical gap to a steep curve overstates the distance by the secant of the slope.
    secant = torch.rsqrt(1.0 + (torch.gradient(stroke.offsets)[0] * scale).square())
    tables = torch.stack([stroke.offsets, secant, stroke.half_width, stroke.pressure]).to(ys.device)
    cos, sin = math.cos(stroke.angle), math.sin(stroke.angle)
    dy, dx = ys - stroke.start[0], xs - stroke.start[1]
    along, across = cos * dx + sin * dy, cos * dy - sin * dx
    nearest = (along * scale).round_().clamp_(0, stroke.offsets.numel() - 1).long()
    offset, straighten, half_width, pressure = tables[:, nearest]
    gap = (across - offset) * straighten
    beyond = (along - stroke.length / 2.0).abs_().sub_(stroke.length / 2.0).clamp_(min=0.0)
    distance = torch.stack([half_width - (gap - shift).abs() - beyond for shift in shifts])
    return distance, pressure


def look_up(table: Tensor, position: Tensor) -> Tensor:
    """Linear interpolation in a table ``(points,)`` at positions in ``[0, points - 1]`` of any shape."""
    low = position.floor().clamp_(max=table.numel() - 2.0)
    index = low.long()
    return torch.lerp(table[index], table[index + 1], position - low)
