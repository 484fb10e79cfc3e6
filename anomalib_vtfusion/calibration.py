"""Calibration without anomalies: queries made of the references, and thresholds learned on them."""

import torch
from anomalib.data import ImageBatch
from torch import Tensor

from anomalib_vtfusion.post_processor import FewShotPostProcessor
from anomalib_vtfusion.synthesis import AnomalySynthesizer
from anomalib_vtfusion.synthesis.views import ViewSampler
from anomalib_vtfusion.torch_model import VTFusionModel

# Views of the references that thresholds and statistics are measured on: at least, and at most.
FEWEST_VIEWS, MOST_VIEWS = 16, 64
CHUNK = 8


def calibration_views(images: Tensor, sampler: ViewSampler, seed: int) -> tuple[Tensor, Tensor]:
    """Harmless variations of the references.

    Args:
        images: References ``(k, 3, H, W)``.
        sampler: Draws the variations.
        seed: Seed of the variations.

    Returns:
        Views ``(Q, 3, H, W)`` and the index ``(Q,)`` of the reference that each one shows.
    """
    own = torch.arange(len(images), device=images.device).repeat(-(-FEWEST_VIEWS // len(images)))
    own = own[:: -(-len(own) // MOST_VIEWS)]
    return sampler(images[own], torch.Generator().manual_seed(seed)), own


@torch.no_grad()
def calibrate(
    post_processor: FewShotPostProcessor,
    model: VTFusionModel,
    views: Tensor,
    own: Tensor,
    seed: int,
) -> None:
    """Set thresholds from the references, each matched against the others, and from synthetic damage to them.

    Args:
        post_processor: Takes the thresholds.
        model: In eval mode.
        views: Normal views ``(Q, 3, H, W)``.
        own: Index ``(Q,)`` of the reference that each view shows.
        seed: Seed of the damage.
    """
    damaged = AnomalySynthesizer(clean_fraction=0.0)(views, torch.Generator().manual_seed(seed))
    images, own = torch.cat([views, damaged.images]), torch.cat([own, own])
    masks = torch.cat([torch.zeros_like(damaged.masks), damaged.masks])
    outputs = [
        model.to_probabilities(model.predict(chunk, chunk_own), images.shape[-2:])
        for chunk, chunk_own in zip(images.split(CHUNK), own.split(CHUNK), strict=True)
    ]
    scores, maps = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    labels = masks.amax(dim=(1, 2, 3)).bool()
    batch = ImageBatch(image=images, gt_mask=masks[:, 0].bool(), gt_label=labels, pred_score=scores, anomaly_map=maps)
    post_processor.calibrate(batch)
