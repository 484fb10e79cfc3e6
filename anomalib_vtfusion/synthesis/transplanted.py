"""Defects made of texture from elsewhere: Perlin blend, CutPaste, scar, Poisson-blended patch.

Sources: DRAEM (Zavrtanik et al., ICCV 2021) for Perlin masks, CutPaste and CutPaste-Scar (Li et al., CVPR 2021), NSA
(Schlueter et al., ECCV 2022) for Poisson-blended patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomalib_vtfusion.synthesis.masks import fractal_noise, rectangle_distance, soft_edge
from anomalib_vtfusion.synthesis.poisson import poisson_blend
from anomalib_vtfusion.synthesis.scene import Change, Crop, Scene


def perlin(scene: Scene) -> Change:
    """Foreign texture inside islands of thresholded fractal noise."""
    reach = 2.0 * scene.radius + 2.0
    crop = scene.crop(reach, reach)
    cells = scene.rng.choice((2, 3, 4))
    noise = fractal_noise(crop.size, cells, 3, scene.generator, scene.image.device)[0]
    # The window keeps islands near the centre; the threshold is the one that gives the wanted area.
    field = noise - 0.9 * torch.hypot(crop.ys, crop.xs) / reach
    keep = min(field.numel(), max(3, round(scene.area)))
    threshold = field.flatten().topk(keep).values[-1]
    # Pixels for one unit of the field, from the noise's mean slope.
    gradient = max(1.4 * reach / cells, 1.0)
    opacity = soft_edge((field - threshold) * gradient, 1.5)
    texture = _foreign_texture(scene, crop)
    return Change(crop, texture, opacity * _opaqueness(scene))


def cutpaste(scene: Scene) -> Change:
    """Upright rectangle from another place of the image, colour-jittered."""
    ratio = math.exp(scene.rng.uniform(-1.2, 1.2))
    height, width = math.sqrt(scene.area * ratio), math.sqrt(scene.area / ratio)
    height, width = max(2.0, height), max(2.0, width)
    crop = scene.crop(height / 2.0 + 2.0, width / 2.0 + 2.0)
    opacity = soft_edge(rectangle_distance(crop.ys, crop.xs, height, width))
    angle = scene.rng.choice((0.0, 0.5, 1.0, 1.5)) * math.pi
    view = scene.sample(scene.donors[scene.params.image], crop, angle=angle, zoom=1.0, at=_elsewhere(scene))
    return Change(crop, _jitter(scene, view, 0.35), opacity * _opaqueness(scene))


def scar(scene: Scene) -> Change:
    """Thin rotated strip of pixels from another place of the image."""
    ratio = scene.rng.uniform(6.0, 16.0)
    width = min(math.sqrt(scene.area * ratio), 0.4 * scene.side)
    height = max(1.5, min(width / 4.0, math.sqrt(scene.area / ratio)))
    angle = scene.params.angle
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    crop = scene.crop((sin * width + cos * height) / 2.0 + 2.0, (cos * width + sin * height) / 2.0 + 2.0)
    opacity = soft_edge(rectangle_distance(crop.ys, crop.xs, height, width, angle))
    turn = angle + scene.rng.uniform(-0.3, 0.3)
    view = scene.sample(scene.donors[scene.params.image], crop, angle=turn, zoom=1.0, at=_elsewhere(scene))
    return Change(crop, _jitter(scene, view, 0.5), opacity * _opaqueness(scene))


def poisson(scene: Scene) -> Change:
    """Patch of this or another image, resized and cloned without a seam."""
    crop, distance = scene.blob(max(2.5, scene.radius), roughness=0.4)
    inside = distance > 0.0
    zoom = scene.rng.uniform(0.6, 1.6)
    angle = scene.rng.uniform(-math.pi, math.pi)
    source = scene.sample(scene.donor(), crop, angle=angle, zoom=zoom, at=_elsewhere(scene))
    # Mixed gains keep the patch visible on objects whose texture is the same everywhere.
    gain = scene.rng.uniform(1.0, 1.8)
    source = source.mean((1, 2), keepdim=True) + gain * (source - source.mean((1, 2), keepdim=True))
    blended = poisson_blend(source, crop.pixels, inside).clamp(0.0, 1.0)
    return Change(crop, blended, inside.float() * _opaqueness(scene))


def _opaqueness(scene: Scene) -> float:
    """Foreign texture is seen at any opacity above a third, so opacity rises fast with the strength."""
    return min(1.0, 1.6 * scene.params.strength)


def _elsewhere(scene: Scene) -> tuple[float, float]:
    """Place in the source, as fractions of its size, well away from the defect's own."""
    height, width = scene.image.shape[-2:]
    here = (scene.centre[0] / height, scene.centre[1] / width)
    angle = scene.rng.uniform(0.0, 2.0 * math.pi)
    far = scene.rng.uniform(0.12, 0.35)
    return here[0] + far * math.sin(angle), here[1] + far * math.cos(angle)


def _jitter(scene: Scene, view: Tensor, amount: float) -> Tensor:
    """Shift brightness and contrast (and a little colour) in proportion to the strength."""
    amount = amount * scene.params.strength
    mean = view.mean((1, 2), keepdim=True)
    gain = 1.0 + scene.rng.uniform(-amount, amount)
    shift = scene.rng.uniform(0.3, 1.0) * amount * (-1.0 if scene.darkens() else 1.0)
    return ((view - mean) * gain + mean + shift + scene.tint(0.3 * amount)).clamp(0.0, 1.0)


def _foreign_texture(scene: Scene, crop: Crop) -> Tensor:
    """Texture that does not belong here: from the texture folder, or a strongly changed part of the batch."""
    rng = scene.rng
    at = (rng.random(), rng.random())
    angle = rng.uniform(-math.pi, math.pi)
    if scene.texture is not None:
        texture = scene.sample(scene.texture(rng.getrandbits(31)), crop, angle=angle, zoom=rng.uniform(0.5, 1.5), at=at)
        return texture.mean(0, keepdim=True).expand_as(texture) if scene.grey else texture
    source = scene.donor()
    first = scene.sample(source, crop, angle=angle, zoom=rng.uniform(0.25, 0.6), at=at)
    second = scene.sample(source, crop, angle=angle + 1.3, zoom=rng.uniform(0.6, 2.0), at=(at[1], at[0]))
    texture = 0.5 * (first + second) if rng.random() < 0.5 else torch.maximum(first, second)
    if not scene.grey:
        order = rng.sample((0, 1, 2), 3)
        texture = texture[order]
    if rng.random() < 0.25:
        texture = 1.0 - texture
    mean = texture.mean((1, 2), keepdim=True)
    target = (mean + rng.uniform(-0.3, 0.3) + scene.tint(0.12)).clamp(0.1, 0.9)
    return ((texture - mean) * rng.uniform(1.0, 2.2) + target).clamp(0.0, 1.0)
