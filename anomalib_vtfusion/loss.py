"""Training loss: focal and dice on the maps, pull and push on the distances, cross-entropy on the image score."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary focal loss, averaged over all pixels (Lin et al., 2017, equation 4, without class weight).

    Args:
        logits: Any shape.
        target: Same shape, values in ``[0, 1]``.
        gamma: Focus on hard pixels; 0 is plain cross-entropy.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    error = probability * (1 - target) + (1 - probability) * target
    return (error.pow(gamma) * cross_entropy).mean()


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft dice loss of each image, averaged (Milletari et al., 2016).

    Args:
        logits: ``(B, 1, H, W)``.
        target: ``(B, 1, H, W)`` in ``[0, 1]``; images without a target pixel do not count, for any prediction on them
            would cost nearly the same.
        smooth: Added to both sides of the fraction.

    Returns:
        Scalar in ``[0, 1]``.
    """
    probability, target = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = 2 * (probability * target).sum(dim=1) + smooth
    dice = 1 - overlap / (probability.sum(dim=1) + target.sum(dim=1) + smooth)
    has_target = (target.sum(dim=1) > 0).to(dice)
    return (dice * has_target).sum() / has_target.sum().clamp_min(1)


def pull_push_loss(standardised: Tensor, mask: Tensor, pull_margin: float = 1.0, push_margin: float = 6.0) -> Tensor:
    """Hinge that pulls normal patches to the references and pushes damaged ones away (PCSNet, Jiang et al., 2025).

    Args:
        standardised: Distances ``(B, 1, h, w)`` in leave-one-out deviations.
        mask: Share ``(B, 1, h, w)`` of damaged pixels of each patch, in ``[0, 1]``.
        pull_margin: Normal patches nearer than this cost nothing.
        push_margin: Damaged patches farther than this cost nothing.

    Returns:
        Scalar, in deviations: the mean over normal patches plus the mean over damaged ones.
    """
    damaged = (mask > 0.25).to(standardised)
    normal = (mask <= 0).to(standardised)  # patches on the rim of a defect are neither
    pull = (F.relu(standardised - pull_margin) * normal).sum() / normal.sum().clamp_min(1)
    push = (F.relu(push_margin - standardised) * damaged).sum() / damaged.sum().clamp_min(1)
    return pull + push


class VTFusionLoss(nn.Module):
    """Weighted sum of the parts.

    Args:
        text: Weight of the text maps.
        distance: Weight of the pull and push hinge.
        image: Weight of the image score.
    """

    def __init__(self, text: float = 0.5, distance: float = 0.1, image: float = 0.5) -> None:
        super().__init__()
        self.weights = {"map": 1.0, "text": text, "distance": distance, "image": image}

    def forward(
        self,
        logits: Tensor,
        text_logits: Tensor,
        distances: Tensor,
        image_logits: Tensor,
        mask: Tensor,
    ) -> dict[str, Tensor]:
        """Parts of the loss and their weighted sum ``total``.

        Args:
            logits: Refined map ``(B, 1, 4h, 4w)``.
            text_logits: Text maps ``(B, L, h', w')``.
            distances: Standardised distances ``(B, L, h', w')``.
            image_logits: ``(B, 1)``.
            mask: Ground truth ``(B, 1, H, W)`` in ``{0, 1}``.
        """
        coarse = self._share(mask, text_logits)
        layers = range(text_logits.shape[1])
        parts = {
            "map": self.map_loss(logits, mask),
            "text": torch.stack([self._segmentation(text_logits[:, i : i + 1], coarse) for i in layers]).mean(),
            "distance": pull_push_loss(
                distances.flatten(0, 1)[:, None],
                coarse.expand(-1, distances.shape[1], -1, -1).flatten(0, 1)[:, None],
            ),
            "image": F.binary_cross_entropy_with_logits(image_logits, mask.amax(dim=(2, 3))),
        }
        parts["total"] = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return parts

    def map_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Focal and dice loss of a map ``(B, 1, h, w)`` against the ground truth ``(B, 1, H, W)``, without weight."""
        return self._segmentation(logits, self._share(mask, logits))

    @staticmethod
    def _share(mask: Tensor, like: Tensor) -> Tensor:
        """Share of damaged pixels in each cell of the map ``like``."""
        return F.adaptive_avg_pool2d(mask, (like.shape[-2], like.shape[-1]))

    @staticmethod
    def _segmentation(logits: Tensor, target: Tensor) -> Tensor:
        return focal_loss(logits, target) * 10 + dice_loss(logits, target)
