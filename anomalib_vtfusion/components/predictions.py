"""Predictions that need no training: text similarity, and the map and score that the network refines."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Score of a map: the mean of its highest one per cent (AnomalyDINO, Damm et al., 2025).
TOP_FRACTION = 0.01
# Standardised distance that is called as likely anomalous as not, before any calibration.
NEUTRAL_DISTANCE = 3.0


def text_margin(joint_tokens: Tensor, states: Tensor) -> Tensor:
    """How much closer each location is to the anomalous than to the normal state.

    Args:
        joint_tokens: Unit vectors ``(B, D, h, w)`` in the joint space.
        states: Unit text embeddings ``(2, D)``: normal, anomalous.

    Returns:
        Difference of cosines ``(B, 1, h, w)`` in ``[-2, 2]``; a softmax over the two states is the sigmoid of this
        times the temperature.
    """
    direction = (states[1] - states[0])[None, :, None, None]
    return (joint_tokens * direction).sum(dim=1, keepdim=True)


def base_logits(visual: Tensor, textual: Tensor, text_weight: float) -> Tensor:
    """Training-free anomaly logits from standardised evidence.

    The logit is ``log(softplus(z) / softplus(z0))``: it grows with the logarithm of the evidence, so that the sigmoid
    never saturates and strong anomalies keep their order in single precision.

    Args:
        visual: Standardised distances ``(B, L, h, w)``.
        textual: Standardised text margin ``(B, 1, h, w)``.
        text_weight: Share of the text in the evidence, in ``[0, 1]``.

    Returns:
        ``(B, 1, h, w)``; zero where the evidence ``z`` equals `NEUTRAL_DISTANCE`.
    """
    evidence = (1 - text_weight) * visual.mean(dim=1, keepdim=True) + text_weight * textual
    # log(softplus(z)) underflows for very negative z; its limit there is z itself.
    return torch.where(
        evidence > -15,
        torch.log(F.softplus(evidence.clamp_min(-15))),
        evidence,
    ) - math.log(math.log1p(math.exp(NEUTRAL_DISTANCE)))


def top_mean(logits: Tensor) -> Tensor:
    """Mean of the highest `TOP_FRACTION` of a map ``(B, 1, H, W)``, at least one pixel: ``(B, 1)``."""
    flat = logits.flatten(1)
    count = max(1, round(TOP_FRACTION * flat.shape[1]))
    return flat.topk(count, dim=1).values.mean(dim=1, keepdim=True)
