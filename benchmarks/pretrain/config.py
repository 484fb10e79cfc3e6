"""Settings of the recipe: what the encoder is and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Anomalib's own pre-processing uses the same figures, so other models can take the image tower as it is.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

TEMPLATES = ("a photo of a {}", "a close-up photo of a {}", "a picture of the {}", "a grey photo of a {}", "a {}")


def encoder_config(tower: str = "resnet10t", embed_dim: int = 192, image_size: int = 256) -> dict[str, Any]:
    """Return the contents of ``open_clip_config.json`` for the encoder.

    Args:
        tower: Name of a timm image network.
        embed_dim: Size of the joint image-text space.
        image_size: Input size in pixels that the pre-processing suggests.
    """
    return {
        "model_cfg": {
            "embed_dim": embed_dim,
            "vision_cfg": {
                "image_size": image_size,
                "timm_model_name": tower,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
            },
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
            "custom_text": True,
        },
        "preprocess_cfg": {
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


@dataclass(frozen=True)
class StageConfig:
    """One stage of the training.

    The learning rate follows a one-cycle whose position is the larger of ``step / steps`` and, when a time box is
    given, ``seconds trained / (60 * minutes)``. With ``minutes=None`` the run depends on the seed alone.

    Attributes:
        name: "names" (class names only), "inspection" (defects, masks and matching as well) or "prior" (VTFusion's own
            network on small tasks).
        steps: Optimiser steps at most.
        minutes: Time box in minutes of training, or None.
        size: Side of the square crops in pixels.
        batch: Images in a batch.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
    """

    name: str
    steps: int
    minutes: float | None
    size: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.05
    warm_up: float = 0.05
