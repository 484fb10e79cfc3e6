"""Fusion block: image tokens and text tokens look at each other, and a gate decides how much of it is kept."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention from one modality to the other, pre-norm.

    Args:
        dim: Token width ``d``.
        heads: Number of heads; must divide ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """What ``tokens`` ``(B, N, d)`` read from ``context`` ``(B, M, d)``: ``(B, N, d)``."""
        query = self._split(self.query(self.norm_query(tokens)))
        key, value = (self._split(part) for part in self.key_value(self.norm_context(context)).chunk(2, dim=-1))
        read = F.scaled_dot_product_attention(query, key, value)
        return self.output(read.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FusionLayer(nn.Module):
    """Text reads the image, then the image reads the text, then a small MLP on the image tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.text_from_image = CrossAttention(dim, heads)
        self.image_from_text = CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange between image tokens ``(B, N, d)`` and text tokens ``(B, T, d)``."""
        text = text + self.text_from_image(text, image)
        image = image + self.image_from_text(image, text)
        return image + self.mlp(image), text


class EvidenceGate(nn.Module):
    """Channel gate and spatial gate in ``[0, 1]``, from the features and from where the two predictions fire.

    Where vision and text disagree (a misaligned modality) the gate can shut the exchange off.

    Args:
        dim: Token width ``d``.
        evidence: Number of evidence channels (standardised distances and text margins).
    """

    def __init__(self, dim: int, evidence: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.Linear(2 * dim + 2 * evidence, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim))
        self.spatial = nn.Sequential(nn.Linear(2 * dim + evidence, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1))

    def forward(self, image: Tensor, text: Tensor, evidence: Tensor) -> Tensor:
        """Gate ``(B, N, d)`` from image tokens ``(B, N, d)``, text ``(B, d)`` and evidence ``(B, N, E)``."""
        summary = torch.cat([image.mean(dim=1), text, evidence.mean(dim=1), evidence.amax(dim=1)], dim=-1)
        channel = self.channel(summary).sigmoid()[:, None]
        spread = text[:, None].expand(-1, image.shape[1], -1)
        return channel * self.spatial(torch.cat([image, spread, evidence], dim=-1)).sigmoid()


class FusionBlock(nn.Module):
    """Two layers of two-way cross-attention, gated by the evidence; an untrained block is the identity.

    Source: two-way cross-attention after CLIP-FSAC++ (Zuo et al., 2024); the gate and the zero start are ours.

    Args:
        dim: Token width ``d``.
        evidence: Number of evidence channels ``E``.
        layers: Number of exchanges.
        heads: Number of attention heads.
    """

    def __init__(self, dim: int, evidence: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(dim, heads) for _ in range(layers))
        self.gate = EvidenceGate(dim, evidence)
        self.strength = nn.Parameter(torch.zeros(dim))

    def forward(self, fused_map: Tensor, text: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange and gate.

        Args:
            fused_map: Image features ``(B, d, h, w)``.
            text: Text tokens ``(B, T, d)``.
            evidence: Standardised predictions ``(B, E, h, w)``.

        Returns:
            The fused map ``(B, d, h, w)`` and the text tokens ``(B, T, d)`` after the exchange.
        """
        image = fused_map.flatten(2).transpose(1, 2)
        exchanged = image
        for layer in self.layers:
            exchanged, text = layer(exchanged, text)
        gate = self.gate(exchanged, text.mean(dim=1), evidence.flatten(2).transpose(1, 2))
        image = image + self.strength * gate * exchanged
        return image.transpose(1, 2).unflatten(2, fused_map.shape[-2:]), text
