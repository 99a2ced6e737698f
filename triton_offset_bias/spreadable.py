"""What modules that attend have in common, so that `distributed.parallelize_context` can spread them over ranks."""

from collections.abc import Callable

from torch import Tensor

from triton_offset_bias.functional import offset_bias_attention


class SpreadableAttention:
    """Base of modules that attend by `_attend`. `distributed.parallelize_context` changes the two private attributes.

    Attributes:
        is_spreadable: whether each rank of a group may hold an equal part of every sequence.
    """

    is_spreadable: bool = True
    _attend: Callable[..., Tensor] = staticmethod(offset_bias_attention)
    _ranks: int = 1  # that hold a part of each sequence
