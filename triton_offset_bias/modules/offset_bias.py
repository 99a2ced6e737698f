"""The free parameter per offset."""

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.validators import check_flag, check_offset_range, checked_count


class OffsetBias(nn.Module):
    """One free number per head and offset, shared by all pairs that far apart.

        bias[h, offset] = weight[h, offset + origin]

    The origin is ``max_length - 1`` (``2 * max_length - 1`` parameters a head); when not bidirectional it is 0
    (``max_length`` parameters a head, for the offsets of causal attention). Offsets outside see the nearest end.

    Args:
        num_heads: heads, each with numbers of its own.
        max_length: longest sequence whose offsets all have a parameter of their own.
        bidirectional: whether negative offsets (keys after the query) have parameters.

    Attributes:
        weight: (num_heads, 2 * max_length - 1) or (num_heads, max_length) parameter in nats, initially 0.

    Raises:
        TypeError: `num_heads` or `max_length` is no int, or `bidirectional` no bool.
        ValueError: `num_heads` or `max_length` is below 1.

    Source:
        Raffel et al. 2020 (T5, arXiv:1910.10683), section 2.1, with one bucket per offset.
    """

    def __init__(self, num_heads: int, max_length: int, bidirectional: bool = True) -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        self.max_length = checked_count("max_length", max_length)
        check_flag("bidirectional", bidirectional)
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.zeros(num_heads, 2 * max_length - 1 if bidirectional else max_length))

    @property
    def origin(self) -> int:
        """The column of `weight` that holds offset 0."""
        return self.max_length - 1 if self.bidirectional else 0

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        check_offset_range(min_offset, max_offset)
        return table.per_offset(self.weight.float(), min_offset, max_offset, self.origin)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, max_length={self.max_length}, bidirectional={self.bidirectional}"
