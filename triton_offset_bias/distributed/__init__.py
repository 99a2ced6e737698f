"""Attention over a sequence that is spread over the ranks of a process group: context parallelism."""

from triton_offset_bias.distributed.functional import offset_bias_attention, offset_bias_attention_varlen
from triton_offset_bias.distributed.sharding import positions, shard, unshard
from triton_offset_bias.distributed.spans import spans_of

__all__ = ["offset_bias_attention", "offset_bias_attention_varlen", "positions", "shard", "spans_of", "unshard"]
