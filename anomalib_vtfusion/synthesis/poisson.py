"""Poisson image editing on a small crop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def poisson_blend(source: Tensor, target: Tensor, inside: Tensor, iterations: int = 8) -> Tensor:
    """Seamlessly clone ``source`` into ``target`` (Perez et al., "Poisson Image Editing", 2003).

    Solves for the smooth correction that makes the source meet the target on the outline: zero Laplacian inside,
    ``target - source`` outside, by conjugate gradients. The result has the source's gradients and the target's border.

    Args:
        source: Patch to insert, ``(C, h, w)``.
        target: Patch to insert it into, ``(C, h, w)``.
        inside: Domain, bool ``(h, w)``; pixels on the crop's border are taken as outside.
        iterations: Steps of conjugate gradients. The default leaves no visible seam: it refines a guess that is solved
            on a coarser grid, as the correction is smooth.

    Returns:
        Blended patch ``(C, h, w)``, not clamped; equal to ``target`` outside the domain.
    """
    domain = F.pad(inside[1:-1, 1:-1], (1, 1, 1, 1)).to(source.dtype)
    known = target - source
    guess = _coarse_guess(known, domain)
    correction = _conjugate_gradients(known, domain, guess, iterations)
    return torch.where(domain.bool(), source + correction, target)


def _coarse_guess(known: Tensor, domain: Tensor) -> Tensor:
    """Correction solved at a quarter of the resolution, ``(C, h, w)``; zero outside the domain."""
    outside = 1.0 - domain
    # The mean difference outside is the largest part of the correction.
    mean = (known * outside).sum((1, 2), keepdim=True) / outside.sum().clamp(min=1.0)
    if min(domain.shape) < 16:
        return mean * domain
    weight = F.avg_pool2d(outside[None], 4, ceil_mode=True, count_include_pad=False)
    border = F.avg_pool2d(known * outside, 4, ceil_mode=True, count_include_pad=False) / weight.clamp(min=1e-6)
    within = (weight[0] < 1e-6).float()
    steps = max(within.shape)
    coarse = _conjugate_gradients(border, within, mean * within, steps)
    return F.interpolate(coarse[None], size=domain.shape, mode="bilinear")[0] * domain


def _conjugate_gradients(known: Tensor, domain: Tensor, guess: Tensor, iterations: int) -> Tensor:
    """Harmonic extension of ``known`` from outside ``domain`` into it, all channels at once, ``(C, h, w)``.

    The iteration count is fixed, so no value has to be read back from the device.
    """

    def laplacian(values: Tensor) -> Tensor:
        around = F.pad(values, (1, 1, 1, 1))
        neighbours = around[:, :-2, 1:-1] + around[:, 2:, 1:-1] + around[:, 1:-1, :-2] + around[:, 1:-1, 2:]
        return (4.0 * values - neighbours) * domain

    outside = known * (1.0 - domain)
    residual = -laplacian(outside + guess)
    step = residual
    energy = residual.square().sum((1, 2), keepdim=True)
    for _ in range(iterations):
        pushed = laplacian(step)
        rate = energy / (step * pushed).sum((1, 2), keepdim=True).clamp(min=1e-12)
        guess = guess + rate * step
        residual = residual - rate * pushed
        fresh = residual.square().sum((1, 2), keepdim=True)
        step = residual + (fresh / energy.clamp(min=1e-12)) * step
        energy = fresh
    return outside + guess
