"""Defects drawn onto the surface: strokes (scratch, crack) and blobs (stain, hole, spot)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomalib_vtfusion.synthesis.masks import (
    blob_distance,
    curve_noise,
    smooth_noise,
    soft_edge,
    stroke_coordinates,
    stroke_distance,
)
from anomalib_vtfusion.synthesis.scene import Change, Crop, Scene

POINTS = 65
"""Samples along a stroke."""


def scratch(scene: Scene) -> Change:
    """Thin, nearly straight groove: a core of varying width and intensity, one bright and one dark rim."""
    rng, strength = scene.rng, scene.params.strength
    width = min(max(1.0, math.sqrt(scene.area / 28.0)), max(1.5, 0.014 * scene.side))
    length = min(max(6.0, scene.area / width), 0.9 * scene.side)
    bend = length * rng.uniform(0.0, 0.06)
    offsets = bend * curve_noise(POINTS, 0.15, scene.generator)
    angle = scene.params.angle
    crop, start = _stroke_crop(scene, angle, length, bend * 2.0 + width * 2.0)
    device = scene.image.device
    position, gap = stroke_coordinates(crop.ys, crop.xs, start, angle, length, offsets.to(device))

    taper = torch.linspace(0.0, math.pi, POINTS).sin().pow(0.35)
    wobble = 1.0 + 0.35 * curve_noise(POINTS, 0.8, scene.generator)
    half_width = (0.5 * width * taper * wobble.clamp(0.3, 1.6)).to(device)
    core = soft_edge(stroke_distance(position, gap, half_width))
    pressure = (0.8 + 0.5 * curve_noise(POINTS, 0.7, scene.generator)).clamp(0.15, 1.0)
    core = core * _along(pressure.to(device), position)
    side = 1.0 if rng.random() < 0.5 else -1.0
    rim = soft_edge(stroke_distance(position, gap - side * (0.5 * width + 0.7), half_width))
    rim = rim * _along(pressure.to(device), position)

    contrast = 0.75 * strength
    sign = -1.0 if scene.darkens(0.45) else 1.0
    pixels = crop.pixels + contrast * (sign * core * (1.0 + scene.tint(0.1)) - 0.35 * sign * rim * (1.0 - core))
    return Change(crop, pixels.clamp(0.0, 1.0), torch.maximum(core, rim).gt(0.0).float())


def crack(scene: Scene) -> Change:
    """Jagged, branching dark line with a faint bright lip."""
    rng, strength = scene.rng, scene.params.strength
    width = min(max(1.1, math.sqrt(scene.area / 40.0)), max(1.6, 0.012 * scene.side))
    length = min(max(8.0, 0.6 * scene.area / width), 0.8 * scene.side)
    device = scene.image.device
    angle = scene.params.angle
    main = length * rng.uniform(0.06, 0.12) * curve_noise(POINTS, 0.75, scene.generator)
    crop, start = _stroke_crop(scene, angle, length, 0.35 * length)
    taper = torch.linspace(0.0, math.pi, POINTS).sin().pow(0.5)

    strokes = [(start, angle, length, main, width * taper)]
    for _ in range(rng.randint(1, 4)):
        root = rng.randrange(8, POINTS - 12)
        along, across = length * root / (POINTS - 1), float(main[root])
        origin = (
            start[0] + along * math.sin(angle) + across * math.cos(angle),
            start[1] + along * math.cos(angle) - across * math.sin(angle),
        )
        turn = rng.choice((-1.0, 1.0)) * rng.uniform(0.4, 1.1)
        reach = length * rng.uniform(0.12, 0.35)
        offsets = reach * 0.1 * curve_noise(POINTS, 0.75, scene.generator)
        shrink = torch.linspace(0.75, 0.15, POINTS)
        strokes.append((origin, angle + turn, reach, offsets, width * shrink))

    distance = torch.full(crop.size, -1e3, device=device)
    for origin, heading, reach, offsets, thickness in strokes:
        position, gap = stroke_coordinates(crop.ys, crop.xs, origin, heading, reach, offsets.to(device))
        wobble = (1.0 + 0.5 * curve_noise(POINTS, 0.9, scene.generator)).clamp(0.35, 1.7)
        half_width = (0.5 * thickness * wobble).to(device)
        distance = torch.maximum(distance, stroke_distance(position, gap, half_width))
    core = soft_edge(distance, 1.2)
    lip = soft_edge(distance + 1.3, 1.5) * (1.0 - core)
    dark = crop.pixels * (1.0 - min(1.0, 1.1 * strength))
    pixels = torch.lerp(crop.pixels, dark, core) + 0.12 * strength * lip
    return Change(crop, pixels.clamp(0.0, 1.0), torch.maximum(core, lip).gt(0.0).float())


def stain(scene: Scene) -> Change:
    """Semi-transparent coloured (on grey images: dark or light) patch with an uneven body and a dried rim."""
    rng, strength = scene.rng, scene.params.strength
    crop, distance = _blob(scene, roughness=rng.uniform(0.15, 0.4))
    radius = scene.radius
    body = soft_edge(distance, max(1.5, rng.uniform(0.08, 0.5) * radius))
    ring = torch.exp(-((distance - 0.06 * radius).abs() / max(1.0, 0.1 * radius))) * body
    patchy = smooth_noise(crop.size, rng.uniform(3.0, 7.0), scene.generator, scene.image.device)[0]
    density = (body * (0.75 + 0.22 * patchy) + rng.uniform(0.0, 0.4) * ring).clamp(0.0, 1.0)
    paint = _paint(scene)
    if rng.random() < 0.6:  # a film that lets the texture through: multiply
        paint = crop.pixels * (0.25 + 0.75 * paint) if scene.luma > 0.25 else 0.5 * (crop.pixels + paint)
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
    pixels = _paint(scene).expand_as(crop.pixels)
    return Change(crop, pixels, opacity * min(1.0, 1.2 * strength))


def hole(scene: Scene) -> Change:
    """Pit: dark interior, deeper on the side away from the light, and a bright rim on the lit side."""
    rng, strength = scene.rng, scene.params.strength
    crop, distance = _blob(scene, roughness=rng.uniform(0.08, 0.25))
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
    lit = rim * (0.25 * facing.clamp(-1.0, 1.0) + 0.05)
    pixels = torch.lerp(crop.pixels + lit, interior, inside)
    opacity = torch.maximum(inside, (rim > 0.05).float()) * min(1.0, 1.2 * strength)
    return Change(crop, pixels.clamp(0.0, 1.0), opacity)


def _blob(scene: Scene, roughness: float) -> tuple[Crop, Tensor]:
    """Crop and signed distance of a blob of the wanted area."""
    elongation = scene.params.elongation
    reach = scene.radius * (1.4 + roughness) * math.sqrt(elongation) + 3.0
    crop = scene.crop(reach, reach)
    distance = blob_distance(
        crop.ys,
        crop.xs,
        scene.radius,
        scene.rng,
        elongation=elongation,
        angle=scene.params.angle,
        roughness=roughness,
    )
    return crop, distance


def _paint(scene: Scene) -> Tensor:
    """Colour of a deposit, ``(3, 1, 1)``: dirt, rust, oil, ink or bright residue; grey on grey images."""
    dark = scene.darkens(0.65)
    if scene.grey:
        value = scene.rng.uniform(0.0, 0.18) if dark else scene.rng.uniform(0.8, 1.0)
        return torch.full((3, 1, 1), value, device=scene.image.device)
    darks = ((0.22, 0.14, 0.08), (0.45, 0.22, 0.08), (0.1, 0.1, 0.1), (0.05, 0.2, 0.35), (0.6, 0.05, 0.08))
    lights = ((0.95, 0.95, 0.92), (0.9, 0.85, 0.65), (0.75, 0.82, 0.95), (0.85, 0.25, 0.2), (0.3, 0.7, 0.4))
    base = scene.rng.choice(darks if dark else lights)
    return (torch.tensor(base, device=scene.image.device).view(3, 1, 1) + scene.tint(0.08)).clamp(0.0, 1.0)


def _along(table: Tensor, position: Tensor) -> Tensor:
    """Value of a per-point table at the nearest point of a stroke."""
    return table[position.round().clamp(0, table.numel() - 1).long()]


def _stroke_crop(scene: Scene, angle: float, length: float, margin: float) -> tuple[Crop, tuple[float, float]]:
    """Crop that holds a stroke centred on the defect, and where the stroke starts."""
    rise, run = 0.5 * length * math.sin(angle), 0.5 * length * math.cos(angle)
    crop = scene.crop(abs(rise) + margin + 3.0, abs(run) + margin + 3.0)
    return crop, (-rise, -run)
