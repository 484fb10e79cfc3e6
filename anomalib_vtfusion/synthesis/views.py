"""Views of the references: exact turns and flips for the bank, harmless variations for training and calibration."""

from dataclasses import dataclass

import kornia.enhance as ke
import kornia.geometry.transform as kt
import torch
from torch import Tensor


def reference_views(images: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    """All views of the references that go into the bank.

    Args:
        images: ``(k, 3, H, W)``.
        turn: Add flips and turns by 90 degrees (180 where the image is not square). Off where orientation matters.

    Returns:
        Views ``(V, 3, H, W)`` and the index ``(V,)`` of the reference that each one shows.
    """
    views = [images]
    if turn:
        steps = (1, 2, 3) if images.shape[-1] == images.shape[-2] else (2,)
        views += [images.rot90(step, dims=(2, 3)) for step in steps]
        views += [view.flip(3) for view in views]
    return torch.cat(views), torch.arange(len(images), device=images.device).repeat(len(views))


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of one batch of harmless variations, replayable.

    Attributes:
        turns: Quarter turns ``(B,)`` in 0 to 3.
        flips: Whether to mirror ``(B,)``.
        angle: Rotation ``(B,)`` in degrees.
        scale: Zoom ``(B, 2)``.
        shift: Translation ``(B, 2)`` as a share of the size.
        gain: Gain ``(B, 3)`` of each colour channel.
        gamma: Exponent ``(B,)``.
        noise: Deviation ``(B,)`` of the sensor noise.
        noise_seed: Seed of the sensor noise.
    """

    turns: Tensor
    flips: Tensor
    angle: Tensor
    scale: Tensor
    shift: Tensor
    gain: Tensor
    gamma: Tensor
    noise: Tensor
    noise_seed: int


class ViewSampler:
    """Draws harmless variations of pose, light and sensor, so that a reference is never seen twice alike.

    Args:
        turn: Allow flips and quarter turns.
        angle: Largest small rotation, in degrees.
        zoom: Largest relative change of size.
        shift: Largest shift, as a share of the size.
        light: Largest relative change of gain; a third of it may differ between colour channels.
        noise: Largest deviation of the sensor noise, for images in ``[0, 1]``.
    """

    def __init__(
        self,
        turn: bool,
        angle: float = 5.0,
        zoom: float = 0.06,
        shift: float = 0.04,
        light: float = 0.12,
        noise: float = 0.02,
    ) -> None:
        self.turn = turn
        self.angle = angle
        self.zoom = zoom
        self.shift = shift
        self.light = light
        self.noise = noise

    def sample(self, batch: int, generator: torch.Generator) -> ViewParameters:
        """Draw parameters for a batch; all randomness comes from the CPU ``generator``."""

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=generator) - 1

        turns = torch.randint(4, (batch,), generator=generator)
        flips = torch.rand(batch, generator=generator) < 0.5
        return ViewParameters(
            turns=turns if self.turn else torch.zeros_like(turns),
            flips=flips if self.turn else torch.zeros_like(flips),
            angle=self.angle * uniform(batch),
            scale=1 + self.zoom * uniform(batch, 1).expand(-1, 2),
            shift=self.shift * uniform(batch, 2),
            gain=1 + self.light * uniform(batch, 1) + self.light / 3 * uniform(batch, 3),
            gamma=torch.exp(self.light * uniform(batch)),
            noise=self.noise * torch.rand(batch, generator=generator),
            noise_seed=int(torch.randint(2**31, (1,), generator=generator)),
        )

    @staticmethod
    def apply(images: Tensor, parameters: ViewParameters) -> Tensor:
        """Apply parameters to images ``(B, 3, H, W)`` in ``[0, 1]``; the same range afterwards."""
        height, width = images.shape[-2:]
        steps = 1 if height == width else 2  # a quarter turn of an oblong image does not fit
        turned = [
            (image.flip(2) if flip else image).rot90(int(turn) // steps * steps, dims=(1, 2))
            for image, turn, flip in zip(images, parameters.turns, parameters.flips, strict=True)
        ]
        images = torch.stack(turned)
        device = images.device
        size = torch.tensor([width, height], dtype=torch.float32)
        centre = (size / 2).expand(len(images), 2)
        matrix = kt.get_affine_matrix2d(parameters.shift * size, centre, parameters.scale, parameters.angle)[:, :2].to(
            device
        )
        images = kt.warp_affine(images, matrix, (height, width), padding_mode="reflection", align_corners=False)
        images = images * parameters.gain.to(device)[:, :, None, None]
        images = ke.adjust_gamma(images.clamp(1e-4, 1), parameters.gamma.to(device))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(parameters.noise_seed)).to(device)
        return (images + noise * parameters.noise.to(device)[:, None, None, None]).clamp(0, 1)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Vary images ``(B, 3, H, W)``."""
        return self.apply(images, self.sample(len(images), generator))
