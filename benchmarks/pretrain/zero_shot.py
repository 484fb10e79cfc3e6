"""Zero-shot text check: synthetic defects on held-out photographs, damaged against flawless prompts.

Nothing about an image but the name of what it shows is given to the encoder, no reference and no training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.prompting import PromptSet, build_prompts
from anomalib_vtfusion.synthesis import FAMILIES, AnomalySynthesizer
from benchmarks.pretrain.evaluate import auroc
from benchmarks.pretrain.inspection import FAMILY_PHRASES
from benchmarks.pretrain.sources import Source

_BATCH = 16


def prompt_mean(encoder: VisionTextEncoder, prompts: tuple[str, ...]) -> Tensor:
    """Mean direction ``(D,)`` of several prompts, unit length."""
    return F.normalize(encoder.encode_text(prompts).mean(0), dim=0)


def text_table(encoder: VisionTextEncoder, prompts: PromptSet) -> Tensor:
    """Unit vectors ``(2 + n, D)``: normal, anomalous and each defect phrase of :data:`FAMILY_PHRASES`."""
    phrases = [prompts.defects[phrase] for phrase in _phrases()]
    return torch.stack([prompt_mean(encoder, p) for p in (prompts.normal, prompts.anomalous, *phrases)])


def _phrases() -> tuple[str, ...]:
    return tuple(dict.fromkeys(phrase for phrases in FAMILY_PHRASES.values() for phrase in phrases))


@torch.inference_mode()
def zero_shot_check(
    encoder: VisionTextEncoder, source: Source, class_names: tuple[str, ...], seed: int = 0, copies: int = 2
) -> dict[str, Any]:
    """Draw defects on clean images and let the text tell which ones are damaged.

    Args:
        encoder: Encoder to judge.
        source: Held-out images.
        class_names: Names that the labels of ``source`` point to.
        seed: Seed of the defects.
        copies: Damaged versions of every image; the clean image is used once.

    Returns:
        Image AUROC of the pooled vector, of the highest dense token and of both together, pixel AUROC of the dense
        tokens, and image AUROC by family and by defect word (that family's images against all clean ones).
    """
    synthesizer = AnomalySynthesizer(clean_fraction=0.0)
    generator = torch.Generator().manual_seed(seed)
    labels = sorted(set(source.labels.tolist()))
    tables = {label: text_table(encoder, build_prompts(class_names[label])) for label in labels}
    pooled_scores, dense_scores, word_scores, truths = [], [], [], []
    pixel_scores, pixel_truths = [], []
    families: list[str] = []
    for start in range(0, len(source.labels), _BATCH):
        rows = torch.arange(start, min(start + _BATCH, len(source.labels)))
        images = F.interpolate(
            source.take(rows).float() / 255, size=encoder.image_size, mode="bilinear", antialias=True
        )
        images = images.clamp(0, 1)
        table = torch.stack([tables[label] for label in source.labels[rows].tolist()])
        for copy in range(copies + 1):
            batch = synthesizer(images, generator) if copy else None
            features = encoder.encode_image(batch.images if batch else images)
            pooled = torch.einsum("bd,bnd->bn", features.pooled, table)
            dense = torch.einsum("bdhw,bnd->bnhw", features.tokens, table)
            difference = dense[:, 1:] - dense[:, :1]
            pooled_scores.append(pooled[:, 1] - pooled[:, 0])
            dense_scores.append(difference[:, 0].flatten(1).amax(1))
            word_scores.append(difference[:, 1:].flatten(2).amax(2))
            families += batch.families if batch else ["clean"] * len(rows)
            truths.append(batch.labels if batch else torch.zeros(len(rows)))
            masks = batch.masks if batch else torch.zeros(len(rows), 1, *encoder.image_size)
            pixel_truths.append(F.adaptive_max_pool2d(masks, dense.shape[-2:]).flatten())
            pixel_scores.append(difference[:, 0].flatten())
    truth, pooled_score, dense_score = torch.cat(truths), torch.cat(pooled_scores), torch.cat(dense_scores)
    words = torch.cat(word_scores)
    family = [truth.new_tensor([f == name for f in families]).bool() for name in FAMILIES]
    clean = truth < 0.5

    def against_clean(scores: Tensor, chosen: Tensor) -> float | None:
        if not chosen.any():
            return None
        keep = chosen | clean
        return round(auroc(scores[keep], truth[keep]), 4)

    by_word = {}
    for number, phrase in enumerate(_phrases()):
        chosen = torch.zeros_like(clean)
        for name, members in zip(FAMILIES, family, strict=True):
            if phrase in FAMILY_PHRASES.get(name, ()):
                chosen |= members
        by_word[phrase] = {"images": int(chosen.sum()), "auroc": against_clean(words[:, number], chosen)}
    return {
        "images": {"clean": int(clean.sum()), "damaged": int((~clean).sum())},
        "image_auroc": {
            "pooled": round(auroc(pooled_score, truth), 4),
            "dense": round(auroc(dense_score, truth), 4),
            "both": round(auroc(pooled_score + dense_score, truth), 4),
        },
        "dense_auroc": round(auroc(torch.cat(pixel_scores), torch.cat(pixel_truths)), 4),
        "by_family": {name: against_clean(dense_score, chosen) for name, chosen in zip(FAMILIES, family, strict=True)},
        "by_word": by_word,
    }
