"""Prior: initial weights learned on many small tasks, which an encoder may bring along beside its own.

A few normal images cannot teach what varies harmlessly and what does not. A prior starts the fit where many small tasks
on other pictures have led; it belongs to one set of encoder weights.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_HASH = "weights_hash"


# A learnable context belongs to one class name. Image adapters trained on other pictures made distances from the
# references tell less.
LEFT_OUT = ("text_features.", "image_adapter.adapters.")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a prior holds: all that train but those `LEFT_OUT`."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(LEFT_OUT)}


def save_prior(parameters: dict[str, Tensor], path: Path, weights_hash: str) -> None:
    """Write a prior in half precision, whole or not at all.

    Args:
        parameters: Values by name, as `trained_parameters` names them.
        path: File to write.
        weights_hash: Hash of the encoder's weights that it was learned on.
    """
    partial = path.with_suffix(".part")
    halved = {name: value.detach().cpu().half().contiguous() for name, value in parameters.items()}
    save_file(halved, partial, metadata={_HASH: weights_hash})
    partial.replace(path)


@torch.no_grad()
def load_prior(model: nn.Module, path: Path, weights_hash: str) -> list[str]:
    """Start a model from a prior.

    A part of the model (its adapters, say) whose shapes are not the prior's, because other layers were chosen or a
    component is switched off, keeps its own initial weights as a whole.

    Args:
        model: Changed in place.
        path: File that `save_prior` wrote.
        weights_hash: Hash of the model's encoder; nothing is taken from a prior of other weights.

    Returns:
        Names of the parts that were taken over.
    """
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get(_HASH) != weights_hash:
            logger.warning("%s belongs to other encoder weights and is not used.", path)
            return []
        prior = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    own = trained_parameters(model)
    taken = []
    for part in sorted({name.partition(".")[0] for name in own}):
        names = [name for name in own if name.partition(".")[0] == part]
        if all(name in prior and prior[name].shape == own[name].shape for name in names):
            for name in names:
                own[name].copy_(prior[name])
            taken.append(part)
    return taken
