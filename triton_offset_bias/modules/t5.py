"""T5's bias: offsets share parameters in buckets that widen with the distance."""

import math

import torch
from torch import Tensor, nn

from triton_offset_bias.checks.arguments import check_flag, checked_count
from triton_offset_bias.modules.ranges import offset_range


def t5_buckets(
    min_offset: int,
    max_offset: int,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """The bucket of every offset from `min_offset` to `max_offset`, both included, as in the public T5.

    T5 counts ``key - query``, the negative of this package's offset. Half of a direction's buckets hold one distance
    each. The others grow in logarithmic steps up to `max_distance`. All longer distances share the last bucket.

    Args:
        min_offset: first offset (query minus key).
        max_offset: last offset, at least `min_offset`.
        num_buckets: buckets in all: at least 4, or 2 if not bidirectional.
        max_distance: all distances from this one on share the last bucket. It must exceed the number of distances that
            have a bucket of their own.
        bidirectional: whether keys after the query (negative offsets) have buckets of their own, the upper half of the
            buckets. Otherwise they share the bucket of offset 0.
        device: where to compute.

    Returns:
        (max_offset - min_offset + 1,) int64, from 0 to ``num_buckets - 1``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the range is empty, or there are too few buckets, or `max_distance` is too small.

    Source:
        Raffel et al. 2020 (T5, arXiv:1910.10683), section 2.1; Mesh TensorFlow's ``_relative_position_bucket`` for the
        rounding: float32, in the same order of operations.
    """
    exact, per_direction = _bucket_counts(num_buckets, max_distance, bidirectional)
    offsets = offset_range(min_offset, max_offset, device)
    distances = offsets.abs() if bidirectional else offsets.clamp(min=0)
    # The order of these float32 operations decides to which side of a boundary a distance falls.
    steps = torch.log(distances.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    coarse = exact + (steps * (per_direction - exact)).long()
    buckets = torch.where(distances < exact, distances, coarse.clamp(max=per_direction - 1))
    return buckets + (offsets < 0).long() * per_direction if bidirectional else buckets


def _bucket_counts(num_buckets: int, max_distance: int, bidirectional: bool) -> tuple[int, int]:
    """Numbers of buckets for each direction: the buckets that hold one distance, and all buckets."""
    check_flag("bidirectional", bidirectional)
    fewest = 4 if bidirectional else 2
    if checked_count("num_buckets", num_buckets) < fewest:
        raise ValueError(
            f"`num_buckets` must be at least {fewest} with bidirectional={bidirectional}, got {num_buckets}"
        )
    per_direction = num_buckets // 2 if bidirectional else num_buckets
    exact = per_direction // 2
    if checked_count("max_distance", max_distance) <= exact:
        raise ValueError(f"`max_distance` must exceed the {exact} distances with own buckets, got {max_distance}")
    return exact, per_direction


class T5Bias(nn.Module):
    """One free number per head and bucket of offsets.

        bias[h, offset] = weight[t5_buckets(offset), h]

    Args:
        num_heads: heads, each with numbers of its own.
        num_buckets: buckets in all, at least 4, or 2 if not bidirectional.
        max_distance: all distances from this one on share the last bucket.
        bidirectional: True for T5's encoder, False for its decoder's causal attention.

    Attributes:
        weight: (num_buckets, num_heads) parameter in nats, initially 0. It has the layout of T5's
            ``relative_attention_bias.weight``, which therefore loads and saves unchanged.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `num_heads` is below 1, `num_buckets` or `max_distance` is too small.

    Source:
        Raffel et al. 2020 (T5, arXiv:1910.10683), section 2.1.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        _bucket_counts(num_buckets, max_distance, bidirectional)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        buckets = t5_buckets(
            min_offset, max_offset, self.num_buckets, self.max_distance, self.bidirectional, self.weight.device
        )
        return self.weight.float()[buckets].T

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )
