"""WinCLIP (Jeong et al. 2023) for a fair comparison: Anomalib's own with right references, and one for any encoder.

How both differ from Anomalib 2.7.0, whose few-shot mode takes references from the shuffled training loader, resized
but *not normalised*, while queries are normalised: here references pass the same pre-processing as queries, and all k
of them are used, in order. The class name has its underscores removed, as VTFusion's has.
"""

from typing import Any

import torch
import torch.nn.functional as F
from anomalib.data import InferenceBatch
from anomalib.models import WinClip
from anomalib.models.components import AnomalibModule
from anomalib.models.image.winclip.prompting import create_prompt_ensemble
from anomalib.models.image.winclip.torch_model import TEMPERATURE
from anomalib.models.image.winclip.utils import (
    class_scores,
    harmonic_aggregation,
    make_masks,
    visual_association_score,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.frozen_state import leave_out_of_state
from benchmarks.few_shot.encoder_baselines import resize_to

CHUNK = 64


class ReferenceWinClip(WinClip):
    """Anomalib's WinCLIP, whose references pass the same pre-processing as its queries."""

    def collect_reference_images(self, dataloader: DataLoader) -> Tensor:
        """First ``k_shot`` images ``(k, 3, H, W)`` of the training data, in order, pre-processed."""
        dataset: Any = dataloader.dataset
        transform = getattr(self.pre_processor, "transform", None)
        images = [dataset[index].image for index in range(self.k_shot)]
        return torch.stack([transform(image) if transform else image for image in images])


class CropWindowModel(nn.Module):
    """WinCLIP with windows cut from the image, for towers without a class token to mask tokens with.

    A window's embedding is the tower's embedding of that crop at its own resolution. The other parts (prompts, scores,
    harmonic mean over windows and scales, association with references) are Anomalib's.

    Args:
        encoder: Name of the encoder.
        weights: Its weights.
        image_size: Input size; None for the encoder's own.
        grid: The image is divided into ``grid x grid`` cells.
        scales: Sides of the windows, in cells.
        stride: Cells that windows move by; 2 costs a quarter of 1.

    Raises:
        ValueError: If the input cannot be divided so.
    """

    text: Tensor
    reference_patches: Tensor

    def __init__(
        self,
        encoder: str,
        weights: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        grid: int = 8,
        scales: tuple[int, ...] = (2, 3),
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = VisionTextEncoder(encoder, weights, image_size=image_size)
        height, width = self.encoder.image_size
        covered = all(0 < scale <= grid and (grid - scale) % stride == 0 and scale >= stride for scale in scales)
        if height % grid or width % grid or not covered:
            raise ValueError(
                f"Windows of {scales} cells that move by {stride} do not cover {height} x {width} images of "
                f"{grid} x {grid} cells."
            )
        self.grid, self.stride = grid, stride
        self.cell = (height // grid, width // grid)
        sides = [(scale * self.cell[0], scale * self.cell[1]) for scale in scales]
        crop_encoders = [VisionTextEncoder(encoder, weights, image_size=side) for side in sides]
        for crop_encoder in crop_encoders:
            crop_encoder.drop_text_tower()
        self.crop_encoders = nn.ModuleList(crop_encoders)
        self.masks = [make_masks((grid, grid), scale, stride) for scale in scales]
        self.register_buffer("text", torch.empty(0))
        self.register_buffer("reference_patches", torch.empty(0))
        self.reference_windows: list[Tensor] = []
        leave_out_of_state(self, "encoder")
        leave_out_of_state(self, "crop_encoders")

    @torch.no_grad()
    def setup(self, class_name: str, references: Tensor | None) -> None:
        """Embed the prompts, and the references ``(k, 3, H, W)`` if there are any."""
        states = [self.encoder.encode_text(prompts).mean(dim=0) for prompts in create_prompt_ensemble(class_name)]
        self.text = torch.stack(states)
        self.encoder.drop_text_tower()
        if references is not None:
            _, self.reference_windows, self.reference_patches, _ = self.encode(references)

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor, tuple[int, int]]:
        """Embeddings of images, windows and patches.

        Args:
            images: ``(B, 3, H, W)`` in ``[0, 1]``.

        Returns:
            Image embeddings ``(B, D)``, window embeddings of each scale ``(B, W, D)``, patch features ``(B, P, C)`` of
            the deepest map, and that map's size.
        """
        features = self.encoder.encode_image(images)
        patches = features.maps[-1].float()
        windows = [self._windows(images, encoder) for encoder in self.crop_encoders]
        return features.pooled, windows, patches.flatten(2).transpose(1, 2), (patches.shape[-2], patches.shape[-1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> InferenceBatch:
        """Scores ``(B,)`` and maps ``(B, H, W)`` of ``images`` ``(B, 3, H, W)`` in ``[0, 1]``."""
        pooled, windows, patches, size = self.encode(images)
        scores = class_scores(pooled, self.text, TEMPERATURE, target_class=1)
        whole = scores[:, None, None].expand(-1, *size)
        maps = [
            whole,
            *(self._to_map(class_scores(w, self.text, TEMPERATURE, 1), i, size) for i, w in enumerate(windows)),
        ]
        result = len(maps) / (1 / torch.stack(maps)).sum(dim=0)
        if self.reference_windows:
            near = visual_association_score(patches, self.reference_patches).reshape(-1, *size)
            pairs = zip(windows, self.reference_windows, strict=True)
            seen = [self._to_map(visual_association_score(w, r.to(w)), i, size) for i, (w, r) in enumerate(pairs)]
            association = torch.stack([near, *seen]).mean(dim=0)
            result = (result + association) / 2
            scores = (scores + association.amax(dim=(-2, -1))) / 2
        shape = (images.shape[-2], images.shape[-1])
        return InferenceBatch(
            pred_score=scores, anomaly_map=F.interpolate(result[:, None], shape, mode="bilinear")[:, 0]
        )

    def _windows(self, images: Tensor, encoder: Any) -> Tensor:
        """Embeddings ``(B, W, D)`` of all windows of one scale."""
        side = encoder.image_size
        step = (self.stride * self.cell[0], self.stride * self.cell[1])
        crops = F.unfold(images, kernel_size=side, stride=step).transpose(1, 2).reshape(-1, 3, *side)
        pooled = torch.cat([encoder.encode_image(chunk).pooled for chunk in crops.split(CHUNK)])
        return pooled.reshape(len(images), -1, pooled.shape[-1])

    def _to_map(self, window_scores: Tensor, scale: int, size: tuple[int, int]) -> Tensor:
        """Spread window scores ``(B, W)`` over the cells that they cover, at the patches' resolution."""
        masks = self.masks[scale].to(window_scores.device)
        cells = harmonic_aggregation(window_scores, (self.grid, self.grid), masks)
        return F.interpolate(cells[:, None], size=size, mode="bilinear")[:, 0]


class EncoderWinClip(ReferenceWinClip):
    """WinCLIP on any vision-text encoder, by crops.

    Args:
        class_name: What the images show.
        k_shot: Number of references; 0 for zero-shot.
        encoder: Name of the encoder.
        weights: Its weights.
        image_size: Input size; None for the encoder's own.
        grid: Cells of the image in each direction.
        scales: Sides of the windows in cells.
        stride: Cells that windows move by.
        **parts: Anomalib's ``post_processor``, ``evaluator`` and ``visualizer``.
    """

    def __init__(
        self,
        class_name: str | None = None,
        k_shot: int = 0,
        encoder: str = "vtfusion-tiny",
        weights: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        grid: int = 8,
        scales: tuple[int, ...] = (2, 3),
        stride: int = 1,
        **parts: Any,
    ) -> None:
        model = CropWindowModel(encoder, weights, image_size, grid, tuple(scales), stride)
        # Past WinClip's own constructor, which builds a ViT with downloaded weights.
        AnomalibModule.__init__(self, pre_processor=resize_to(model.encoder.image_size), **parts)
        self.model = model
        self.class_name = class_name
        self.k_shot = k_shot
        self.few_shot_source = None
        self.is_setup = False
