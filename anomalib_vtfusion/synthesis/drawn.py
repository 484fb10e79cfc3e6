"""Defects drawn onto the surface: strokes (scratch, crack) and blobs (stain, hole, spot)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomalib_vtfusion.synthesis.masks import (
    Stroke,
    blob_distance,
    curve_noise,
    smooth_noise,
    soft_edge,
    stroke_distance,
)
from anomalib_vtfusion.synthesis.scene import Change, Crop, Scene

POINTS = 257
"""Samples along a stroke: finer than a pixel on crops of common size."""


def scratch(scene: Scene) -> Change:
    """Nearly straight groove, or a few side by side: a core of varying width and pressure with a rim in the light."""
    rng, strength = scene.rng, scene.params.strength
    strands = rng.choice((1, 1, 1, 2, 3))
    area = scene.area / strands
    width = min(max(1.0, math.sqrt(area / 40.0)), max(1.3, 0.009 * scene.side))
    length = min(max(6.0, area / width), 0.8 * scene.side)
    spacing = rng.uniform(1.5, 5.0) * width + 1.0
    bend = length * rng.uniform(0.0, 0.05)
    centre_line = bend * curve_noise(POINTS, 0.1, scene.generator)
    margin = 2.5 * bend + (strands + 1) * spacing
    crop, start = _stroke_crop(scene, length, margin)
    lit_side = rng.choice((-1.0, 1.0)) * (0.5 * width + 0.8)

    core, rim = torch.zeros(2, *crop.size, device=scene.image.device)
    for strand in range(strands):
        stroke = _groove(scene, start, length, centre_line + strand * spacing, width)
        distance, pressure = stroke_distance(crop.ys, crop.xs, stroke, (0.0, lit_side))
        core_here, rim_here = soft_edge(distance) * pressure
        core, rim = torch.maximum(core, core_here), torch.maximum(rim, rim_here)

    contrast = strength * (0.3 + 0.45 * min(1.0, 2.0 * scene.luma))
    sign = -1.0 if scene.darkens(0.45) else 1.0
    relief = sign * core * (1.0 + scene.tint(0.08)) - 0.3 * sign * rim * (1.0 - core)
    pixels = (crop.pixels + contrast * relief).clamp(0.0, 1.0)
    return Change(crop, pixels, torch.maximum(core, rim).gt(0.0).float())


def crack(scene: Scene) -> Change:
    """Jagged, branching dark line with a faint bright lip."""
    rng, strength = scene.rng, scene.params.strength
    width = min(max(1.0, math.sqrt(scene.area / 60.0)), max(1.4, 0.009 * scene.side))
    length = min(max(8.0, 0.6 * scene.area / width), 0.8 * scene.side)
    wander = rng.uniform(0.04, 0.09) * length
    crop, start = _stroke_crop(scene, length, 0.25 * length)
    trunk = _fissure(scene, start, scene.params.angle, length, wander, width * torch.linspace(1.0, 0.5, POINTS))
    strokes = [trunk]
    for _ in range(rng.choice((0, 1, 1, 2, 3, 4))):
        parent = rng.choice(strokes)
        heading = parent.angle + rng.choice((-1.0, 1.0)) * rng.uniform(0.35, 1.0)
        reach = parent.length * rng.uniform(0.15, 0.4)
        thin = 2.0 * float(parent.half_width.mean()) * torch.linspace(0.8, 0.3, POINTS)
        strokes.append(_fissure(scene, parent.at(rng.uniform(0.15, 0.85)), heading, reach, 0.07 * reach, thin))

    distance = torch.full(crop.size, -10.0, device=scene.image.device)
    for stroke in strokes:
        window = _window_of(stroke, crop)
        here, _ = stroke_distance(crop.ys[window[0]], crop.xs[:, window[1]], stroke)
        distance[window] = torch.maximum(distance[window], here[0])
    core = soft_edge(distance, 1.3)
    lip = soft_edge(distance + 1.4, 1.6) * (1.0 - core)
    dark = crop.pixels * (1.0 - 0.95 * min(1.0, 1.15 * strength))
    pixels = torch.lerp(crop.pixels, dark, core) + 0.1 * strength * lip
    return Change(crop, pixels.clamp(0.0, 1.0), torch.maximum(core, lip).gt(0.0).float())


def stain(scene: Scene) -> Change:
    """Semi-transparent coloured (on grey images: dark or light) patch with an uneven body and a dried rim."""
    rng, strength = scene.rng, scene.params.strength
    crop, distance = scene.blob(scene.radius, roughness=rng.uniform(0.3, 0.8))
    radius = scene.radius
    frayed = smooth_noise(crop.size, 0.2 * max(crop.size), scene.generator, scene.image.device)[0]
    distance = distance + min(2.0, 0.08 * radius) * frayed
    body = soft_edge(distance, max(1.5, rng.uniform(0.05, 0.5) * radius))
    ring = torch.exp(-((distance - 0.08 * radius).abs() / max(1.0, 0.08 * radius))) * body
    patchy = smooth_noise(crop.size, rng.uniform(3.0, 7.0), scene.generator, scene.image.device)[0]
    density = (body * (0.7 + 0.2 * patchy) + rng.uniform(0.0, 0.4) * ring).clamp(0.0, 1.0)
    paint, paint_luma = _paint(scene)
    if rng.random() < 0.65:  # a film lets the texture through, a deposit covers it
        dark = paint_luma < scene.luma
        paint = crop.pixels * (0.3 + 0.7 * paint) if dark else 0.5 * (crop.pixels + paint)
    return Change(crop, paint.expand_as(crop.pixels).clamp(0.0, 1.0), density * min(1.0, 1.1 * strength))


def spot(scene: Scene) -> Change:
    """One or a few small round dots, dark, light or coloured."""
    rng, strength = scene.rng, scene.params.strength
    count = rng.choice((1, 1, 2, 3, 5))
    radius = max(0.9, min(scene.radius, 0.06 * scene.side) / math.sqrt(count))
    scatter = 0.0 if count == 1 else 3.5 * radius
    crop = scene.crop(scatter + 2.0 * radius + 2.0, scatter + 2.0 * radius + 2.0)
    opacity = torch.zeros(crop.size, device=scene.image.device)
    for _ in range(count):
        dy, dx = rng.uniform(-scatter, scatter), rng.uniform(-scatter, scatter)
        size = radius * rng.uniform(0.6, 1.2)
        distance = blob_distance(
            crop.ys - dy, crop.xs - dx, size, rng, elongation=rng.uniform(1.0, 1.4), angle=dy, roughness=0.1
        )
        opacity = torch.maximum(opacity, soft_edge(distance, 1.0 + 0.4 * size))
    pixels = _paint(scene)[0].expand_as(crop.pixels)
    return Change(crop, pixels, opacity * min(1.0, 1.2 * strength))


def hole(scene: Scene) -> Change:
    """Pit: dark interior, deeper on the side away from the light, and a bright rim on the lit side."""
    rng, strength = scene.rng, scene.params.strength
    crop, distance = scene.blob(scene.radius, roughness=rng.uniform(0.1, 0.6))
    radius = scene.radius
    light = rng.uniform(-math.pi, math.pi)
    facing = (math.sin(light) * crop.ys + math.cos(light) * crop.xs) / max(1.0, radius)
    inside = soft_edge(distance, 1.4)
    wall = torch.exp(-distance.clamp(min=0.0) / max(0.8, 0.22 * radius))
    grain = smooth_noise(crop.size, 8.0, scene.generator, scene.image.device)[0]
    around = crop.pixels.mean((1, 2), keepdim=True)
    depth = (0.16 + 0.18 * wall * (0.5 + 0.5 * facing) + 0.05 * grain).clamp(0.0, 1.0)
    interior = around * depth * rng.uniform(0.6, 1.2)
    rim = torch.exp(-(distance + 1.0).abs() / max(0.7, 0.1 * radius)) * (1.0 - inside)
    lit = rim * 0.2 * facing.clamp(-0.6, 1.0)
    pixels = torch.lerp(crop.pixels + lit, interior, inside)
    opacity = torch.maximum(inside, (rim > 0.05).float()) * min(1.0, 1.2 * strength)
    return Change(crop, pixels.clamp(0.0, 1.0), opacity)


def _paint(scene: Scene) -> tuple[Tensor, float]:
    """Colour of a deposit, ``(3, 1, 1)``, and its luminance: dirt, rust, oil, ink or bright residue; grey on grey."""
    dark = scene.darkens(0.65)
    if scene.grey:
        value = scene.rng.uniform(0.0, 0.18) if dark else scene.rng.uniform(0.8, 1.0)
        return torch.full((3, 1, 1), value, device=scene.image.device), value
    darks = ((0.22, 0.14, 0.08), (0.45, 0.22, 0.08), (0.1, 0.1, 0.1), (0.05, 0.2, 0.35), (0.6, 0.05, 0.08))
    lights = ((0.95, 0.95, 0.92), (0.9, 0.85, 0.65), (0.75, 0.82, 0.95), (0.85, 0.25, 0.2), (0.3, 0.7, 0.4))
    base = scene.rng.choice(darks if dark else lights)
    paint = torch.tensor(base, device=scene.image.device).view(3, 1, 1) + scene.tint(0.08)
    return paint.clamp(0.0, 1.0), sum(base) / 3.0


def _groove(scene: Scene, start: tuple[float, float], length: float, offsets: Tensor, width: float) -> Stroke:
    """Stroke of a scratch: pointed ends, pressure that comes and goes."""
    rng = scene.rng
    begin, end = rng.uniform(0.0, 0.15), rng.uniform(0.85, 1.0)
    at = ((torch.linspace(0.0, 1.0, POINTS) - begin) / (end - begin)).clamp(0.0, 1.0)
    taper = (math.pi * at).sin().clamp(min=0.0).pow(0.5)
    wobble = (1.0 + 0.4 * curve_noise(POINTS, 0.7, scene.generator)).clamp(0.4, 1.5)
    pressure = (0.75 + 0.6 * curve_noise(POINTS, 0.6, scene.generator)).clamp(0.2, 1.0) * taper.sqrt()
    angle = scene.params.angle + rng.uniform(-0.02, 0.02)
    return Stroke(start, angle, length, offsets, 0.5 * width * taper * wobble, pressure)


def _fissure(
    scene: Scene, start: tuple[float, float], angle: float, length: float, wander: float, width: Tensor
) -> Stroke:
    """Stroke of a crack: a jagged centre line, ragged width, a pointed end."""
    offsets = wander * curve_noise(POINTS, 0.7, scene.generator)
    ragged = (1.0 + 0.6 * curve_noise(POINTS, 0.9, scene.generator)).clamp(0.35, 1.6)
    tip = (torch.linspace(1.0, 0.0, POINTS) * 6.0).clamp(max=1.0)
    return Stroke(start, angle, length, offsets, 0.5 * width * ragged * tip, torch.ones(POINTS))


def _stroke_crop(scene: Scene, length: float, margin: float) -> tuple[Crop, tuple[float, float]]:
    """Crop that holds a stroke centred on the defect, and where the stroke starts."""
    angle = scene.params.angle
    rise, run = 0.5 * length * math.sin(angle), 0.5 * length * math.cos(angle)
    crop = scene.crop(abs(rise) + margin + 3.0, abs(run) + margin + 3.0)
    return crop, (-rise, -run)


def _window_of(stroke: Stroke, crop: Crop) -> tuple[slice, slice]:
    """Part of the crop that a stroke can touch, so that a small branch costs little."""
    margin = float(stroke.offsets.abs().max() + stroke.half_width.max()) + 5.0
    end = stroke.at(1.0)

    def span(first: float, last: float, origin: float, size: int) -> slice:
        low, high = min(first, last) - margin - origin, max(first, last) + margin - origin
        return slice(min(size - 1, max(0, int(low))), max(1, min(size, int(high) + 2)))

    rows = span(stroke.start[0], end[0], crop.origin[0], crop.size[0])
    return rows, span(stroke.start[1], end[1], crop.origin[1], crop.size[1])
