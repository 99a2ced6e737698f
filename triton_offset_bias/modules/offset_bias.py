"""A free parameter per offset."""

from typing import Literal

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import check_flag, check_offset_range, checked_count

METHODS = ("interpolate", "extend")


class OffsetBias(nn.Module):
    """One free number per head and offset, shared by all pairs that far apart.

        bias[h, offset] = weight[h, offset + origin]

    The origin is ``max_length - 1``, with ``2 * max_length - 1`` parameters a head. When not bidirectional, it is 0,
    with ``max_length`` parameters a head for the offsets of causal attention. An offset without a parameter sees the
    nearest end.

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
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``. Only the
            heads of this rank, if the weight is a DTensor that is sharded along the heads.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        check_offset_range(min_offset, max_offset)
        # Under tensor parallelism the weight is a DTensor, and this rank's heads are its local part.
        weight: Tensor = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        return table.per_offset(weight.float(), min_offset, max_offset, self.origin)

    def resized(self, max_length: int, method: Literal["interpolate", "extend"] = "interpolate") -> Tensor:
        """The parameter of a module of another length, for example to go on training on longer sequences.

            "interpolate":  new[h, offset] = bias[h, offset * (self.max_length - 1) / (max_length - 1)]
            "extend":       new[h, offset] = bias[h, offset]

        "interpolate" stretches or shrinks each side of offset 0 as a whole, with linear interpolation: the number of
        the old furthest offset becomes the number of the new furthest offset. "extend" leaves every offset its number,
        and repeats or cuts off the ends. Attention then sees the same bias as before, and offsets beyond the old ends
        have numbers of their own to train. A new module loads the result:

            new = OffsetBias(num_heads, max_length, bidirectional)
            new.load_state_dict({"weight": old.resized(max_length)})

        Args:
            max_length: length of the new module.
            method: "interpolate" (default) or "extend".

        Returns:
            (num_heads, 2 * max_length - 1), or (num_heads, max_length) when not bidirectional. The result is
            differentiable, in the parameter's dtype, and interpolated in float32 or finer. The same length gives the
            same numbers.

        Raises:
            TypeError: `max_length` is no int.
            ValueError: `max_length` is below 1, or `method` is neither "interpolate" nor "extend".

        Source:
            Chen et al. 2023 (Position Interpolation, arXiv:2306.15595), equation 4, which scales positions down into
            the trained range by the ratio of lengths. Here the ratio is of the furthest offsets, ``length - 1``.
        """
        checked_count("max_length", max_length)
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        weight, lowest = self.weight, 1 - max_length if self.bidirectional else 0
        if method == "extend" or max_length in (1, self.max_length):
            return table.per_offset(weight, lowest, max_length - 1, self.origin)
        offsets = torch.arange(lowest, max_length, device=weight.device)
        # The arithmetic is in whole numbers, because float32 would round the places of a long table.
        scaled, steps = offsets * (self.max_length - 1), max_length - 1
        columns = scaled.div(steps, rounding_mode="floor") + self.origin
        fractions = (scaled % steps).to(torch.promote_types(weight.dtype, torch.float32)) / steps
        numbers = weight.to(fractions.dtype)
        following = numbers[:, (columns + 1).clamp(max=weight.shape[1] - 1)]
        return torch.lerp(numbers[:, columns], following, fractions).to(weight.dtype)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, max_length={self.max_length}, bidirectional={self.bidirectional}"
