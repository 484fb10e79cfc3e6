"""Text embeddings of the normal and the anomalous state and of the defects, kept as buffers once they are known."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_vtfusion.components.variable_buffers import VariableBuffers


class TextEncoder(Protocol):
    """What is needed of a text tower."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings ``(N, D)``."""

    def encode_text_with_context(self, prompts: Sequence[str], context: Tensor) -> Tensor:
        """Unit embeddings ``(N, D)`` with context tokens ``(M, W)`` in front of each prompt."""


class Prompts(Protocol):
    """What is needed of a prompt set: the phrases of both states, and prompts by defect phrase."""

    @property
    def normal(self) -> tuple[str, ...]:
        """Prompts of the normal state."""

    @property
    def anomalous(self) -> tuple[str, ...]:
        """Prompts of the anomalous state."""

    @property
    def defects(self) -> dict[str, tuple[str, ...]]:
        """Prompts of each defect phrase."""


def ensemble(embeddings: Tensor) -> Tensor:
    """Mean of unit embeddings ``(N, D)``, unit length again: ``(D,)`` (as open_clip's zero-shot classifier does)."""
    return F.normalize(F.normalize(embeddings, dim=-1).mean(dim=0), dim=-1)


class TextFeatures(VariableBuffers):
    """Embeddings of the states ``(2, D)`` and of the defect phrases ``(P, D)``.

    Args:
        embed_dim: Width ``D`` of the joint space.
        text_width: Width ``W`` of the text tower's tokens.
        context_length: Number ``M`` of learnable context tokens (CoOp, Zhou et al., 2022; PromptAD, Li et al., 2024);
            0 for none.
    """

    variable_buffers = ("defects",)

    def __init__(self, embed_dim: int, text_width: int, context_length: int) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(2, embed_dim))
        self.register_buffer("defects", torch.zeros(0, embed_dim))
        self.states: Tensor
        self.defects: Tensor
        self.phrases: tuple[str, ...] = ()
        self.context = nn.Parameter(0.02 * torch.randn(context_length, text_width)) if context_length else None

    @torch.no_grad()
    def embed(self, encoder: TextEncoder, prompts: Prompts) -> None:
        """Embed all prompts of a class."""
        self.states = torch.stack([ensemble(encoder.encode_text(p)) for p in (prompts.normal, prompts.anomalous)])
        self.defects = torch.stack([ensemble(encoder.encode_text(p)) for p in prompts.defects.values()])
        self.phrases = tuple(prompts.defects)

    def embed_with_context(self, encoder: TextEncoder, states: tuple[Sequence[str], Sequence[str]]) -> None:
        """Embed the state phrases behind the learnable context; gradients flow to the context.

        Args:
            encoder: The text tower.
            states: Phrases of the normal and of the anomalous state; the context takes the place of a template.
        """
        if self.context is not None:
            context = self.context
            self.states = torch.stack([ensemble(encoder.encode_text_with_context(p, context)) for p in states])
