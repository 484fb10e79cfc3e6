"""Losses of the recipe; plain functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def names_loss(image_vectors: Tensor, text_vectors: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Contrast every image against the texts of all candidate classes (CLIP with class names as captions).

    Args:
        image_vectors: Unit vectors ``(B, D)``.
        text_vectors: Unit vectors ``(N, D)``, one for each candidate class.
        targets: Row of the right text for each image ``(B,)``.
        scale: Factor on the cosine (exp of the learnt logit scale).
    """
    return F.cross_entropy(scale * image_vectors @ text_vectors.T, targets, label_smoothing=0.1)


def candidate_classes(labels: Tensor, classes: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose the classes a batch is contrasted against: its own and random others up to ``count``.

    Args:
        labels: Class of each image ``(B,)``.
        classes: Number of classes in all.
        count: Number of candidates wished for.
        generator: CPU generator.

    Returns:
        Candidate classes ``(N,)`` in rising order and the position of each label among them ``(B,)``.
    """
    wanted = torch.zeros(classes)
    wanted[labels] = 2.0
    chosen = (wanted + torch.rand(classes, generator=generator)).topk(min(classes, max(count, len(labels)))).indices
    chosen = chosen.sort().values
    return chosen, torch.searchsorted(chosen, labels)


def coverage(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Part of each cell of a grid that the mask ``(B, 1, H, W)`` covers, ``(B, 1, h, w)`` in [0, 1]."""
    return F.adaptive_avg_pool2d(masks, (size[0], size[1]))


def balanced_bce(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy with the same weight on both sides, however few the positives are.

    Args:
        logits: Any shape.
        positive: Weights of the same shape for target 1; zero elsewhere.
        negative: Weights for target 0.
    """
    missed = (F.softplus(-logits) * positive).sum() / positive.sum().clamp(min=1)
    raised = (F.softplus(logits) * negative).sum() / negative.sum().clamp(min=1)
    return (missed + raised) / 2


def _sides(masks: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cells that must answer and cells that must not; those at the rim of a defect belong to neither."""
    covered = coverage(masks, size)
    # A defect smaller than a cell still has the cell it covers most.
    largest = covered.amax((2, 3), keepdim=True)
    positive = (covered > torch.minimum(largest * 0.5, torch.full_like(largest, 0.3))) & (covered > 0)
    near = F.max_pool2d(covered, 3, 1, 1) > 0
    return positive.float(), (~near).float()


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Balanced cross-entropy of a map of logits ``(B, 1, h, w)`` against masks ``(B, 1, H, W)``."""
    positive, negative = _sides(masks, logits.shape[-2:])
    return balanced_bce(logits.float(), positive, negative)


def patch_vectors(maps: list[Tensor]) -> list[Tensor]:
    """Smooth each map over 3 x 3 positions, bring it to the finest grid and to unit length per position.

    Args:
        maps: Features ``(B, C_l, h_l, w_l)``, finest first.

    Returns:
        For every map ``(B, C_l, h, w)``.
    """
    grid = maps[0].shape[-2:]
    smooth = [F.avg_pool2d(features, 3, 1, 1, count_include_pad=False) for features in maps]
    return [F.normalize(F.interpolate(s, size=grid, mode="bilinear", align_corners=False), dim=1) for s in smooth]


def nearest_distance(queries: Tensor, references: Tensor) -> Tensor:
    """Cosine distance of every query patch to the nearest patch of its own reference.

    Args:
        queries: Unit vectors ``(B, C, h, w)``.
        references: Unit vectors ``(B, C, h, w)``.

    Returns:
        Distances ``(B, 1, h, w)`` in [0, 2].
    """
    similarity = queries.flatten(2).transpose(1, 2) @ references.flatten(2)
    return 1 - similarity.amax(2).view(len(queries), 1, *queries.shape[-2:])


def matching_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Patches of a defect must have no match in the reference, all others must have one.

    Args:
        logits: Scaled distances ``(B, 1, h, w)``.
        masks: Defect masks ``(B, 1, H, W)``.
    """
    return mask_loss(logits, masks)


def ranking_loss(logits: Tensor, labels: Tensor, top: int = 4) -> Tensor:
    """Smooth count of wrongly ordered pairs of a damaged and a clean image, by their highest logits.

    Args:
        logits: Scaled distances ``(B, 1, h, w)``.
        labels: 1 for damaged images ``(B,)``.
        top: Number of highest positions averaged into the score of an image.
    """
    scores = logits.flatten(1).topk(top, 1).values.mean(1)
    damaged, clean = scores[labels > 0.5], scores[labels < 0.5]
    if not len(damaged) or not len(clean):
        return scores.sum() * 0
    return F.softplus(clean[None] - damaged[:, None]).mean()


def any_of_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross-entropy where every row may have several right answers: their probabilities count together.

    Args:
        logits: ``(B, K)``.
        positives: 1 for right answers ``(B, K)``.
    """
    right = logits.float().masked_fill(positives < 0.5, float("-inf")).logsumexp(1)
    return (logits.float().logsumexp(1) - right).mean()
