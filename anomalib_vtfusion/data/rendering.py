"""A small renderer for flat parts under a camera: relief, colour and gloss in, photograph out.

A part is a :class:`Surface`, maps on a canvas of twice the final size. :func:`shade` lights it by the slope of its
relief, :func:`photograph` adds what a camera adds. Only numpy and Pillow are used, every random number comes from the
generator that is passed in, and lengths are in image widths with the origin in the middle of the image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIZE = 256
"""Height and width of a photograph in pixels."""
SCALE = 2
CANVAS = SIZE * SCALE
LEVEL_STEP = 3
"""Distance between the grey levels of a photograph."""
PIXEL = 1.0 / CANVAS
"""Width of a canvas pixel in image widths."""

Array = npt.NDArray[np.floating[Any]]
Color = tuple[float, float, float]


@lru_cache(maxsize=1)
def coordinates() -> tuple[Array, Array]:
    """Return x and y of every canvas pixel, each ``(CANVAS, CANVAS)`` in [-0.5, 0.5]; y points down."""
    axis = (np.arange(CANVAS, dtype=np.float32) + 0.5) * PIXEL - 0.5
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def pose(rng: np.random.Generator, shift: float, angle: float) -> tuple[Array, Array]:
    """Return part coordinates ``(u, v)`` of a part that lies up to ``shift`` off centre, turned up to ``angle`` rad."""
    dx, dy, turn = rng.uniform(-shift, shift), rng.uniform(-shift, shift), rng.uniform(-angle, angle)
    x, y = coordinates()
    c, s = math.cos(turn), math.sin(turn)
    x, y = x - dx, y - dy
    return c * x + s * y, c * y - s * x


def length(x: Array, y: Array) -> Array:
    """Return the Euclidean length; faster than ``np.hypot``, which guards against overflow that cannot occur here."""
    return np.sqrt(x * x + y * y)


def smoothstep(low: float, high: float, values: Array) -> Array:
    """Return the cubic ramp from 0 at ``low`` to 1 at ``high``; ``low`` may be the larger one."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def inside(distance: Array, softness: float = 1.0) -> Array:
    """Return the coverage in [0, 1] of a shape from its signed ``distance``, negative inside, edge some pixels soft."""
    return np.clip(0.5 - distance / (softness * PIXEL), 0.0, 1.0)


def mix(below: Array, above: Array | float, weight: Array) -> Array:
    """Lay ``above`` over ``below`` with ``weight`` in [0, 1]."""
    return below + (above - below) * weight


def box_distance(u: Array, v: Array, half_width: float, half_height: float, radius: float = 0.0) -> Array:
    """Return the signed distance to a rectangle around the origin with rounded corners."""
    du, dv = np.abs(u) - (half_width - radius), np.abs(v) - (half_height - radius)
    outer = length(np.maximum(du, 0), np.maximum(dv, 0))
    return outer + np.minimum(np.maximum(du, dv), 0) - radius


def resize(values: Array, width: int, height: int) -> Array:
    """Resample a map bicubically."""
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def soften(values: Array, radius: float) -> Array:
    """Blur a map over about ``radius`` image widths, by way of a smaller map."""
    small = min(max(2, round(1.0 / radius)), CANVAS)
    return resize(resize(values, small, small), CANVAS, CANVAS)


def noise(rng: np.random.Generator, cells: int, octaves: int = 1, gain: float = 0.5, stretch: float = 1.0) -> Array:
    """Return smooth noise of mean about 0 and deviation about 1.

    Args:
        rng: Source of the lattice.
        cells: Lumps across the image in the coarsest octave.
        octaves: How many octaves to add, each twice as fine.
        gain: Strength of an octave relative to the one before.
        stretch: How much longer than wide lumps are, along x.

    Returns:
        ``(CANVAS, CANVAS)``.
    """
    total = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    power = 0.0
    for octave in range(octaves):
        rows = min(cells * 2**octave + 3, CANVAS)
        columns = min(max(int(cells * 2**octave / stretch), 1) + 3, CANVAS)
        lattice = rng.standard_normal((rows, columns), dtype=np.float32)
        weight = gain**octave
        total += (weight) * (resize(lattice, CANVAS, CANVAS) if (rows, columns) != total.shape else lattice)
        power += weight**2
    # Bicubic interpolation between independent nodes keeps about half of their variance.
    return total * (1.4 / math.sqrt(power))


def lookup(table: Array, u: Array, v: Array) -> Array:
    """Sample a periodic ``(rows, columns)`` table, linearly along ``u`` (columns) and nearest along ``v`` (rows)."""
    rows, columns = table.shape
    row = np.floor(v).astype(np.int32) % rows
    left = np.floor(u)
    fraction = u - left
    column = left.astype(np.int32) % columns
    flat = table.ravel()
    first = flat[row * columns + column]
    return first + (flat[row * columns + (column + 1) % columns] - first) * fraction


def paint_lines(points: Sequence[tuple[float, float]], widths: Sequence[float]) -> Array:
    """Return the coverage ``(CANVAS, CANVAS)`` in [0, 1] of a line through ``points``.

    Args:
        points: At least two ``(x, y)`` in image widths.
        widths: Width of the line at each point, in image widths.
    """
    over = 2
    canvas = Image.new("L", (CANVAS * over, CANVAS * over))
    draw = ImageDraw.Draw(canvas)
    pixels = [((x + 0.5) * CANVAS * over, (y + 0.5) * CANVAS * over) for x, y in points]
    for start, end, width in zip(pixels, pixels[1:], widths, strict=False):
        wide = max(1, round(width * CANVAS * over))
        draw.line([start, end], fill=255, width=wide)
        draw.ellipse([end[0] - wide / 2, end[1] - wide / 2, end[0] + wide / 2, end[1] + wide / 2], fill=255)
    return np.asarray(canvas.reduce(over), dtype=np.float32) / 255


def blob_distance(
    rng: np.random.Generator, center: tuple[float, float], radius: float, roughness: float, lumps: int = 6
) -> Array:
    """Return the signed distance, roughly, to an irregular patch.

    Args:
        rng: Source of the outline.
        center: Middle of the patch.
        radius: Mean radius.
        roughness: Deviation of the outline relative to ``radius``.
        lumps: Highest number of lobes.
    """
    x, y = coordinates()
    dx, dy = x - center[0], y - center[1]
    angle = np.arctan2(dy, dx)
    outline = np.ones_like(angle)
    for lobes in range(2, lumps + 1):
        strength = rng.normal(0.0, roughness) / math.sqrt(lobes - 1)
        outline += (strength) * np.cos(lobes * angle + (rng.uniform(0, 2 * math.pi)))
    return length(dx, dy) - radius * np.maximum(outline, 0.3)


@dataclass
class Light:
    """A lamp and what surrounds it. ``direction`` is the unit vector towards the lamp, ``ambient`` in [0, 1]."""

    direction: tuple[float, float, float]
    ambient: float
    color: Color
    falloff: tuple[float, float]
    exposure: float


def place_light(rng: np.random.Generator) -> Light:
    """Place a lamp at the upper left, as in every photograph, but never quite in the same place."""
    azimuth = math.radians(225.0 + rng.uniform(-18, 18))
    elevation = math.radians(52.0 + rng.uniform(-6, 6))
    flat = math.cos(elevation)
    warmth = rng.normal(0.0, 0.02)
    return Light(
        direction=(float(flat * math.cos(azimuth)), float(flat * math.sin(azimuth)), float(math.sin(elevation))),
        ambient=float(rng.uniform(0.35, 0.45)),
        color=(1.0 + warmth, 1.0, 1.0 - warmth),
        falloff=(float(rng.uniform(-0.3, 0.05)), float(rng.uniform(-0.3, 0.05))),
        exposure=float(rng.uniform(0.9, 1.1)),
    )


@dataclass
class Surface:
    """What lies under the camera.

    Attributes:
        albedo: ``(CANVAS, CANVAS, 3)``, linear reflectance in [0, 1].
        height: ``(CANVAS, CANVAS)``, relief towards the camera in image widths.
        gloss: ``(CANVAS, CANVAS)``, strength of the highlight, 0 for matte.
        part: ``(CANVAS, CANVAS)``, coverage of the part in [0, 1]; the rest is background.
        shininess: Exponent of the highlight, larger for smaller highlights.
    """

    albedo: Array
    height: Array
    gloss: Array
    part: Array
    shininess: float = 24.0


def cast_shadow(part: Array, light: Light, reach: float, blur: float) -> Array:
    """Return the darkness in [0, 1] of the shadow that ``part`` casts, ``reach`` and ``blur`` in image widths."""
    flat = math.hypot(light.direction[0], light.direction[1])
    dx = round(-light.direction[0] / flat * reach * CANVAS)
    dy = round(-light.direction[1] / flat * reach * CANVAS)
    return np.clip(soften(np.roll(part, (dy, dx), axis=(0, 1)), blur), 0.0, 1.0)


def shade(surface: Surface, light: Light) -> Array:
    """Light a surface: Lambert's law for the colour, Blinn's for the gloss.

    Returns:
        Linear light ``(CANVAS, CANVAS, 3)``, about in [0, 1].
    """
    slope_y, slope_x = np.gradient(surface.height, PIXEL)
    inverse = 1.0 / np.sqrt(1.0 + slope_x**2 + slope_y**2)
    lx, ly, lz = light.direction
    diffuse = np.clip((lz - slope_x * lx - slope_y * ly) * inverse, 0.0, None)
    norm = math.sqrt(lx**2 + ly**2 + (lz + 1.0) ** 2)
    hx, hy, hz = lx / norm, ly / norm, (lz + 1.0) / norm
    facing = np.clip((hz - slope_x * hx - slope_y * hy) * inverse, 0.0, 1.0)
    shine = surface.gloss * np.exp(np.log(facing + 1e-6) * surface.shininess)
    lit = light.ambient + (1.0 - light.ambient) * diffuse
    return surface.albedo * lit[..., None] + shine[..., None]


def shrink(values: Array) -> Array:
    """Average a canvas ``(CANVAS, CANVAS, ...)`` down to ``(SIZE, SIZE, ...)``."""
    rows = values[0::SCALE] + values[1::SCALE]
    total = rows[:, 0::SCALE] + rows[:, 1::SCALE]
    return total / np.float32(SCALE**2)


def photograph(radiance: Array, light: Light, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Take the picture: uneven light, vignetting, slight defocus, white balance, tone curve and sensor noise.

    Args:
        radiance: Linear light ``(CANVAS, CANVAS, 3)``.
        light: Its colour, falloff and exposure.
        rng: Source of defocus and noise.

    Returns:
        RGB ``(SIZE, SIZE, 3)`` in [0, 255].
    """
    image = shrink(radiance)
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - 0.5
    x, y = axis[None, :], axis[:, None]
    field = 1.0 + light.falloff[0] * x + light.falloff[1] * y - 0.28 * (x**2 + y**2)
    image *= (light.exposure * field)[..., None] * np.asarray(light.color, dtype=np.float32)

    defocus = rng.uniform(0.2, 0.5)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    cross = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    image = image * (1.0 - defocus) + cross * (defocus / 4)

    # Shot noise grows with the root of the light; most of it is shared by the channels after demosaicing.
    grain = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    tint = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    level = np.sqrt(np.clip(image, 0.0, 1.0) * 0.7e-4 + 2e-6)
    image = np.clip(image + level * (0.8 * grain + 0.3 * tint), 0.0, None)
    # A soft shoulder keeps highlights from clipping hard.
    image = np.where(image > 0.8, 0.8 + 0.2 * np.tanh((image - 0.8) / 0.2), image)
    # Coarser levels than 255 halve the size of a noisy PNG file and cannot be seen under the noise.
    return (LEVEL_STEP * np.round(255.0 / LEVEL_STEP * image ** (1.0 / 2.2))).astype(np.uint8)
