"""Self-attention of a ViT's blocks with the tokens left as they lie."""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` on its own tokens, batch first, without dropout, mask or weights to return.

    Torch's own turns the batch over first. Under autocast that makes it copy the projection for every token: at eight
    images a tower took 13 times as long in bfloat16.

    Args:
        attention: Attention whose parameters are taken, under the same names.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> tuple[Tensor, None]:  # noqa: ARG002
        """Tokens ``(B, N, C)``, three times the same, to ``(B, N, C)``, as the blocks of open_clip ask."""
        parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        split = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)), None


def keep_tokens_in_place(blocks: nn.ModuleList) -> None:
    """Give the blocks of an open_clip ViT that use ``nn.MultiheadAttention`` a `SelfAttention` instead."""
    for block in blocks:
        attention = getattr(block, "attn", None)
        if isinstance(attention, nn.MultiheadAttention):
            block.attn = SelfAttention(attention)
