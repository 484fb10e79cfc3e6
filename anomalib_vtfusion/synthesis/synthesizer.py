"""Synthetic anomalies on a batch of normal images: sample parameters, then apply them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_vtfusion.synthesis.defects import DEFECT_FUNCTIONS, FAMILIES
from anomalib_vtfusion.synthesis.scene import DefectParams, Scene
from anomalib_vtfusion.synthesis.surroundings import Surroundings
from anomalib_vtfusion.synthesis.textures import TextureFolder

VISIBLE = 0.02
"""Change (largest over the channels, images in [0, 1]) from which a pixel counts as anomalous: five grey levels."""

CROWD = 3.5 / 25.0
"""Share of changed pixels among its 5 x 5 neighbours from which a changed pixel is kept."""


@dataclass(frozen=True)
class SynthesisParams:
    """Plain, replayable description of the defects of one batch.

    Attributes:
        shape: Batch size, height and width it was sampled for.
        defects: Defects in the order of application; images without one stay clean.
    """

    shape: tuple[int, int, int]
    defects: tuple[DefectParams, ...]


@dataclass
class SyntheticBatch:
    """Images with synthetic anomalies and their ground truth.

    Attributes:
        images: RGB in [0, 1], ``(B, 3, H, W)``; equal to the input wherever ``masks`` is 0.
        masks: 1 where a pixel visibly changed, ``(B, 1, H, W)`` float.
        labels: 1 for images with a non-empty mask, ``(B,)`` float.
        families: Family of each image's defects, ``"clean"`` where the label is 0.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    families: tuple[str, ...]


class AnomalySynthesizer(nn.Module):
    """Turn normal images into anomalous ones with known masks, on the images' device.

    Each image is left clean with probability ``clean_fraction``, else it gets one family of defects. All ranges are
    inclusive ``(low, high)``. Randomness comes from the given CPU generator alone, so it is the same on any device.

    Args:
        families: Subset of :data:`FAMILIES` to draw from; None for all.
        area: Area of one defect as a fraction of the image, sampled log-uniformly.
        strength: Visibility, 0 (invisible) to 1 (strong), sampled uniformly.
        defects_per_image: Number of defects on an anomalous image.
        clean_fraction: Probability that an image stays clean.
        texture_source: Folder of texture images for the family "perlin"; None takes texture from the batch itself.

    Raises:
        ValueError: If a family is unknown or a range is empty, reversed or out of bounds.
        FileNotFoundError: If ``texture_source`` does not exist or holds no images.
    """

    def __init__(
        self,
        families: Sequence[str] | None = None,
        *,
        area: tuple[float, float] = (0.001, 0.08),
        strength: tuple[float, float] = (0.3, 1.0),
        defects_per_image: tuple[int, int] = (1, 3),
        clean_fraction: float = 1 / 3,
        texture_source: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.families = _check_families(families)
        self.area = _check_range("area", area, low=0.0, high=0.5, open_low=True)
        self.strength = _check_range("strength", strength, low=0.0, high=1.0)
        counts = _check_range("defects_per_image", defects_per_image, low=1, high=100)
        if any(int(count) != count for count in counts):
            msg = f"defects_per_image must hold whole numbers, got {tuple(defects_per_image)}"
            raise ValueError(msg)
        self.defects_per_image = (int(counts[0]), int(counts[1]))
        if not 0.0 <= clean_fraction <= 1.0:
            msg = f"clean_fraction must lie in [0, 1], got {clean_fraction}"
            raise ValueError(msg)
        self.clean_fraction = float(clean_fraction)
        self.textures = None if texture_source is None else TextureFolder(texture_source)

    def extra_repr(self) -> str:
        """Ranges, for ``print(model)``."""
        return (
            f"families={len(self.families)}, area={self.area}, strength={self.strength}, "
            f"defects_per_image={self.defects_per_image}, clean_fraction={self.clean_fraction:.3g}"
        )

    def sample(self, shape: tuple[int, int, int], generator: torch.Generator) -> SynthesisParams:
        """Draw the defects of one batch.

        Args:
            shape: Batch size, height and width.
            generator: CPU generator.
        """
        batch = shape[0]
        most = self.defects_per_image[1]
        uniform = torch.rand(batch, 3 + 5 * most, generator=generator).tolist()
        seeds = torch.randint(0, 2**31 - 1, (batch, most), generator=generator).tolist()
        defects: list[DefectParams] = []
        for image, (row, row_seeds) in enumerate(zip(uniform, seeds, strict=True)):
            if row[0] < self.clean_fraction:
                continue
            family = self.families[int(row[1] * len(self.families))]
            low, high = self.defects_per_image
            for number in range(low + int(row[2] * (high - low + 1))):
                place, area, strength, angle, shape_of = row[3 + 5 * number : 8 + 5 * number]
                defects.append(
                    DefectParams(
                        family=family,
                        image=image,
                        place=place,
                        area=self.area[0] * (self.area[1] / self.area[0]) ** area,
                        strength=self.strength[0] + (self.strength[1] - self.strength[0]) * strength,
                        angle=math.pi * (2.0 * angle - 1.0),
                        elongation=4.0 ** (shape_of**1.5),
                        seed=row_seeds[number],
                    )
                )
        return SynthesisParams(shape=(shape[0], shape[1], shape[2]), defects=tuple(defects))

    @overload  # type: ignore[override]
    def apply(self, images: Tensor, params: SynthesisParams) -> SyntheticBatch: ...

    @overload
    def apply(self, images: Callable[[nn.Module], None]) -> AnomalySynthesizer: ...

    @torch.no_grad()
    def apply(
        self, images: Tensor | Callable[[nn.Module], None], params: SynthesisParams | None = None
    ) -> SyntheticBatch | AnomalySynthesizer:
        """Apply sampled defects. Deterministic: the same arguments give the same result.

        Computed in float32, also inside an autocast context. A function alone is handed to ``nn.Module.apply``, so
        that ``apply`` on a model which holds a synthesizer keeps working.

        Args:
            images: Normal images, RGB in [0, 1], ``(B, 3, H, W)``.
            params: Result of :meth:`sample` for this shape.

        Raises:
            TypeError: If images come without parameters.
            ValueError: If the images are not ``(B, 3, H, W)`` or the parameters were sampled for another shape.
        """
        if not isinstance(images, Tensor):
            return super().apply(images)
        if params is None:
            msg = "apply(images, params) needs the parameters that sample() returned"
            raise TypeError(msg)
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            msg = f"images must be floating point (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            raise ValueError(msg)
        shape = (images.shape[0], images.shape[2], images.shape[3])
        if shape != params.shape:
            msg = f"parameters were sampled for (B, H, W) = {params.shape}, but the images are {shape}"
            raise ValueError(msg)
        with torch.autocast(images.device.type, enabled=False):
            return self._draw(images.float(), params)

    def forward(self, images: Tensor, generator: torch.Generator) -> SyntheticBatch:
        """Sample for the images' shape, then apply.

        Args:
            images: Normal images, RGB in [0, 1], ``(B, 3, H, W)``.
            generator: CPU generator.
        """
        return self.apply(images, self.sample((images.shape[0], images.shape[2], images.shape[3]), generator))

    def _draw(self, images: Tensor, params: SynthesisParams) -> SyntheticBatch:
        changed = images.clone()
        masks = torch.zeros_like(images[:, 0], dtype=torch.bool)
        families = ["clean"] * images.shape[0]
        around = Surroundings(images)
        for defect in params.defects:
            scene = self._scene(changed, images, around, defect)
            change = DEFECT_FUNCTIONS[defect.family](scene)
            rows, cols = change.crop.rows, change.crop.cols
            opacity, reach = change.opacity, around.reach(defect.image)
            if reach is not None:
                opacity = opacity * reach[rows, cols]
            before, touched = images[defect.image, :, rows, cols], masks[defect.image, rows, cols] | (opacity > 0.0)
            after = torch.lerp(change.crop.pixels, change.pixels, opacity)
            # Judged against the clean image on the whole crop, so that overlapping defects stay consistent.
            seen = _visible(before, after, touched)
            masks[defect.image, rows, cols] = seen
            changed[defect.image, :, rows, cols] = torch.where(seen, after, before)
            families[defect.image] = defect.family
        labels = masks.flatten(1).any(1)
        families = [name if seen else "clean" for name, seen in zip(families, labels.tolist(), strict=True)]
        return SyntheticBatch(changed, masks[:, None].float(), labels.float(), tuple(families))

    def _scene(self, changed: Tensor, images: Tensor, around: Surroundings, defect: DefectParams) -> Scene:
        centre = around.place(defect.image, defect.place, at_edge=defect.family == "missing")
        textures = self.textures
        return Scene(
            params=defect,
            image=changed[defect.image],
            donors=images,
            centre=centre,
            luma=around.luma_at(defect.image, centre),
            grey=around.grey[defect.image],
            has_background=around.has_background[defect.image],
            fill=lambda crop: around.fill(defect.image, crop.rows, crop.cols, defect.seed),
            texture=None if textures is None else lambda number: textures.read(number).to(images.device),
        )


def _visible(before: Tensor, after: Tensor, touched: Tensor) -> Tensor:
    """Mask of visible change, bool ``(h, w)``, from images ``(3, h, w)``.

    Pinholes where old and new happen to agree are closed; single specks, which noise makes, are dropped.
    """
    seen = (after - before).abs().amax(0) > VISIBLE
    closed = ~_dilated(~_dilated(seen)) & touched
    crowd = F.avg_pool2d(closed[None].float(), 5, stride=1, padding=2)
    return closed & (crowd[0] > CROWD)


def _dilated(mask: Tensor) -> Tensor:
    """Dilate a bool mask ``(h, w)`` by a 3 x 3 square; shifts are faster than pooling on small crops."""
    wide = F.pad(mask, (1, 1, 1, 1))
    rows = wide[:-2] | wide[1:-1] | wide[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _check_families(families: Sequence[str] | None) -> tuple[str, ...]:
    if families is None:
        return FAMILIES
    if isinstance(families, str):
        msg = f"families must be a list of names, got the string {families!r}; write [{families!r}]"
        raise ValueError(msg)  # noqa: TRY004 - a str is a sequence of str: the value is wrong, not the type
    known = ", ".join(FAMILIES)
    if not families:
        msg = f"families is empty; give None for all, or some of: {known}"
        raise ValueError(msg)
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        msg = f"unknown defect families {unknown}; known: {known}"
        raise ValueError(msg)
    return tuple(dict.fromkeys(families))


def _check_range(
    name: str, value: Sequence[float], *, low: float, high: float, open_low: bool = False
) -> tuple[float, float]:
    if len(value) != 2:
        msg = f"{name} must be a pair (low, high), got {tuple(value)}"
        raise ValueError(msg)
    first, last = float(value[0]), float(value[1])
    inside = low <= first <= high and low <= last <= high and not (open_low and first <= low)
    if not inside:
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        msg = f"{name} must lie in {bounds}, got {tuple(value)}"
        raise ValueError(msg)
    if first > last:
        msg = f"{name} must be (low, high) with low <= high, got {tuple(value)}"
        raise ValueError(msg)
    return first, last
