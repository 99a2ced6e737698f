"""Queries that attend to one key, on GPUs: P is 1 whatever the scores are, so dq, dk and dbias are exactly 0.

`make test-emulated` runs this file on the compiled kernels as well.
"""

import os

import pytest
import torch
from cases import Case, assert_matches_oracle, build, padding_mask, results_of
from conftest import AVAILABLE

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

pytestmark = [
    pytest.mark.skipif(
        "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    ),
    # Of files that the emulator leaves open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NONE, ALONE = (-1, -1), (0, 0)
# The emulator compiles for minutes; kernels treat both 16-bit dtypes alike.
DTYPES = [torch.float32, torch.bfloat16, *([] if "PTXEMU" in os.environ else [torch.float16])]
# Far tiles multiply and add in other places than near ones: a table of one column, or none, has far tiles alone.
# Scores are small, because the interpreter's products (NumPy's) round by the shapes of tiles, which differ by pass.
CASES = [
    Case("one query and one key", (1, 1), (16, 16), heads=(2, 1)),
    Case("a window of one key", (70, 70), (32, 32), batch=1, options={"window_size": ALONE, "scale": -0.2}),
    Case("a window of one key, in order", (40, 40), (32, 32), options={"window_size": ALONE, "deterministic": True}),
    Case("one key for all queries", (70, 1), (32, 32), columns=1, options={"scale": 0.4}),
    Case("one key for all queries, no bias", (70, 1), (32, 32), bias=None, options={"scale": 0.4}),
    Case("dropout", (40, 40), (32, 32), batch=1, options={"window_size": ALONE, "dropout_p": 0.4}),
    Case(
        "positions",
        (40, 40),
        (32, 32),
        batch=1,
        columns=9,
        options={"query_positions": torch.arange(40) * 3, "key_positions": torch.arange(40) * 3, "window_size": (1, 1)},
    ),
    Case(
        "positions, in order",
        (40, 40),
        (32, 32),
        batch=1,
        columns=9,
        options={
            "query_positions": torch.arange(40) * 3,
            "key_positions": torch.arange(40) * 3,
            "window_size": (1, 1),
            "deterministic": True,
        },
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_queries_with_one_key_have_no_gradient_but_that_of_values(case, dtype):
    """Their gradients are exactly 0. Other results, also through the log-sum-exp, obey the rule of accuracy."""
    call = build(Case(**{**vars(case), "dtype": dtype}))
    got = results_of(call, "triton")
    for name in ("dq", "dk", "dbias"):
        value = getattr(got, name)
        assert value is None or not value.count_nonzero(), f"{name}: up to {value.abs().max():.1e}"
    assert_matches_oracle(call, got)
    through_lse = build(Case(**{**vars(case), "dtype": dtype, "through_lse": True}))
    assert_matches_oracle(through_lse, results_of(through_lse, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_with_one_key_among_others_have_none_either(dtype):
    """Causality, padding or a table of -inf leave some queries one key. Other queries have their gradients."""
    causal = build(Case("causal", (70, 70), (32, 32), dtype=dtype, options={"is_causal": True}))
    assert not results_of(causal, "triton").dq[:, :, 0].count_nonzero()
    padded = build(Case("padding", (70, 70), (32, 32), dtype=dtype))
    mask = padding_mask("right padding", 2, 70)
    mask[0, 1:] = False
    padded.options["key_padding_mask"] = mask
    table = build(Case("table", (40, 40), (32, 32), dtype=dtype, options={"beyond": "zero"}))
    with torch.no_grad():
        table.bias[:, :39] = table.bias[:, 40:] = float("-inf")
    for call in (causal, padded, table):
        got = results_of(call, "triton")
        assert_matches_oracle(call, got)
    assert not results_of(padded, "triton").dq[0].count_nonzero()
    assert results_of(padded, "triton").dq[1].count_nonzero()
    assert not any(x.count_nonzero() for x in (got.dq, got.dk, got.dbias))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_sequences_of_one_token_have_no_gradient_but_that_of_values(dtype, deterministic):
    """A table that only such sequences read has gradient 0. Beside a longer sequence they add nothing to its table."""
    q, k, v = (torch.randn(40, 2, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    bias, dout = torch.randn(2, 21, requires_grad=True), torch.randn(40, 2, 32, dtype=dtype)
    keywords = {"deterministic": deterministic, "backend": "triton"}

    def gradients(lengths: list[int]) -> list[torch.Tensor]:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        out = offset_bias_attention_varlen(q, k, v, bias, bounds, bounds, max(lengths), max(lengths), **keywords)
        return list(torch.autograd.grad(out, (q, k, bias), dout))

    assert not any(x.count_nonzero() for x in gradients([1] * 40))
    dq, dk, _ = gradients([7, *[1] * 33])
    assert not dq[7:].count_nonzero()
    assert not dk[7:].count_nonzero()
    assert dq[:7].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [4.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0])
def test_a_key_that_outweighs_the_others_keeps_what_they_leave(dtype, gap):
    """Two keys are `gap` nats apart. The softmax is almost, but not quite, that of one key."""
    call = build(Case("outweighed", (33, 2), (32, 32), columns=34, bias="1N", dtype=dtype, options={"scale": 0.05}))
    offset = torch.tensor([gap, 0.0])
    call.options |= {"query_positions": torch.zeros(33, dtype=torch.int64), "key_positions": torch.tensor([0, 5])}
    with torch.no_grad():
        call.bias[:] = 0.0
        call.bias[:, 16] = offset[0]
    assert_matches_oracle(call, results_of(call, "triton"))


def test_parts_of_the_keys_add_up_to_the_whole_where_a_row_has_one_key_in_a_part():
    """The operator gets rows of all keys. A part may hold one key of a row, or none."""
    call = build(Case("parts", (20, 9), (16, 16), columns=41, dtype=torch.float32))
    bias_origin = 20
    whole = torch.autograd.grad(
        offset_bias_attention(
            call.q, call.k, call.v, call.bias, bias_origin=bias_origin, query_start=0, backend="triton"
        ),
        (call.q, call.k, call.v, call.bias),
        call.dout,
    )
    parts = [_gradients_of_part(call, bias_origin, keys) for keys in (slice(0, 1), slice(1, 9))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-5, atol=1e-5)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([parts[0][i], parts[1][i]], 2), whole[i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[0][3] + parts[1][3], whole[3], rtol=1e-5, atol=1e-5)


def _gradients_of_part(call, bias_origin: int, keys: slice) -> tuple[torch.Tensor, ...]:
    """The gradients of the keys `keys`, by the operator, with the rows' output, maximum and sum over all keys."""
    forward = torch.ops.triton_offset_bias.attention.default
    backward = torch.ops.triton_offset_bias.attention_backward.default
    q, k, v, bias = (x.detach() for x in (call.q, call.k, call.v, call.bias))

    def run(operator, first: int, end: int, **rows) -> tuple[torch.Tensor, ...]:
        tensors = {"query": q, "key": k[:, :, first:end], "value": v[:, :, first:end], "bias": bias}
        numbers = {"scale": 0.25, "dropout_p": 0.0, "query_start": -first, "min_offset": -(2**30), "max_offset": 2**30}
        others = {"bias_origin": bias_origin, "beyond": "clamp", "deterministic": False, "backend": "triton"}
        lengths = {"max_seqlen_q": q.shape[2], "max_seqlen_k": end - first}
        given = {**tensors, **numbers, **others, **lengths, **rows}
        return operator(*[given.get(argument.name) for argument in operator._schema.arguments])

    out, _, row_max, row_sum = run(forward, 0, 9)
    rows = {"dout": call.dout, "out": out, "row_max": row_max, "row_sum": row_sum, "needs": [True] * 5}
    return run(backward, keys.start, keys.stop, **rows)
