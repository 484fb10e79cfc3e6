"""What the defects of a batch must know about their images: object, background, brightness, greyness."""

from __future__ import annotations

import kornia
import torch
from torch import Tensor
from torch.nn import functional as F

from anomalib_vtfusion.synthesis.foreground import enlarge, foreground_of_thumbnails, shrink_factor, thumbnails
from anomalib_vtfusion.synthesis.masks import seeded
from anomalib_vtfusion.synthesis.scene import GREY_CHROMA


class Surroundings:
    """Facts about a batch, computed once on thumbnails and read back from the device once.

    Args:
        images: RGB in [0, 1], ``(B, 3, H, W)`` float32.

    Attributes:
        grey: Per image, whether it looks grey.
        has_background: Per image, whether it shows an object before a background.
    """

    def __init__(self, images: Tensor) -> None:
        self.size = (images.shape[-2], images.shape[-1])
        self._small = thumbnails(images)
        self._foreground = foreground_of_thumbnails(self._small)
        self._filled: dict[int, Tensor] = {}

        self._factor = shrink_factor(images)
        self._reach: dict[int, Tensor] = {}

        inner = -F.max_pool2d(-self._foreground, 5, stride=1, padding=2)
        chroma = (self._small.amax(1) - self._small.amin(1)).mean((1, 2))
        luma = F.avg_pool2d(self._small.mean(1, keepdim=True), 5, stride=1, padding=2, count_include_pad=False)
        # One transfer for all that the host decides on.
        packed = torch.cat([self._foreground, self._foreground - inner, luma], dim=1).cpu()
        self._object_pixels = [mask.flatten().nonzero()[:, 0] for mask in packed[:, 0]]
        self._edge_pixels = [mask.flatten().nonzero()[:, 0] for mask in packed[:, 1]]
        self._luma = packed[:, 2]
        self.grey = [value < GREY_CHROMA for value in chroma.tolist()]
        count = packed.shape[-2] * packed.shape[-1]
        self.has_background = [len(pixels) < count for pixels in self._object_pixels]

    def place(self, image: int, rank: float, *, at_edge: bool = False) -> tuple[float, float]:
        """Row and column in pixels of the object's pixel at a rank in [0, 1).

        Args:
            image: Index in the batch.
            rank: Which of the object's pixels.
            at_edge: Half of the ranks go to the object's outline, where parts break off.
        """
        pixels = self._object_pixels[image]
        if at_edge:
            if rank < 0.5 and len(self._edge_pixels[image]):
                pixels = self._edge_pixels[image]
            rank = (2.0 * rank) % 1.0
        width = self._luma.shape[-1]
        at = int(pixels[min(int(rank * len(pixels)), len(pixels) - 1)])
        # Sub-cell position from the rank's remainder, so that centres do not sit on the thumbnail's lattice.
        rest = (rank * len(pixels)) % 1.0
        row = (at // width + rest) * self._factor
        col = (at % width + (rest * 7.0) % 1.0) * self._factor
        return min(row, self.size[0] - 1.0), min(col, self.size[1] - 1.0)

    def luma_at(self, image: int, centre: tuple[float, float]) -> float:
        """Mean luminance in [0, 1] around a place given in pixels."""
        height, width = self._luma.shape[-2:]
        row, col = int(centre[0] / self._factor), int(centre[1] / self._factor)
        return float(self._luma[image, min(row, height - 1), min(col, width - 1)])

    def reach(self, image: int) -> Tensor | None:
        """Slightly dilated foreground, where defects may show, ``(H, W)`` of {0, 1}; None for everywhere."""
        if not self.has_background[image]:
            return None
        if image not in self._reach:
            grown = F.max_pool2d(self._foreground[image : image + 1], 3, stride=1, padding=1)
            self._reach[image] = enlarge(grown, self._factor, self.size)[0, 0]
        return self._reach[image]

    def fill(self, image: int, rows: slice, cols: slice, seed: int) -> Tensor:
        """What lies behind the object on a crop: smoothed background, or smoothed surroundings of a texture.

        Args:
            image: Index in the batch.
            rows: Row slice of the crop.
            cols: Column slice of the crop.
            seed: Start of the grain, which keeps the fill from looking painted.

        Returns:
            Pixels in [0, 1], ``(3, h, w)``.
        """
        if image not in self._filled:
            self._filled[image] = self._behind(image)
        smooth = self._filled[image][:, rows, cols]
        grain = torch.randn(smooth.shape[-2:], generator=seeded(seed)).to(smooth.device)
        return (smooth + 0.012 * grain).clamp(0.0, 1.0)

    def _behind(self, image: int) -> Tensor:
        small = self._small[image : image + 1]
        weight = torch.ones_like(small[:, :1])
        if self.has_background[image]:
            weight = 1.0 - F.max_pool2d(self._foreground[image : image + 1], 5, stride=1, padding=2)
        size = 2 * (min(small.shape[-2:]) // 4) + 1
        sigma = (size / 4.0, size / 4.0)
        colour = kornia.filters.gaussian_blur2d(small * weight, size, sigma, border_type="replicate")
        mass = kornia.filters.gaussian_blur2d(weight, size, sigma, border_type="replicate")
        overall = (small * weight).mean((2, 3), keepdim=True) / weight.mean().clamp(min=1e-3)
        smooth = (colour + 0.01 * overall) / (mass + 0.01)
        return F.interpolate(smooth, size=self.size, mode="bilinear")[0].clamp(0.0, 1.0)
