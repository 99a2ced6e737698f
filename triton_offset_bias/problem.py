"""A checked attention call, as it travels from the public function to a backend."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """One attention call with every argument checked and every default filled in.

    Shapes as in `offset_bias_attention`. A key is attended to when `min_offset <= offset <= max_offset` and the padding
    mask allows it. `bias_origin` and `beyond` are meaningless when `bias` is None. The fields, in this order, are the
    arguments of the operators.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    key_padding_mask: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    scale: float
    dropout_p: float
    query_start: int
    min_offset: int
    max_offset: int
    bias_origin: int
    beyond: str
    deterministic: bool
