"""Attention over several devices: a sequence that is spread over ranks, and tables whose heads are."""

from triton_offset_bias.distributed.context_parallel import parallelize_context
from triton_offset_bias.distributed.functional import offset_bias_attention, offset_bias_attention_varlen
from triton_offset_bias.distributed.sharding import positions, shard, unshard
from triton_offset_bias.distributed.spans import spans_of
from triton_offset_bias.distributed.tensor_parallel import HeadParallel

__all__ = [
    "HeadParallel",
    "offset_bias_attention",
    "offset_bias_attention_varlen",
    "parallelize_context",
    "positions",
    "shard",
    "spans_of",
    "unshard",
]
