"""Defects that alter what is there: blur, intensity, colour, dent (warp), missing part."""

from __future__ import annotations

import math

import kornia
import torch
from torch import Tensor
from torch.nn import functional as F

from anomalib_vtfusion.synthesis.masks import smooth_noise, soft_edge
from anomalib_vtfusion.synthesis.scene import Change, Crop, Scene


def blur(scene: Scene) -> Change:
    """Local loss of sharpness."""
    crop, opacity = _soft_blob(scene, softness=0.3)
    sigma = (0.008 + 0.027 * scene.params.strength) * scene.side
    size = 2 * math.ceil(2.0 * sigma) + 1
    size = min(size, 2 * ((min(crop.size) - 1) // 2) + 1)
    blurred = kornia.filters.gaussian_blur2d(crop.pixels[None], size, (sigma, sigma), border_type="replicate")[0]
    return Change(crop, blurred, opacity * min(1.0, 2.0 * scene.params.strength))


def intensity(scene: Scene) -> Change:
    """Local change of brightness and contrast."""
    crop, opacity = _soft_blob(scene, softness=scene.rng.uniform(0.2, 1.0))
    amount = 0.45 * scene.params.strength * (-1.0 if scene.darkens() else 1.0)
    mean = crop.pixels.mean((1, 2), keepdim=True)
    gain = math.exp(scene.rng.uniform(-0.6, 0.6) * scene.params.strength)
    shifted = (crop.pixels - mean) * gain + mean * (1.0 + 0.5 * amount) + 0.5 * amount
    return Change(crop, shifted.clamp(0.0, 1.0), opacity)


def colour(scene: Scene) -> Change:
    """Local discoloration: hue turned and tinted; on grey images a change of tone."""
    rng, strength = scene.rng, scene.params.strength
    crop, opacity = _soft_blob(scene, softness=rng.uniform(0.1, 0.6))
    if scene.grey:
        gamma = math.exp((1.0 if scene.darkens() else -1.0) * strength)
        return Change(crop, crop.pixels.clamp(min=1e-4).pow(gamma), opacity)
    luma = crop.pixels.mean(0, keepdim=True)
    turn = rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 0.7) * math.pi * strength
    chroma = _rotate_hue(crop.pixels - luma, turn)
    cast = torch.tensor([math.cos(turn), math.cos(turn - 2.1), math.cos(turn + 2.1)], device=luma.device)
    shifted = luma + chroma * (1.0 + 0.3 * strength) + 0.16 * strength * cast.view(3, 1, 1)
    return Change(crop, shifted.clamp(0.0, 1.0), opacity)


def dent(scene: Scene) -> Change:
    """Local bulge or dip: the texture is warped and the slope shaded."""
    rng, strength = scene.rng, scene.params.strength
    radius = max(3.0, scene.radius)
    stretch = math.sqrt(scene.params.elongation)
    reach = 1.3 * radius * stretch + 3.0
    crop = scene.crop(reach, reach)
    cos, sin = math.cos(scene.params.angle), math.sin(scene.params.angle)
    along = (cos * crop.xs + sin * crop.ys) / (radius * stretch)
    across = (cos * crop.ys - sin * crop.xs) * stretch / radius
    rho = (along.square() + across.square()).clamp(max=1.0)
    bump = (1.0 - rho).square()

    sign = rng.choice((-1.0, 1.0))
    pull = 0.7 * strength * sign * bump
    rows = crop.ys + scene.centre[0] - pull * crop.ys
    cols = crop.xs + scene.centre[1] - pull * crop.xs
    height, width = scene.image.shape[-2:]
    grid = torch.stack([(2.0 * cols + 1.0) / width - 1.0, (2.0 * rows + 1.0) / height - 1.0], dim=-1)
    warped = F.grid_sample(scene.image[None], grid[None], padding_mode="reflection", align_corners=False)[0]

    light = rng.uniform(-math.pi, math.pi)
    slope = (1.0 - rho) * rho.sqrt()
    facing = (math.sin(light) * crop.ys + math.cos(light) * crop.xs) / torch.hypot(crop.ys, crop.xs).clamp(min=0.5)
    shaded = warped + sign * 0.6 * strength * slope * facing * (0.3 + warped.mean())
    return Change(crop, shaded.clamp(0.0, 1.0), (rho < 1.0).float())


def missing(scene: Scene) -> Change:
    """A part is gone: what lies behind (background, or the smoothed surroundings) shows through."""
    rng = scene.rng
    crop, distance = scene.blob(scene.radius, roughness=0.5)
    ragged = smooth_noise(crop.size, 0.25 * max(crop.size), scene.generator, scene.image.device)[0]
    distance = distance + min(1.5, 0.06 * scene.radius) * ragged
    behind = scene.fill(crop)
    if not scene.has_background:  # a chipped surface is darker or, freshly broken, brighter than around
        behind = behind * (1.0 + rng.choice((-0.45, 0.35)) * rng.random())
    # The broken edge throws a narrow shadow on what lies behind.
    behind = behind * (1.0 - 0.3 * torch.exp(-distance.clamp(min=0.0) / (0.008 * scene.side)))
    behind = behind.clamp(0.0, 1.0)
    return Change(crop, behind, soft_edge(distance, 1.3) * min(1.0, 1.6 * scene.params.strength))


def _soft_blob(scene: Scene, softness: float) -> tuple[Crop, Tensor]:
    """Crop and opacity of a blob of the wanted area with an edge of ``softness`` radii."""
    crop, distance = scene.blob(scene.radius)
    return crop, soft_edge(distance, max(1.0, softness * scene.radius))


def _rotate_hue(chroma: Tensor, angle: float) -> Tensor:
    """Rotate colour deviations about the grey axis, ``(3, h, w)``."""
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3.0)
    turned = chroma[[2, 0, 1]] - chroma[[1, 2, 0]]
    return cos * chroma + sin * turned
