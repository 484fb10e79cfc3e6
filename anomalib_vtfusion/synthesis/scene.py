"""What a defect sees: its parameters, its image, the other images, and a crop around its place."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from anomalib_vtfusion.synthesis.masks import blob_distance, seeded

GREY_CHROMA = 0.02
"""Mean spread between colour channels below which an image counts as grey: its defects are grey too."""


@dataclass(frozen=True)
class DefectParams:
    """Everything about one defect that is decided before an image is seen.

    Attributes:
        family: Name of the defect family.
        image: Index of the image in its batch.
        place: Rank in [0, 1) of the centre among the object's pixels, so that it lies on any object.
        area: Target area as a fraction of the image.
        strength: 0 (invisible) to 1 (strong).
        angle: Orientation in radians.
        elongation: Length over width for families without a shape of their own.
        seed: Start of all further randomness of this defect (outline, noise, colour).
    """

    family: str
    image: int
    place: float
    area: float
    strength: float
    angle: float
    elongation: float
    seed: int


@dataclass(frozen=True)
class Crop:
    """Window of an image around a defect.

    Attributes:
        rows: Row slice in the image.
        cols: Column slice in the image.
        pixels: The window, ``(3, h, w)``.
        ys: Row coordinates relative to the defect's centre in pixels, ``(h, 1)``.
        xs: Column coordinates relative to the defect's centre in pixels, ``(1, w)``.
        origin: First row and column coordinate, known without reading from the device.
    """

    rows: slice
    cols: slice
    pixels: Tensor
    ys: Tensor
    xs: Tensor
    origin: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@dataclass(frozen=True)
class Change:
    """What a defect does to its crop: ``opacity * pixels + (1 - opacity) * before``.

    Attributes:
        crop: Where.
        pixels: New content, ``(3, h, w)``.
        opacity: Soft mask in [0, 1], ``(h, w)``.
    """

    crop: Crop
    pixels: Tensor
    opacity: Tensor


@dataclass
class Scene:
    """One defect about to be applied.

    Attributes:
        params: The defect.
        image: Image as it is now, earlier defects included, ``(3, H, W)``.
        donors: The clean batch, a source of texture, ``(B, 3, H, W)``.
        centre: Row and column of the defect in pixels.
        luma: Mean luminance of the image around the centre.
        grey: True for a grey-looking image.
        has_background: True if the image shows an object before a background.
        fill: Gives the background (or the surroundings) without the object on a crop, ``(3, h, w)``.
        texture: Gives a texture image for a seed, ``(3, h, w)``, or None without a texture folder.
    """

    params: DefectParams
    image: Tensor
    donors: Tensor
    centre: tuple[float, float]
    luma: float
    grey: bool
    has_background: bool
    fill: Callable[[Crop], Tensor]
    texture: Callable[[int], Tensor] | None = None

    @cached_property
    def rng(self) -> random.Random:
        """Scalars of this defect."""
        return random.Random(self.params.seed)

    @cached_property
    def generator(self) -> torch.Generator:
        """Noise of this defect, on the CPU."""
        return seeded(self.params.seed)

    @property
    def side(self) -> float:
        """Square root of the image's area in pixels."""
        return math.sqrt(self.image.shape[-2] * self.image.shape[-1])

    @property
    def area(self) -> float:
        """Target area in pixels."""
        return self.params.area * self.image.shape[-2] * self.image.shape[-1]

    @property
    def radius(self) -> float:
        """Radius in pixels of a disc of the target area, at least 0.8."""
        return max(0.8, math.sqrt(self.area / math.pi))

    def crop(self, reach_y: float, reach_x: float) -> Crop:
        """Window of at least 9 x 9 pixels (where the image allows) reaching that far from the centre."""
        rows = _window(self.centre[0], reach_y, self.image.shape[-2])
        cols = _window(self.centre[1], reach_x, self.image.shape[-1])
        device = self.image.device
        ys = torch.arange(rows.start, rows.stop, device=device, dtype=torch.float32)[:, None] - self.centre[0]
        xs = torch.arange(cols.start, cols.stop, device=device, dtype=torch.float32)[None] - self.centre[1]
        origin = (rows.start - self.centre[0], cols.start - self.centre[1])
        return Crop(rows, cols, self.image[:, rows, cols], ys, xs, origin)

    def blob(self, radius: float, *, roughness: float = 0.3) -> tuple[Crop, Tensor]:
        """Crop around, and signed distance to, an irregular outline with this defect's elongation and angle.

        Args:
            radius: Radius in pixels of the disc of equal area.
            roughness: See :func:`blob_distance`.
        """
        params = self.params
        stretch = math.sqrt(params.elongation)
        long, short = radius * stretch * (1.0 + roughness), radius / stretch * (1.0 + roughness)
        cos, sin = math.cos(params.angle), math.sin(params.angle)
        crop = self.crop(math.hypot(long * sin, short * cos) + 3.0, math.hypot(long * cos, short * sin) + 3.0)
        distance = blob_distance(
            crop.ys,
            crop.xs,
            radius,
            self.rng,
            elongation=params.elongation,
            angle=params.angle,
            roughness=roughness,
        )
        return crop, distance

    def tint(self, spread: float) -> Tensor:
        """Random deviation per colour channel in ``[-spread, spread]``, ``(3, 1, 1)``; zero for grey images."""
        values = [self.rng.uniform(-spread, spread) for _ in range(3)]
        if self.grey:
            values = [0.0, 0.0, 0.0]
        return torch.tensor(values, device=self.image.device).view(3, 1, 1)

    def darkens(self, bias: float = 0.5) -> bool:
        """Whether to go darker: where there is room, else by chance with probability ``bias``."""
        chance = self.rng.random()
        if self.luma < 0.22:
            return False
        return self.luma > 0.72 or chance < bias

    def donor(self) -> Tensor:
        """Another image of the batch, or the image's own clean version, ``(3, H, W)``; grey for grey images."""
        chosen = self.donors[self.rng.randrange(self.donors.shape[0])]
        return chosen.mean(0, keepdim=True).expand_as(chosen) if self.grey else chosen

    def sample(self, source: Tensor, crop: Crop, *, angle: float, zoom: float, at: tuple[float, float]) -> Tensor:
        """Rotated and zoomed view of ``source`` for the crop, reflected at its border.

        Args:
            source: Image to read, ``(3, H, W)``.
            crop: Where the view will go.
            angle: Rotation about the crop's centre, in radians.
            zoom: Above 1 the content appears larger.
            at: Row and column in ``source``, as fractions, that appear at the defect's centre.
        """
        height, width = source.shape[-2:]
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        row = cos * crop.ys + sin * crop.xs + (at[0] * height - 0.5)
        col = cos * crop.xs - sin * crop.ys + (at[1] * width - 0.5)
        grid = torch.stack([(2.0 * col + 1.0) / width - 1.0, (2.0 * row + 1.0) / height - 1.0], dim=-1)
        view = F.grid_sample(source[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=False)
        return view[0]


def _window(centre: float, reach: float, size: int) -> slice:
    """Pixels within ``reach`` of ``centre``, cut at the image's border."""
    reach = max(reach, 4.0)
    return slice(max(0, math.floor(centre - reach)), min(size, math.ceil(centre + reach) + 1))
