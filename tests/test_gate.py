"""Biases with a factor from the query: `bias_gate`, against the oracle, on every backend that serves it."""

import re
from dataclasses import replace

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from oracle import GATED_NAMES, Results, oracle
from tolerance import assert_accurate
from torch.autograd import gradcheck, gradgradcheck

from triton_offset_bias import DenseFallbackWarning, offset_bias_attention, offset_bias_attention_varlen

SERVING = [name for name in AVAILABLE if name != "triton"]
each_backend = pytest.mark.parametrize("backend", SERVING)

CASES = [
    Case("one table, no axis of the rank", rank=0),
    Case("one table for all heads", bias="N", rank=0),
    Case("a table per batch entry", bias="BHN", rank=0),
    Case("rank 1", rank=1),
    Case("rank 3", rank=3),
    Case("one table for all heads, rank 5", bias="N", rank=5),
    Case("one table per batch entry for all heads, rank 2", bias="B1N", rank=2),
    Case("a table per batch entry and head, rank 17", (40, 23), bias="BHN", rank=17),
    Case("causal, clamped at both ends", (50, 47), columns=9, rank=4, options={"is_causal": True}),
    Case("no bias beyond the table", (50, 47), columns=9, rank=4, options={"beyond": "zero", "bias_origin": 2}),
    Case("the origin outside of the table", (23, 50), columns=7, rank=0, options={"bias_origin": -4}),
    Case("a window, queries in front of the keys", rank=3, options={"window_size": (7, 4), "query_start": -5}),
    Case("grouped heads, holes, lse", heads=(4, 2), mask="holes", rank=6, through_lse=True),
    Case("a sequence without a key", mask="one sequence has no key", rank=0, through_lse=True),
    Case("lengths of keys", rank=2, options={"key_lengths": torch.tensor([31, 9]), "is_causal": True}),
    Case("dropout", rank=2, options={"dropout_p": 0.4}),
    Case("rows of the gate a stride apart", rank=3, layout="every other element"),
    Case("one query", (1, 60), rank=4, options={"is_causal": True}),
    Case("bfloat16 with a bfloat16 gate", dtype=torch.bfloat16, bias_dtype=torch.bfloat16, rank=8),
    Case("float64", dtype=torch.float64, bias_dtype=torch.float64, rank=8),
    Case("positions", rank=0, options={
        "query_positions": torch.arange(29) ** 2, "key_positions": 3 * torch.arange(31)}),
    Case("positions per batch entry, rank 3", rank=3, columns=19, options={
        "query_positions": torch.stack([torch.arange(29), 5 - torch.arange(29)]), "key_positions": torch.arange(31) - 3,
        "is_causal": True}),
    Case("events in buckets, causal by index, rank 4", rank=4, columns=9, options={
        "query_positions": torch.arange(29) // 4, "key_positions": torch.arange(31) // 3, "is_causal": True,
        "causal_by": "index"}),
]  # fmt: skip


@each_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients_are_the_oracles(backend, case, poisoned_memory):
    """The results are the output, the log-sum-exp and every gradient, those of table and gate among them."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, backend))


@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[12]], ids=lambda case: case.reason)
def test_the_oracles_gradients_are_those_of_autograd(case):
    """The truth has two witnesses: its formulas for the gradients, and torch's derivative of its forward."""
    call = build(case)
    inputs = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v, call.bias, call.gate)]
    ref64 = oracle(*inputs[:4], **call.options, bias_gate=inputs[4], dout=call.dout, dlse=call.dlse)
    outputs, incoming = [ref64.out], [call.dout.double()]
    if call.dlse is not None:
        outputs, incoming = [*outputs, ref64.lse], [*incoming, call.dlse.double()]
    for name, derivative in zip(GATED_NAMES[2:], torch.autograd.grad(outputs, inputs, incoming), strict=True):
        torch.testing.assert_close(getattr(ref64, name).detach(), derivative, rtol=1e-10, atol=1e-12)


@each_backend
def test_a_gate_of_ones_changes_nothing(backend):
    """The sum of the gate's gradient over a row is then that row's sum of dS times the bias."""
    call = build(Case("plain", (45, 52), mask="holes"))
    expected = results_of(call, backend)
    call.gate = torch.ones(2, 2, 45, requires_grad=True)
    got = results_of(call, backend)
    for name in GATED_NAMES[:-1]:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("lengths", [([5, 17, 1, 30], [5, 17, 1, 30]), ([4, 13, 0, 20], [9, 13, 6, 7])], ids=str)
@pytest.mark.parametrize(
    ("rank", "bias"), [((), (2, 9)), ((3,), (3, 9)), ((3,), (4, 1, 3, 9)), ((), (4, 2, 9))], ids=str
)
def test_packed_sequences_give_what_each_gives_by_itself(backend, lengths, rank, bias):
    """A packed gate lies beside the queries, (total_q, Hq) or (total_q, Hq, R)."""
    lengths_q, lengths_k = lengths
    q, k, v = (torch.randn(sum(n), 2, d) for n, d in ((lengths_q, 8), (lengths_k, 8), (lengths_k, 6)))
    table, gate = torch.randn(bias), torch.randn(sum(lengths_q), 2, *rank)
    inputs = [x.requires_grad_() for x in (q, k, v, table, gate)]
    bounds = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in lengths]
    longest = max(lengths_q), max(lengths_k)
    out, lse = offset_bias_attention_varlen(
        *inputs[:4], *bounds, *longest, bias_gate=gate, is_causal=True, return_lse=True, backend=backend
    )
    dout = torch.randn_like(out)
    got = Results(out, lse, *torch.autograd.grad(out, inputs, dout))
    truths = [_each_by_itself(inputs, lengths, dout, dtype) for dtype in (torch.float64, torch.float32)]
    for name in GATED_NAMES:
        summed = truths[0].summed if name == "dbias" else None
        assert_accurate(name, *(getattr(x, name) for x in (got, *truths)), torch.finfo(torch.float32).eps, summed)


@torch.no_grad()
def _each_by_itself(inputs, lengths, dout, dtype) -> Results:
    """The oracle's results of all sequences, packed; the gradient of a shared table is their sum."""
    q, k, v, bias, gate = inputs
    has_own = bias.dim() == gate.dim() + 1
    parts = []
    rows = zip(*(x.split(lengths[0]) for x in (q, gate, dout)), strict=True)
    keys = zip(*(x.split(lengths[1]) for x in (k, v)), strict=True)
    for index, ((q_s, gate_s, dout_s), (k_s, v_s)) in enumerate(zip(rows, keys, strict=True)):
        q_s, k_s, v_s, gate_s, dout_s = (x.transpose(0, 1).unsqueeze(0) for x in (q_s, k_s, v_s, gate_s, dout_s))
        table = bias[index : index + 1] if has_own else bias
        parts.append(oracle(q_s, k_s, v_s, table, bias_gate=gate_s, is_causal=True, dout=dout_s, dtype=dtype))
    packed = {
        name: torch.cat([getattr(part, name)[0].transpose(0, 1) for part in parts])
        for name in ("out", "dq", "dk", "dv", "dgate")
    }
    for name in ("dbias", "summed"):
        tables = [getattr(part, name) for part in parts]
        packed[name] = torch.cat(tables) if has_own else torch.stack(tables).sum(0)
    return Results(lse=torch.cat([part.lse[0] for part in parts], dim=1), **packed)


AT_POSITIONS = Case("positions, rank 3", rank=3, columns=9, options={
    "query_positions": torch.arange(7) ** 2 % 11, "key_positions": torch.arange(9) * 3 % 7})  # fmt: skip


@each_backend
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8], AT_POSITIONS], ids=lambda case: case.reason)
def test_gradients_are_finite_differences_in_float64(backend, case):
    """torch's `gradcheck` takes the output together with the log-sum-exp."""
    call = build(replace(case, lengths=(7, 9), dims=(4, 3), batch=1))
    inputs = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v, call.bias, call.gate)]

    def attend(q, k, v, bias, gate):
        out, lse = offset_bias_attention(
            q, k, v, bias, bias_gate=gate, **call.options, return_lse=True, backend=backend
        )
        return out, lse.masked_fill(lse == float("-inf"), 0)

    assert gradcheck(attend, inputs)


def test_the_reference_has_a_second_derivative():
    """torch's `gradgradcheck` compares the derivative of the derivative with finite differences."""
    call = build(Case("small", (3, 4), (2, 2), batch=1, heads=(1, 1), columns=5, rank=2))
    inputs = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v, call.bias, call.gate)]
    assert gradgradcheck(lambda *x: offset_bias_attention(*x[:4], bias_gate=x[4], backend="reference"), inputs)


@each_backend
@pytest.mark.parametrize("needed", ["q", "bias", "gate"])
def test_a_gradient_asked_for_alone_is_the_same(backend, needed):
    """The inputs without a gradient get none."""
    case = Case("causal", (40, 37), rank=3, options={"is_causal": True})
    expected = results_of(build(case), backend)
    call = build(case)
    others = {"q", "k", "v", "bias", "gate"} - {needed}
    for name in others:
        getattr(call, name).requires_grad_(False)
    out = offset_bias_attention(call.q, call.k, call.v, call.bias, bias_gate=call.gate, **call.options, backend=backend)
    out.backward(call.dout)
    torch.testing.assert_close(getattr(call, needed).grad, getattr(expected, "d" + needed))
    assert all(getattr(call, name).grad is None for name in others)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_gate_and_table_stay_what_they_are(backend, dtype):
    """Only query, key and value are cast, as the table is used in float32."""
    call = build(Case("autocast", rank=4, bias_dtype=dtype))
    device = call.q.device.type
    inputs = (call.q, call.k, call.v, call.bias)
    with torch.autocast(device, torch.bfloat16):
        out = offset_bias_attention(*inputs, bias_gate=call.gate, backend=backend)
    half = [x.bfloat16() for x in inputs[:3]]
    assert torch.equal(out, offset_bias_attention(*half, call.bias, bias_gate=call.gate, backend=backend))
    dgate, dbias = torch.autograd.grad(out, (call.gate, call.bias), call.dout.bfloat16())
    assert (dgate.dtype, dbias.dtype) == (dtype, dtype)
    assert dgate.abs().max() > 0


@each_backend
def test_compiled_code_gives_what_eager_code_gives(backend):
    """The graph has no break, for a length that is symbolic too."""
    torch.compiler.reset()

    def attend(q, k, v, bias, gate):
        return offset_bias_attention(q, k, v, bias, bias_gate=gate, is_causal=True, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (17, 23):
        call = build(Case("compiled", (length, length), rank=2))
        inputs = (call.q, call.k, call.v, call.bias, call.gate)
        outputs = [function(*inputs) for function in (attend, compiled)]
        torch.testing.assert_close(outputs[1], outputs[0])
        gradients = [torch.autograd.grad(out, inputs, call.dout) for out in outputs]
        torch.testing.assert_close(gradients[1], gradients[0])
    torch.compiler.reset()


# What is wrong: the arguments that replace those of a good call, the error, and its message as a pattern.
# The good call: query (2, 4, 5, 8), key and value (2, 4, 6, 8), bias (4, 3, 11), gate (2, 4, 5, 3).
BAD_CALLS = {
    "a list": ({"bias_gate": [1.0]}, TypeError, "`bias_gate` must be a torch.Tensor, got list"),
    "no table": ({"bias": None}, ValueError, "`bias_gate` must be None where `bias` is None, got shape (2, 4, 5, 3)"),
    "integers": (
        {"bias_gate": torch.ones(2, 4, 5, 3, dtype=torch.int64)},
        TypeError,
        "`bias_gate` must have a floating-point dtype, got torch.int64",
    ),
    "another device": ({"bias_gate": torch.ones(2, 4, 5, 3, device="meta")}, ValueError, "`bias_gate` must be on"),
    "a row for each key": (
        {"bias_gate": torch.ones(2, 4, 6, 3)},
        ValueError,
        "`bias_gate` must have shape (2, 4, 5) or (2, 4, 5, R), got shape (2, 4, 6, 3)",
    ),
    "two axes": ({"bias_gate": torch.ones(4, 5)}, ValueError, "or (2, 4, 5, R), got shape (4, 5)"),
    "rank 0": ({"bias_gate": torch.ones(2, 4, 5, 0)}, ValueError, "a rank R of at least 1, got shape (2, 4, 5, 0)"),
    "a table of another rank": (
        {"bias": torch.ones(4, 2, 11)},
        ValueError,
        "`bias` must have the rank 3 of `bias_gate` before its columns, got shape (4, 2, 11)",
    ),
    "a table without an axis of the rank": (
        {"bias": torch.ones(11)},
        ValueError,
        "`bias` must have shape (R, N), (H, R, N) or (B, H, R, N), got shape (11,)",
    ),
    "a table with such an axis, a gate without": (
        {"bias_gate": torch.ones(2, 4, 5), "bias": torch.ones(2, 4, 3, 11)},
        ValueError,
        "`bias` must have shape (N,), (H, N) or (B, H, N), got shape (2, 4, 3, 11)",
    ),
    "other heads": ({"bias": torch.ones(2, 3, 11)}, ValueError, "`bias` must have 4 heads or 1, got shape (2, 3, 11)"),
    "another batch": ({"bias": torch.ones(3, 4, 3, 11)}, ValueError, "`bias` must have batch size 2, got shape"),
    "-inf in the table": (
        {"bias": torch.tensor([0.0, float("-inf")]).expand(3, 2)},
        ValueError,
        "`bias` must be finite where `bias_gate` is given",
    ),
    "an offset beyond": (
        {"bias": torch.ones(3, 9), "beyond": "error"},
        ValueError,
        "`bias` must cover every attended offset when beyond='error': it holds offsets -4 to 4",
    ),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize(("wrong", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_gate_is_an_error_that_names_it(backend, wrong, error, message):
    """The message says what was expected and what came."""
    arguments = {
        "query": torch.ones(2, 4, 5, 8),
        "key": torch.ones(2, 4, 6, 8),
        "value": torch.ones(2, 4, 6, 8),
        "bias": torch.ones(4, 3, 11),
        "bias_gate": torch.ones(2, 4, 5, 3),
    }
    with pytest.raises(error, match=re.escape(message)):
        offset_bias_attention(**arguments | wrong, backend=backend)


def test_auto_takes_the_reference_for_ranks_above_256_and_warns():
    """The warning has the reason."""
    q = torch.ones(1, 2, 5, 8)
    with pytest.warns(DenseFallbackWarning, match="serves gates of rank up to 256"):
        offset_bias_attention(q, q, q, torch.ones(257, 9), bias_gate=torch.ones(1, 2, 5, 257))
