"""Calls in bfloat16, which builds of the CPU engine multiply in ways of their own: each way to bias, edge and mask.

Blocks of AMX tiles have 32 queries and 32 keys, and a task of the backward pass 128 keys.
"""

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of

from triton_offset_bias import offset_bias_attention

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
LONG = {"lengths": (161, 290), "dims": (64, 64), "batch": 1}
OFFSETS = {"query_positions": torch.arange(61) * 3 % 41, "key_positions": torch.arange(97) * 5 % 83}

CASES = [
    Case("primes, heads that share keys, a loss of both results", (61, 97), (33, 72), heads=(6, 2), through_lse=True),
    Case("whole blocks, a table for each head of each sequence", (64, 96), (32, 64), bias="BHN"),
    Case("one query and one key more than blocks", (65, 129), (65, 33)),
    Case("causal", **LONG, through_lse=True, options={"is_causal": True}),
    Case("a window", **LONG, columns=31, options={"window_size": (40, 9)}),
    Case("no table", **LONG, bias=None),
    Case("no table, causal", **LONG, bias=None, options={"is_causal": True}),
    Case("holes", (61, 130), mask="holes", options={"is_causal": True}),
    Case("padding on the left", (61, 130), mask="left padding"),
    Case("forbidden offsets", (40, 50), forbidden=(3, 50, 51)),
    Case("negative scale", (61, 97), options={"scale": -0.7}),
    Case("scale 0: the table alone", (61, 97), options={"scale": 0.0}),
    Case("a scale whose inverse is large", (61, 97), options={"scale": 1e-7}),
    Case("large scale: nearly one key a query", (61, 97), options={"scale": 8.0}),
    Case("positions", (61, 97), options=OFFSETS | {"window_size": (60, 30)}, mask="holes"),
    Case("positions, no table", (61, 97), bias=None, options=OFFSETS | {"window_size": (60, 30)}),
    Case("dropout", (61, 161), (64, 40), heads=(4, 2), through_lse=True, options={"dropout_p": 0.3, "is_causal": True}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_bfloat16_calls_of_cpp_are_accurate(case):
    """Output, log-sum-exp and all gradients, by the one rule of accuracy."""
    call = build(Case(**{**vars(case), "dtype": torch.bfloat16}))
    assert_matches_oracle(call, results_of(call, "cpp"))


@pytest.mark.parametrize("largest", [1e30, 2e38])
def test_huge_numbers_in_the_table_are_told_apart(largest):
    """Divided by the scale they would be infinite: each query still attends to the key with the larger bias."""
    q, k = torch.ones(1, 1, 40, 64, dtype=torch.bfloat16), torch.ones(1, 1, 2, 64, dtype=torch.bfloat16)
    v = torch.tensor([1.0, 2.0], dtype=torch.bfloat16).view(1, 1, 2, 1)
    bias = torch.full((1, 81), largest)
    bias[:, ::2] /= 2
    got = offset_bias_attention(q, k, v, bias, bias_origin=40, query_start=0, backend="cpp")
    rows = torch.arange(40)
    assert torch.equal(got.flatten().float(), 1.0 + (rows % 2 == 0).float())
