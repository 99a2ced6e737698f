"""Gates of rank 1 on the GPU kernels: near, far and cut tiles, both units of the strip, and every option.

`make test-emulated` runs this file on the compiled kernels as well.
"""

import itertools

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from oracle import GATED_NAMES
from tolerance import assert_accurate

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

pytestmark = [
    pytest.mark.skipif(
        "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    ),
    # Of files that the emulator leaves open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
BF16, F16 = torch.bfloat16, torch.float16

CASES = [
    Case("all near", (70, 90), rank=1, through_lse=True),
    Case("no axis of the rank, one table", (70, 90), bias="N", rank=0),
    Case("far on both sides", (300, 300), columns=31, rank=1, batch=1),
    Case("far, bfloat16", (300, 300), (32, 32), columns=31, rank=1, batch=1, dtype=BF16),
    Case("far, bfloat16, a whole number of tiles", (256, 384), (64, 64), columns=65, rank=1, batch=1, dtype=BF16),
    Case("causal, far", (200, 300), columns=41, rank=1, batch=1, options={"is_causal": True}, through_lse=True),
    Case("causal, float16", (130, 130), rank=1, dtype=F16, options={"is_causal": True}),
    Case("window, no bias beyond", (150, 150), columns=9, rank=1, options={"window_size": (40, 3), "beyond": "zero"}),
    Case("a table per batch entry, grouped heads, holes", heads=(4, 2), bias="BHN", rank=1, mask="holes"),
    Case("a sequence without a key", mask="one sequence has no key", rank=1, through_lse=True),
    Case("a negative scale", rank=1, options={"scale": -0.4}),
    Case("a scale of 0", rank=1, options={"scale": 0.0}),
    Case("lengths of keys, causal", rank=1, options={"key_lengths": torch.tensor([31, 9]), "is_causal": True}),
    Case("dropout", rank=1, options={"dropout_p": 0.4, "is_causal": True}),
    Case("rows of the gate a stride apart", rank=1, layout="every other element"),
    Case("few queries: keys split among programs", (2, 700), heads=(4, 2), columns=301, rank=1,
         options={"is_causal": True}),
    Case("positions", rank=1, columns=19, options={
        "query_positions": torch.stack([torch.arange(29), 5 - torch.arange(29)]), "key_positions": torch.arange(31) - 3,
        "is_causal": True}),
    Case("bfloat16 table and gate", dtype=BF16, bias_dtype=BF16, rank=1),
]  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients_are_the_oracles(case, deterministic, poisoned_memory):
    """Deterministic sums of dbias come from another kernel; those of dgate are always in one order."""
    call = build(case)
    call.options["deterministic"] = deterministic
    assert_matches_oracle(call, results_of(call, "triton"))


def test_fixed_point_sums_at_positions_hold_a_large_gate():
    """A sum of integers that left the gate out of its bound would overflow."""
    positions = torch.zeros(64, dtype=torch.int64)
    call = build(Case("one column", (64, 64), columns=1, rank=1, batch=1, heads=(1, 1)))
    options = {"query_positions": positions, "key_positions": positions, "deterministic": True}
    with torch.no_grad():
        call.gate.mul_(1e6)
        call.bias.mul_(1e-6)
    call.options.update(options)
    assert_matches_oracle(call, results_of(call, "triton"))


@pytest.mark.parametrize("needed", ["q", "v", "bias", "gate"])
def test_a_gradient_asked_for_alone_is_the_same(needed):
    """Other gradients are not written."""
    case = Case("causal", (40, 37), columns=9, rank=1, options={"is_causal": True})
    expected = results_of(build(case), "triton")
    call = build(case)
    for name in {"q", "k", "v", "bias", "gate"} - {needed}:
        getattr(call, name).requires_grad_(False)
    inputs = (call.q, call.k, call.v, call.bias)
    offset_bias_attention(*inputs, bias_gate=call.gate, **call.options, backend="triton").backward(call.dout)
    torch.testing.assert_close(getattr(call, needed).grad, getattr(expected, "d" + needed))


@pytest.mark.parametrize("table", [(2, 9), (4, 2, 1, 9)], ids=str)
def test_packed_sequences_are_those_of_the_reference(table):
    """A packed gate lies beside the queries, (total_q, Hq) or (total_q, Hq, 1)."""
    lengths_q, lengths_k = (4, 13, 0, 40), (9, 13, 6, 37)
    shapes = ((57, 2, 8), (65, 2, 8), (65, 2, 6), table, (57, 2, 1) if len(table) == 4 else (57, 2), (57, 2, 6))
    *single, dout = (torch.randn(shape) for shape in shapes)
    bounds = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]

    def results(inputs, dout, backend):
        q, k, v, bias, gate = inputs = [x.clone().requires_grad_() for x in inputs]
        out = offset_bias_attention_varlen(
            q, k, v, bias, *bounds, 40, 37, bias_gate=gate, is_causal=True, backend=backend
        )
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    got, same = (results(single, dout, backend) for backend in ("triton", "reference"))
    truth = results([x.double() for x in single], dout.double(), "reference")
    names = [name for name in GATED_NAMES if name != "lse"]
    for name, *three in zip(names, got, truth, same, strict=True):
        summed = 8 * truth[names.index("dbias")].abs() if name == "dbias" else None
        assert_accurate(name, *three, torch.finfo(torch.float32).eps, summed)


def test_higher_ranks_are_refused_by_name():
    """A named backend does not fall back."""
    q = torch.ones(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="triton: serves gates of rank 1, got rank 3"):
        offset_bias_attention(q, q, q, torch.ones(3, 9), bias_gate=torch.ones(1, 2, 5, 3), backend="triton")
