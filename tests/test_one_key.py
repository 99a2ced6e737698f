"""Rows that attend to one key. The output is that key's value, and dS = P (dP - delta) is 0, without rounding noise.

The gradients of query, key and table are then exactly 0. An optimiser such as Adam would scale noise to whole steps.
"""

from typing import Any

import pytest
import torch
from cases import Call, Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE

from triton_offset_bias import offset_bias_attention_varlen

FLOAT16, BFLOAT16, FLOAT64 = torch.float16, torch.bfloat16, torch.float64
# `test_triton_one_key.py` tests the GPU kernels.
exact = pytest.mark.parametrize("backend", [name for name in AVAILABLE if name == "cpp"])
DTYPES = [torch.float32, FLOAT64, BFLOAT16, FLOAT16]


def _mask(batch: int, len_k: int) -> torch.Tensor:
    """A mask that leaves one key of each sequence, a different one in each."""
    mask = torch.zeros(batch, len_k, dtype=torch.bool)
    for b in range(batch):
        mask[b, (7 * b + 5) % len_k] = True
    return mask


ONE_KEY: dict[str, dict[str, Any]] = {
    "a window of one": {"lengths": (113, 113), "options": {"window_size": (0, 0)}},
    "a window of one, long": {"lengths": (401, 401), "dims": (64, 64), "batch": 1, "options": {"window_size": (0, 0)}},
    "a window of one, no table": {"lengths": (40, 40), "bias": None, "options": {"window_size": (0, 0)}},
    "length 1": {"lengths": (1, 1), "dims": (64, 64)},
    "one key, many queries": {"lengths": (113, 1), "dims": (24, 80)},
    "padding": {"lengths": (50, 113), "dims": (33, 65), "options": {"key_padding_mask": _mask(2, 113)}},
    "padding, one query": {"lengths": (1, 700), "dims": (64, 72), "options": {"key_padding_mask": _mask(2, 700)}},
    "scale -0.7": {"lengths": (113, 113), "options": {"window_size": (0, 0), "scale": -0.7}},
    "scale 0": {"lengths": (61, 61), "options": {"window_size": (0, 0), "scale": 0.0}},
    "grouped heads": {"lengths": (61, 61), "heads": (6, 2), "dims": (16, 40), "options": {"window_size": (0, 0)}},
    "positions": {
        "lengths": (61, 61),
        "options": {
            "window_size": (0, 0),
            "query_positions": torch.arange(61) * 5,
            "key_positions": torch.arange(61) * 5,
        },
    },
    "a table that forbids the rest": {"lengths": (30, 30), "forbidden": (*range(29), *range(30, 59))},
    "dropout": {"lengths": (113, 113), "dims": (64, 64), "options": {"window_size": (0, 0), "dropout_p": 0.3}},
    "dropout, padding": {
        "lengths": (50, 113),
        "dims": (33, 65),
        "options": {"key_padding_mask": _mask(2, 113), "dropout_p": 0.1},
    },
}


def _call(name: str, dtype: torch.dtype, **others: Any) -> Call:
    return build(Case(name, dtype=dtype, **(ONE_KEY[name] | others)))


@exact
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_KEY)
def test_gradients_of_rows_with_one_key_are_exactly_zero(backend, name, dtype):
    """The gradients dQ, dK and dbias are zero. dV is not."""
    results = results_of(_call(name, dtype), backend)
    for gradient in (results.dq, results.dk, results.dbias):
        assert gradient is None or not gradient.any()
    assert results.dv.any()


@exact
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in ONE_KEY if "dropout" not in name])
def test_the_output_of_rows_with_one_key_is_its_value(backend, name, dtype):
    """They are equal bit for bit."""
    call = _call(name, dtype, heads=(2, 2))
    value = call.v[:, :, :1]
    if "key_padding_mask" in call.options:
        value = call.v.masked_fill(~call.options["key_padding_mask"][:, None, :, None], 0).sum(2, keepdim=True)
    elif call.v.shape[2] > 1:
        value = call.v
    out = results_of(call, backend).out
    assert torch.equal(out, value.expand_as(out))


@exact
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64, BFLOAT16])
@pytest.mark.parametrize("name", ONE_KEY)
def test_through_the_log_sum_exp_rows_with_one_key_are_as_accurate(backend, name, dtype):
    """There dS is P dlse, whatever dP and delta round to."""
    call = _call(name, dtype, through_lse=True)
    assert_matches_oracle(call, results_of(call, backend))


@exact
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_sequences_in_a_packed_batch_and_first_queries_have_exactly_zero_gradients(backend, dtype):
    """Under causality, query and key of a one-token sequence get 0, and so does the first query of any sequence."""
    bounds = torch.tensor([0, 1, 2, 40, 41, 41, 140, 141], dtype=torch.int32)
    q, k, v = (torch.randn(141, 2, 64).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(7, 2, 61).requires_grad_()
    out = offset_bias_attention_varlen(q, k, v, bias, bounds, bounds, 99, 99, is_causal=True, backend=backend)
    dq, dk, dbias = torch.autograd.grad(out, (q, k, bias), torch.randn_like(out))
    alone = torch.tensor([0, 1, 40, 140])
    assert not dq[alone].any()
    assert not dk[alone].any()
    assert not dq[torch.tensor([2, 41])].any()  # the first of the longer ones
    assert dq.any()
    assert not dbias[torch.tensor([0, 1, 3, 4, 6])].any()
    assert dbias[torch.tensor([2, 5])].any()


@exact
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}], ids=str)
def test_the_first_query_under_causality_has_an_exactly_zero_gradient(backend, dtype, options):
    """Its tile also has rows with many keys."""
    call = build(
        Case("causal", (130, 130), (64, 64), heads=(4, 2), dtype=dtype, options={"is_causal": True, **options})
    )
    results = results_of(call, backend)
    assert not results.dq[:, :, 0].any()
    assert results.dq[:, :, 1].any()
