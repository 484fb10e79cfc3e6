"""Poisson image editing on a small crop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def poisson_blend(source: Tensor, target: Tensor, inside: Tensor, iterations: int | None = None) -> Tensor:
    """Seamlessly clone ``source`` into ``target`` (Perez et al., "Poisson Image Editing", 2003).

    Solves for the smooth correction that makes the source meet the target on the outline: zero Laplacian inside,
    ``target - source`` outside, by conjugate gradients. The result has the source's gradients and the target's border.

    Args:
        source: Patch to insert, ``(C, h, w)``.
        target: Patch to insert it into, ``(C, h, w)``.
        inside: Domain, bool ``(h, w)``; pixels on the crop's border are taken as outside.
        iterations: Steps of conjugate gradients; by default enough for the seam to vanish on the crop's size.

    Returns:
        Blended patch ``(C, h, w)``, not clamped; equal to ``target`` outside the domain.
    """
    domain = F.pad(inside[1:-1, 1:-1], (1, 1, 1, 1)).to(source.dtype)
    if iterations is None:
        iterations = min(16 + 2 * max(inside.shape), 160)
    known = target - source
    correction = _conjugate_gradients(known, domain, iterations)
    return torch.where(domain.bool(), source + correction, target)


def _conjugate_gradients(known: Tensor, domain: Tensor, iterations: int) -> Tensor:
    """Harmonic extension of ``known`` from outside ``domain`` into it, all channels at once, ``(C, h, w)``.

    The iteration count is fixed, so no value has to be read back from the device.
    """

    def laplacian(values: Tensor) -> Tensor:
        around = F.pad(values, (1, 1, 1, 1))
        neighbours = around[:, :-2, 1:-1] + around[:, 2:, 1:-1] + around[:, 1:-1, :-2] + around[:, 1:-1, 2:]
        return (4.0 * values - neighbours) * domain

    outside = known * (1.0 - domain)
    # Mean difference on the outside as first guess: the correction is smooth, most of it is a constant.
    guess = outside.sum((1, 2), keepdim=True) / (1.0 - domain).sum().clamp(min=1.0) * domain
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
