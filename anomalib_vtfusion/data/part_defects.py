"""Defects on the surface of the demo parts, drawn by hand and apart from the synthesizer that models train with.

If test images were made by the code that makes the training anomalies, a good score would only show that the code
agrees with itself. Each function here changes relief, colour and gloss of a
:class:`~anomalib_vtfusion.data.rendering.Surface` in place, before it is lit, and returns the coverage
``(CANVAS, CANVAS)`` in [0, 1] of what it changed. ``strength`` in (0, 1] goes from hard to see to plain.
"""

import math

import numpy as np

from anomalib_vtfusion.data.rendering import (
    PIXEL,
    Array,
    Color,
    Surface,
    blob_distance,
    coordinates,
    inside,
    mix,
    noise,
    paint_lines,
    smoothstep,
    soften,
)

Points = list[tuple[float, float]]


def _pick_place(surface: Surface, rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """Pick a point of the part that is about ``margin`` image widths from its edge and from that of the image."""
    x, y = coordinates()
    clear = soften(surface.part, margin) * (np.maximum(np.abs(x), np.abs(y)) < 0.5 - margin)
    candidates = np.flatnonzero(clear >= min(0.98, float(clear.max())))
    chosen = int(candidates[rng.integers(len(candidates))])
    return float(x.flat[chosen]), float(y.flat[chosen])


def _wander(
    rng: np.random.Generator, start: tuple[float, float], length: float, step: float, bend: float, jag: float = 0.0
) -> Points:
    """Walk ``length`` past ``start`` in steps of ``step``, turning by ``bend`` rad a step and zigzagging by ``jag``."""
    heading = rng.uniform(0, 2 * math.pi)
    turning = rng.normal(0.0, bend)
    x, y = start[0] - 0.5 * length * math.cos(heading), start[1] - 0.5 * length * math.sin(heading)
    points = [(x, y)]
    for _ in range(max(2, round(length / step))):
        turning = 0.8 * turning + rng.normal(0.0, 0.4 * bend)
        heading += turning
        zigzag = heading + rng.normal(0.0, jag)
        x, y = x + step * math.cos(zigzag), y + step * math.sin(zigzag)
        points.append((x, y))
    return points


def _paint(surface: Surface, color: Array | Color, weight: Array) -> None:
    """Lay an opaque colour over the surface where ``weight`` is 1."""
    surface.albedo = mix(surface.albedo, np.asarray(color, dtype=np.float32), weight[..., None])


def scratch(surface: Surface, rng: np.random.Generator, strength: float, bright: Color = (0.75, 0.75, 0.73)) -> Array:
    """Score the surface one to three times with something hard: a groove, and fresh material of colour ``bright``."""
    place = _pick_place(surface, rng, 0.05)
    width = (1.2 + 2.6 * strength) * PIXEL
    length = 0.10 + 0.30 * strength * rng.uniform(0.7, 1.0)
    first = _wander(rng, place, length, 0.012, 0.02)
    groove = np.zeros_like(surface.part)
    for line in range(1 + int(strength > 0.5) + int(strength > 0.85)):
        shift = 0.014 * line * rng.uniform(0.6, 1.4)
        points = [(x + shift, y - 0.6 * shift) for x, y in first[int(line * len(first) / 6) :]]
        # Pressure rises and falls along the stroke.
        pressure = np.sin(np.linspace(0.25, math.pi - 0.15, len(points)))
        groove = np.maximum(groove, paint_lines(points, (width * np.maximum(pressure, 0.35)).tolist()))
    groove *= surface.part
    surface.height = surface.height - (0.0012 + 0.0022 * strength) * groove
    fresh = 0.25 + 0.65 * strength
    _paint(surface, bright, fresh * groove)
    surface.gloss = surface.gloss * (1.0 - 0.5 * groove)
    return groove


def crack(surface: Surface, rng: np.random.Generator, strength: float, depth: Color = (0.012, 0.011, 0.010)) -> Array:
    """Break the material: a dark jagged gap of colour ``depth`` that thins out, with branches when strong."""
    place = _pick_place(surface, rng, 0.05)
    length = 0.14 + 0.38 * strength
    trunk = _wander(rng, place, length, 0.014, 0.05, 0.75)
    wide = (1.8 + 3.4 * strength) * PIXEL
    gap = paint_lines(trunk, np.linspace(wide, 0.6 * PIXEL, len(trunk)).tolist())
    for _ in range(int(strength > 0.4) + int(strength > 0.7)):
        fork = trunk[int(rng.integers(len(trunk) // 4, 3 * len(trunk) // 4))]
        branch = _wander(rng, fork, 0.4 * length, 0.012, 0.05, 0.8)
        # The walk is centred on its start; a branch begins there.
        dx, dy = fork[0] - branch[0][0], fork[1] - branch[0][1]
        points = [(x + dx, y + dy) for x, y in branch]
        gap = np.maximum(gap, paint_lines(points, np.linspace(0.6 * wide, 0.5 * PIXEL, len(points)).tolist()))
    gap *= surface.part
    surface.height = surface.height - 0.003 * gap
    _paint(surface, depth, (0.55 + 0.42 * strength) * gap)
    surface.gloss = surface.gloss * (1.0 - gap)
    return gap


def pit(surface: Surface, rng: np.random.Generator, strength: float, raw: float = 0.55) -> Array:
    """Chip out one to three bowls; their raw ground has ``raw`` times the brightness of the surface."""
    total = np.zeros_like(surface.part)
    for _ in range(int(rng.integers(1, 4))):
        radius = (0.012 + 0.022 * strength) * rng.uniform(0.8, 1.2)
        distance = blob_distance(rng, _pick_place(surface, rng, 0.06), radius, 0.10, 7)
        bowl = inside(distance, 2.0) * surface.part
        surface.height = surface.height - 0.7 * radius * smoothstep(0.0, -radius, distance)
        ground = raw * (1.0 + 0.25 * noise(rng, 110))
        weight = (0.45 + 0.5 * strength) * bowl
        surface.albedo = surface.albedo * (1.0 + (ground - 1.0) * weight)[..., None]
        surface.gloss = surface.gloss * (1.0 - bowl)
        total = np.maximum(total, bowl)
    return total


def stain(surface: Surface, rng: np.random.Generator, strength: float, tint: Color = (0.42, 0.23, 0.10)) -> Array:
    """Let something dry on the surface: a patch that lets ``tint`` of the light through, darker at its rim."""
    radius = (0.035 + 0.055 * strength) * rng.uniform(0.85, 1.15)
    distance = blob_distance(rng, _pick_place(surface, rng, 0.09), radius, 0.13)
    distance = distance + 0.006 * noise(rng, 26, 2)
    patch = smoothstep(0.006, -0.006, distance) * surface.part
    rim = np.exp(-((distance + 0.008) ** 2) / (2 * 0.006**2))
    cloud = np.clip(0.75 + 0.25 * noise(rng, 14, 3), 0.3, 1.2)
    weight = np.clip(patch * (0.28 + 0.62 * strength) * (cloud + 0.4 * rim), 0.0, 1.0)
    surface.albedo = surface.albedo * (1.0 + (np.asarray(tint, np.float32) - 1.0) * weight[..., None])
    surface.gloss = surface.gloss * (1.0 - 0.7 * weight)
    return patch


def hole(surface: Surface, rng: np.random.Generator, strength: float, below: Color = (0.015, 0.014, 0.016)) -> Array:
    """Wear or burn a hole through cloth: dark ``below``, frayed light ends around it."""
    radius = (0.012 + 0.030 * strength) * rng.uniform(0.9, 1.1)
    center = _pick_place(surface, rng, 0.08)
    distance = blob_distance(rng, center, radius, 0.12) + 0.004 * noise(rng, 60, 2)
    open_ = inside(distance, 4.0)
    frayed = smoothstep(0.012, 0.0, distance)
    surface.height = surface.height * (1.0 - frayed) - 0.01 * open_
    _paint(surface, (0.30, 0.31, 0.32), 0.45 * frayed * (0.5 + 0.5 * (noise(rng, 150) > 0)).astype(np.float32))
    _paint(surface, below, (0.55 + 0.4 * strength) * open_)
    for _ in range(int(2 + 3 * strength)):
        turn = rng.uniform(0, 2 * math.pi)
        reach = rng.uniform(0.45, 0.8)
        end = center[0] + 1.05 * radius * math.cos(turn), center[1] + 1.05 * radius * math.sin(turn)
        tip = center[0] + reach * radius * math.cos(turn + 0.4), center[1] + reach * radius * math.sin(turn + 0.4)
        loose = paint_lines([end, tip], [3.0 * PIXEL] * 2)
        _paint(surface, (0.36, 0.36, 0.34), 0.8 * loose)
    return np.maximum(open_, (frayed > 0.3).astype(np.float32))


def fiber(surface: Surface, rng: np.random.Generator, strength: float, color: Color = (0.02, 0.02, 0.025)) -> Array:
    """Drop a hair or thread of ``color`` on the surface, with the thin shadow that it casts."""
    place = _pick_place(surface, rng, 0.05)
    points = _wander(rng, place, 0.10 + 0.32 * strength, 0.010, 0.22)
    width = (1.4 + 2.6 * strength) * PIXEL
    strand = paint_lines(points, [width] * len(points))
    shadow = paint_lines([(x + 0.004, y + 0.004) for x, y in points], [1.5 * width] * len(points))
    surface.albedo = surface.albedo * (1.0 - 0.35 * shadow)[..., None]
    surface.height = surface.height + 0.5 * width * soften(strand, 2 * PIXEL)
    _paint(surface, color, (0.5 + 0.45 * strength) * strand)
    surface.gloss = surface.gloss * (1.0 - strand)
    return np.maximum(strand, 0.9 * shadow)


def chips(surface: Surface, rng: np.random.Generator, strength: float, color: Color = (0.62, 0.62, 0.60)) -> Array:
    """Scatter a few splinters of ``color`` on the surface: faceted lumps, each with its shadow."""
    total = np.zeros_like(surface.part)
    for _ in range(1 + int(3 * strength * rng.uniform(0.5, 1.0))):
        x, y = _pick_place(surface, rng, 0.06)
        radius = (0.010 + 0.014 * strength) * rng.uniform(0.7, 1.2)
        distance = blob_distance(rng, (x, y), radius, 0.22, 5)
        lump = inside(distance, 1.5)
        fall = round(0.006 / PIXEL)
        shadow = inside(np.roll(distance, (fall, fall), axis=(0, 1)), 5.0)
        surface.albedo = surface.albedo * (1.0 - 0.6 * shadow * (1.0 - lump))[..., None]
        facets = 1.0 + 0.25 * noise(rng, 60)
        _paint(surface, np.asarray(color, np.float32) * facets[..., None], (0.4 + 0.6 * strength) * lump)
        surface.height = surface.height + lump * (0.3 * radius + 0.002 * noise(rng, 50))
        surface.gloss = mix(surface.gloss, 0.12, lump)
        total = np.maximum(total, np.maximum(lump, 0.8 * shadow))
    return total
