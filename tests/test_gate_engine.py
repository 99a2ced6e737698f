"""Gates in the CPU engine: ranks and lengths around the sizes of its tiles, positions, threads, decoding."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from oracle import GATED_NAMES, oracle

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
ONE = {"batch": 1, "heads": (1, 1)}
EVERY_OTHER = {"query_positions": torch.arange(130) * 3 % 71, "key_positions": torch.arange(230) * 5 % 83}
OF_EACH = {"query_positions": torch.stack([torch.arange(130) * 7 % 131, torch.arange(130) // 9]),
           "key_positions": torch.stack([torch.arange(230) // 3, torch.arange(230) * 11 % 97])}  # fmt: skip
BY_INDEX = {"is_causal": True, "causal_by": "index"}

CASES = [
    Case("several tiles, one number for each query", (205, 215), rank=0, through_lse=True),
    Case("several tiles, half a panel", (205, 215), **ONE, rank=16),
    Case("several tiles, one number more than half a panel", (205, 215), **ONE, rank=17, through_lse=True),
    Case("a panel less one", (97, 193), **ONE, rank=31),
    Case("a panel and one", (97, 193), **ONE, rank=33),
    Case("two panels, causal", (205, 205), **ONE, rank=64, options={"is_causal": True}),
    Case("the highest rank", (97, 100), **ONE, rank=256),
    Case("a short table", (311, 389), **ONE, columns=33, rank=16, through_lse=True),
    Case("a table of one column", (100, 130), columns=1, rank=5),
    Case("a short table away from offset 0", (205, 311), **ONE, columns=100, rank=8, options={"bias_origin": -90}),
    Case("a table that no pair reaches", (100, 130), columns=10, rank=8, options={"bias_origin": 500}),
    Case("zeros beyond a short table", (205, 215), columns=51, rank=7, options={"beyond": "zero"}),
    Case("zeros beyond a short table, rank 1", (205, 215), columns=51, rank=0, options={"beyond": "zero"}),
    Case("a window", (205, 300), **ONE, columns=150, rank=9, options={"window_size": (70, 40)}),
    Case("a window, rank 1", (205, 300), columns=150, rank=0, options={"window_size": (70, 40)}),
    Case("a window of the past, causal", (205, 300), rank=3, options={"window_size": (9, -1), "is_causal": True}),
    Case("queries behind all keys", (97, 110), columns=80, rank=12, options={"query_start": 150}),
    Case("queries far in front of all keys", (97, 110), columns=80, rank=12, options={"query_start": -(2**40)}),
    Case("a table far away", (97, 110), rank=3, options={"query_start": 2**40, "bias_origin": -(2**40)}),
    Case("shared key heads", (130, 230), heads=(6, 2), mask="holes", bias="N", columns=51, rank=4),
    Case("shared key heads, rank 1", (130, 230), heads=(6, 2), mask="holes", bias="BHN", columns=51, rank=0),
    Case("positions", (130, 230), columns=51, rank=1, options=EVERY_OTHER | {"window_size": (60, 30)}),
    Case("causal by index", (130, 230), rank=0, options=EVERY_OTHER | BY_INDEX),
    Case("positions, a window, rank 3", (130, 230), columns=51, rank=3, options=EVERY_OTHER | {
        "window_size": (60, 30)}),
    Case("positions, a panel less one", (130, 230), columns=51, rank=31, options=EVERY_OTHER, through_lse=True),
    Case("positions, a panel and one", (130, 230), **ONE, columns=151, rank=33, options=EVERY_OTHER),
    Case("positions, four vectors, causal", (130, 230), **ONE, rank=64, options=EVERY_OTHER | {"is_causal": True}),
    Case("positions, the highest rank", (130, 230), **ONE, columns=40, rank=256, options=EVERY_OTHER),
    Case("positions, a table of one column", (130, 230), columns=1, rank=5, options=EVERY_OTHER),
    Case("positions, zeros beyond a short table", (130, 230), columns=9, rank=7, options=EVERY_OTHER | {
        "beyond": "zero", "bias_origin": -20}),
    Case("positions of each sequence, shared key heads, causal by index", (130, 230), heads=(6, 2), mask="holes",
         bias="BHN", columns=51, rank=20, options=OF_EACH | BY_INDEX, through_lse=True),
    Case("positions of each sequence, one table for all heads", (130, 230), bias="N", columns=99, rank=6,
         options=OF_EACH | {"is_causal": True}),
    Case("all at one place", (130, 230), columns=9, rank=18, options={
        "query_positions": torch.zeros(130, dtype=torch.int64), "key_positions": torch.zeros(230, dtype=torch.int64)}),
    Case("positions, one query", (1, 230), heads=(4, 2), columns=51, rank=5, options={
        "query_positions": torch.tensor([90]), "key_positions": EVERY_OTHER["key_positions"]}),
    Case("positions, dropout", (130, 230), heads=(4, 2), columns=51, rank=20, options=EVERY_OTHER | {
        "dropout_p": 0.3, "is_causal": True}),
    Case("positions, bfloat16", (130, 230), (64, 64), dtype=torch.bfloat16, columns=51, rank=16, options=EVERY_OTHER),
    Case("positions, float16, a gate in float16", (130, 230), dtype=torch.float16, bias_dtype=torch.float16, rank=3,
         options=EVERY_OTHER | BY_INDEX),
    Case("dropout", (205, 215), heads=(4, 2), rank=20, options={"dropout_p": 0.3, "is_causal": True}),
    Case("dropout, rank 1", (205, 215), heads=(4, 2), rank=0, options={"dropout_p": 0.3, "is_causal": True}),
    Case("lengths", (61, 215), rank=3, options={"key_lengths": torch.tensor([215, 70])}),
    Case("bfloat16", (205, 215), (64, 64), dtype=torch.bfloat16, rank=16, options={"is_causal": True}),
    Case("bfloat16, rank 1", (205, 215), (64, 64), dtype=torch.bfloat16, rank=0, columns=100),
    Case("float16, a gate in float16", (100, 110), dtype=torch.float16, bias_dtype=torch.float16, rank=3),
    Case("float64", (205, 215), **ONE, dtype=torch.float64, bias_dtype=torch.float64, rank=18),
    Case("float64, rank 1", (205, 215), dtype=torch.float64, bias_dtype=torch.float64, rank=0, columns=100),
    Case("large numbers", (97, 130), rank=2, columns=60, options={"scale": 30.0}),
    Case("scale 0", (97, 130), rank=2, options={"scale": 0.0}),
    Case("decoding, one query", (1, 3000), heads=(8, 2), rank=5, options={"is_causal": True}),
    Case("decoding, rank 1, lengths", (1, 3000), rank=0, options={"key_lengths": torch.tensor([2999, 5])}),
    Case("decoding, several queries, a window", (4, 700), rank=5, columns=90, options={"window_size": (300, 2)}),
    Case("decoding, bfloat16", (2, 1500), (64, 64), dtype=torch.bfloat16, rank=3, options={"is_causal": True}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_gated_calls_of_cpp_are_accurate(case, poisoned_memory):
    """Output, log-sum-exp and all gradients, by the one rule of accuracy."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, "cpp"))


PRECISE = [
    "a short table",
    "a window",
    "shared key heads",
    "shared key heads, rank 1",
    "positions",
    "positions, a window, rank 3",
    "positions of each sequence, shared key heads, causal by index",
    "positions of each sequence, one table for all heads",
    "all at one place",
    "two panels, causal",
]


@pytest.mark.parametrize("reason", PRECISE)
def test_float64_calls_are_right_to_the_last_digits(reason):
    """An error is at most 1e-12 of the numbers that were added up."""
    (case,) = (case for case in CASES if case.reason == reason)
    call = build(replace(case, dtype=torch.float64, bias_dtype=torch.float64))
    got = results_of(call, "cpp")
    with torch.no_grad():
        truth = oracle(
            *(call.q, call.k, call.v, call.bias), dout=call.dout, dlse=call.dlse, bias_gate=call.gate, **call.options
        )
    for name in GATED_NAMES:
        size = {"dbias": truth.summed, "dgate": truth.summed_gate}.get(name, getattr(truth, name))
        finite = getattr(truth, name).isfinite()
        error = (getattr(got, name) - getattr(truth, name))[finite].abs().max()
        assert error <= 1e-12 * size[finite].abs().max().clamp(min=1.0), name


THREADED = [
    Case("one head, work is split by blocks", (401, 397), **ONE, rank=20, through_lse=True),
    Case("one head, tiles of dS that overhang the table", (398, 398), **ONE, rank=5),
    Case("one head, rank 1", (401, 397), **ONE, rank=0, columns=99),
    Case("shared key heads", (130, 230), heads=(6, 2), bias="N", columns=51, rank=3, options={"window_size": (70, 40)}),
    Case("more heads than threads", (97, 97), batch=4, heads=(5, 5), bias="BHN", dtype=torch.bfloat16, rank=2),
    Case("positions", (130, 230), columns=51, rank=0, options=EVERY_OTHER),
    Case("positions, rank 20", (130, 230), **ONE, columns=51, rank=20, options=EVERY_OTHER, through_lse=True),
    Case("positions, shared key heads", (130, 230), heads=(6, 2), bias="N", rank=3, options=OF_EACH | BY_INDEX),
    Case("decoding", (1, 3000), rank=5, options={"is_causal": True}),
]


@pytest.mark.parametrize("case", THREADED, ids=lambda case: case.reason)
def test_gated_results_are_bitwise_equal_for_any_number_of_threads(case):
    """Output, log-sum-exp and all gradients with 1, 2, 3 and 5 threads are equal, the last two twice."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results_of(build(case), "cpp")
        for threads in (2, 3, 3, 5, 5):
            torch.set_num_threads(threads)
            got = results_of(build(case), "cpp")
            for name in GATED_NAMES:
                assert torch.equal(getattr(got, name), getattr(expected, name)), f"{name} differs"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [(), (3,), (40,)], ids=str)
def test_packed_sequences_give_what_the_reference_gives(rank):
    """Short, empty and long sequences lie together, each of which reaches another part of the table."""
    bounds = torch.tensor([0, 3, 150, 150, 161, 400], dtype=torch.int32)
    q, k, v = (torch.randn(400, 2, 16, dtype=torch.float64) for _ in range(3))
    bias, gate = torch.randn(2, *rank, 151, dtype=torch.float64), torch.randn(400, 2, *rank, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, bias, gate)]
    dout, results = torch.randn(400, 2, 16, dtype=torch.float64), []
    for backend in ("cpp", "reference"):
        out = offset_bias_attention_varlen(
            *inputs[:4], bounds, bounds, 239, 239, bias_gate=gate, is_causal=True, backend=backend
        )
        results.append([out, *torch.autograd.grad(out, inputs, dout)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias", "gate"])
@pytest.mark.parametrize(
    "case",
    [
        Case("rank 1", (130, 137), columns=60, rank=0, options={"is_causal": True}),
        Case("rank 3", (130, 137), columns=60, rank=3, options={"is_causal": True}),
        Case("positions", (130, 230), columns=60, rank=3, options=EVERY_OTHER | {"is_causal": True}),
    ],
    ids=lambda case: case.reason,
)
def test_a_gradient_asked_for_alone_has_the_same_bits(case, needed):
    """The order of sums does not depend on the other gradients."""
    expected = results_of(build(case), "cpp")
    call = build(case)
    for name in {"q", "k", "v", "bias", "gate"} - {needed}:
        getattr(call, name).requires_grad_(False)
    out = offset_bias_attention(call.q, call.k, call.v, call.bias, bias_gate=call.gate, **call.options, backend="cpp")
    out.backward(call.dout)
    assert torch.equal(getattr(call, needed).grad, getattr(expected, "d" + needed))


def test_backward_makes_the_scores_that_forward_made():
    """Large scores agree to the last bit. Otherwise a row of P would not sum to 1, nor dV to the sum of dO."""
    for rank, lengths, positions in ((0, (300, 310), {}), (40, (300, 310), {}), (40, (130, 230), EVERY_OTHER)):
        call = build(Case("large", lengths, columns=201, rank=rank, options={"scale": 4096.0} | positions))
        call.dout.fill_(1.0)
        dv = results_of(call, "cpp").dv
        torch.testing.assert_close(dv.sum(2), torch.full_like(dv[:, :, 0], lengths[0]), rtol=5e-6, atol=0)


def test_one_tensor_may_be_query_and_gate():
    """Autograd adds up both gradients: relative keys, as Shaw et al. have them."""
    call = build(Case("relative keys", (130, 130), **ONE, rank=16, columns=33, dtype=torch.float64))
    grads = []
    for backend in ("cpp", "reference"):
        out = offset_bias_attention(call.q, call.k, call.v, call.bias.double(), bias_gate=call.q, backend=backend)
        grads.append(torch.autograd.grad(out, [call.q, call.bias], call.dout))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_step_at_positions_needs_far_less_memory_than_one_matrix_of_scores():
    """A matrix of 8192 x 8192 scores takes 256 MiB.

    Forward and backward together grow the process by less than 32 MiB, as the table has few columns.
    """
    code = """
import torch
from triton_offset_bias import offset_bias_attention
def call(length):
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    bias, gate = torch.randn(5, 99, requires_grad=True), torch.randn(1, 1, length, 5, requires_grad=True)
    positions = torch.arange(length) * 7 % 61
    places = {"query_positions": positions, "key_positions": positions}
    offset_bias_attention(q, k, v, bias, bias_gate=gate, **places, backend="cpp").sum().backward()
def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])
torch.set_num_threads(2)
call(200)
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak to the present memory
call(8192)
print((kilobytes("VmHWM") - before) // 1024)
"""
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) < 32
