"""Tables of a low rank: a few tables for all heads, which every query mixes by numbers of its own."""

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import check_offset_range, checked_count
from triton_offset_bias.modules.gated import GatedBias


class LowRankOffsetBias(GatedBias):
    """`rank` tables for all heads, mixed by a projection of the attention's input; 0 outside of ``[0, extent)``.

        bias[b, h, i, offset] = sum over r of proj(x[b, i])[h, r] * weight[r, offset]

    Args:
        embed_dim: width of the attention's input.
        num_heads: heads, each with numbers of its own for every query.
        rank: tables.
        extent: offsets, from 0 on, that have parameters.

    Attributes:
        proj: linear without bias, `embed_dim` to ``num_heads * rank``, Inkling's ``r_proj``.
        weight: (rank, extent) parameter in nats, initially 0, the layout of Inkling's ``rel_logits_proj.proj``.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is below 1.

    Source:
        The public code of Inkling in transformers (``InklingRelativeLogits``).
    """

    def __init__(self, embed_dim: int, num_heads: int, rank: int, extent: int) -> None:
        super().__init__()
        self.num_heads, self.rank = checked_count("num_heads", num_heads), checked_count("rank", rank)
        self.proj = nn.Linear(checked_count("embed_dim", embed_dim), num_heads * rank, bias=False)
        self.weight = nn.Parameter(torch.zeros(rank, checked_count("extent", extent)))

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The tables of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (rank, max_offset - min_offset + 1) float32; as `bias`, their `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        check_offset_range(min_offset, max_offset)
        # A column of zeros at each end stands for all offsets without parameters.
        padded, origin = table.extended(self.weight.float(), 0, "zero")
        return table.per_offset(padded, min_offset, max_offset, -origin)

    def factors(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The query as it is, and the gate of `x`, (B, H, L, rank)."""
        return query, self.proj(x).unflatten(-1, (self.num_heads, self.rank)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, rank={self.rank}, extent={self.weight.shape[1]}"
