"""A user's program in which `mypy --strict` has to know every type; `test_packaging.py` runs it."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen
from triton_offset_bias.modules import (
    ALiBiBias,
    FireBias,
    KerpleBias,
    OffsetBias,
    OffsetBias2d,
    OffsetBiasAttention,
    SandwichBias,
    T5Bias,
    alibi_slopes,
    dense_bias,
    t5_buckets,
)

query = torch.randn(1, 2, 5, 8)
table = torch.randn(2, 9)

assert_type(offset_bias_attention(query, query, query, table), Tensor)
assert_type(offset_bias_attention(query, query, query, None, is_causal=True, return_lse=False), Tensor)
assert_type(offset_bias_attention(query, query, query, table, return_lse=True), tuple[Tensor, Tensor])

packed = torch.randn(5, 2, 8)
bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
out = offset_bias_attention_varlen(packed, packed, packed, table, bounds, bounds, 3, 3)
assert_type(out, Tensor)
longest = bounds.diff().max()
assert_type(offset_bias_attention_varlen(packed, packed, packed, table, bounds, bounds, longest, longest), Tensor)
pair = offset_bias_attention_varlen(packed, packed, packed, table, bounds, bounds, 3, 3, return_lse=True)
assert_type(pair, tuple[Tensor, Tensor])

flag = bool(torch.ones(1))
assert_type(offset_bias_attention(query, query, query, table, return_lse=flag), Tensor | tuple[Tensor, Tensor])
either = offset_bias_attention_varlen(packed, packed, packed, table, bounds, bounds, 3, 3, return_lse=flag)
assert_type(either, Tensor | tuple[Tensor, Tensor])

# Under --strict an ignored error that is none is an error.
offset_bias_attention(query, query, query, table, window_size=3)  # type: ignore[call-overload]
offset_bias_attention(query, query, query, table, causal=True)  # type: ignore[call-overload]
offset_bias_attention(query, query, query)  # type: ignore[call-overload]
OffsetBias(num_heads=2, max_length="9")  # type: ignore[arg-type]
KerpleBias(2, "linear")  # type: ignore[arg-type]

bias = OffsetBias(2, 9)
assert_type(bias.forward(-4, 4), Tensor)
assert_type(bias.weight, nn.Parameter)
assert_type(T5Bias(2).weight, nn.Parameter)
assert_type(ALiBiBias(2, learnable=True).slopes, nn.Parameter | None)
assert_type(KerpleBias(2, "log").r1, Tensor)
assert_type(FireBias(2, threshold=16).forward(0, 9), Tensor)
assert_type(SandwichBias(2, embed_dim=8).forward(0, 9), Tensor)
assert_type(OffsetBias2d(2, (3, 4)).positions(), Tensor)
assert_type(OffsetBiasAttention(16, 2, bias).forward(torch.randn(1, 5, 16)), Tensor)
assert_type(alibi_slopes(2), Tensor)
assert_type(dense_bias(bias, 4, 4), Tensor)
assert_type(t5_buckets(-4, 4), Tensor)
