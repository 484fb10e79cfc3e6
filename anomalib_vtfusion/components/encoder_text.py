"""One view of every text tower of ``open_clip``: prompts in, joint-space embeddings out, with or without context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK = 256  # prompts per pass: bounds memory for large prompt ensembles


class TextTower(nn.Module):
    """Text half of an ``open_clip`` model.

    The model keeps its text modules at its own top level (``CLIP``) or in ``model.text`` (``CustomTextCLIP``,
    ``CoCa``). Both are driven through its own ``encode_text``, so that masks and pooling are always the model's.

    Args:
        clip: The model; its ``visual`` and, where present, ``text_decoder`` are removed from it.
        tokenizer: Callable from a list of strings and a ``context_length`` to token ids.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        super().__init__()
        del clip.visual
        if hasattr(clip, "text_decoder"):
            del clip.text_decoder
        self.clip: Any = clip  # which of its kinds it is shows in its attributes
        self.tokenizer = tokenizer
        inner = clip.text if hasattr(clip, "text") else clip
        self.context_length: int = inner.context_length
        self.width: int = inner.token_embedding.embedding_dim
        self.logit_scale = float(clip.logit_scale.detach().exp())
        self._has_start_token = len(set(self.tokenize(["metal", "hazel"])[:, 0].tolist())) == 1

    @property
    def token_embedding(self) -> nn.Embedding:
        """Table of word vectors."""
        return self.clip.text.token_embedding if hasattr(self.clip, "text") else self.clip.token_embedding

    def tokenize(self, prompts: Sequence[str], room: int = 0) -> Tensor:
        """Turn prompts into token ids ``(N, context_length - room)``.

        Raises:
            TypeError: If a single string is given instead of a sequence.
            ValueError: If there is no prompt or one is empty.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a sequence of strings, not the single string {prompts!r}.")
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise ValueError("prompts must hold at least one prompt and no empty ones.")
        return self.tokenizer(list(prompts), context_length=self.context_length - room)

    def forward(self, prompts: Sequence[str], context: Tensor | None = None) -> Tensor:
        """Embed prompts ``(N, D)`` with unit length; context vectors ``(M, width)`` go after the start token.

        Raises:
            ValueError: If the context has another width or leaves no room for words.
        """
        length = 0
        if context is not None:
            if context.ndim != 2 or context.shape[1] != self.width:
                raise ValueError(f"context must be (M, {self.width}), got {tuple(context.shape)}.")
            length = context.shape[0]
            if length > self.context_length - 3:  # start, one word, end
                raise ValueError(f"{length} context vectors leave no room for words in {self.context_length} tokens.")
        tokens = self.tokenize(prompts, room=length).to(self.token_embedding.weight.device)
        parts = [self._encode(chunk, context) for chunk in tokens.split(_CHUNK)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def _encode(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        if context is None or context.shape[0] == 0:
            return self.clip.encode_text(tokens, normalize=False)
        length, start = context.shape[0], int(self._has_start_token)
        # Copies of the first token hold the places of the context: they are never padding and never the end token, by
        # which the towers find the position to pool. Their word vectors are then replaced.
        places = tokens[:, :1].expand(-1, length)
        tokens = torch.cat([tokens[:, :start], places, tokens[:, start:]], dim=1)

        def put_context(_: nn.Module, __: tuple[Tensor, ...], words: Tensor) -> Tensor:
            vectors = context.to(words).expand(len(words), -1, -1)
            return torch.cat([words[:, :start], vectors, words[:, start + length :]], dim=1)

        handle = self.token_embedding.register_forward_hook(put_context)
        try:
            return self.clip.encode_text(tokens, normalize=False)
        finally:
            handle.remove()
