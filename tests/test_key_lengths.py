"""`key_lengths`: each sequence fills the first part of a cache, with a number of keys of its own."""

import re
from dataclasses import replace

import pytest
import torch
from cases import Call, Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from oracle import NAMES, Results
from torch._dynamo.testing import CompileCounterWithBackend

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.checks.call import checked_attention

needs_kernels = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)


def _lengths(*lengths: int) -> dict:
    return {"key_lengths": torch.tensor(lengths, dtype=torch.int32)}


MIXED = Case(
    "tiles that keys fill, tiles that they do not",
    (70, 192),
    heads=(2, 1),
    columns=81,
    options={**_lengths(129, 64), "is_causal": True},
)
CASES = [
    Case("each its own number", (29, 31), batch=3, through_lse=True, options=_lengths(17, 31, 1)),
    MIXED,
    Case("fewer keys than queries, and none", (45, 60), options={**_lengths(33, 0), "is_causal": True}),
    Case("none at all", (9, 20), bias="BHN", through_lse=True, options=_lengths(0, 0)),
    Case(
        "a window, holes, a table per sequence, no bias beyond it",
        (130, 140),
        bias="BHN",
        columns=31,
        mask="holes",
        options={**_lengths(139, 70), "window_size": (40, 21), "beyond": "zero"},
    ),
    Case("no table, dropout", (40, 70), bias=None, options={**_lengths(51, 23), "dropout_p": 0.3}),
    Case(
        "deterministic, far on both sides",
        (130, 150),
        heads=(1, 1),
        columns=41,
        options={**_lengths(101, 150), "deterministic": True},
    ),
    Case("one query, shared key heads", (1, 700), (64, 64), heads=(4, 1), columns=65, options=_lengths(700, 301)),
    Case(
        "four queries, bfloat16, holes, the last keys of a cache empty",
        (4, 600),
        (80, 48),
        dtype=torch.bfloat16,
        mask="holes",
        options={**_lengths(3, 555), "is_causal": True},
    ),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_each_sequence_has_its_first_keys_alone(backend, case):
    """Output, log-sum-exp and every gradient are compared. A sequence's last query lies on the last of its keys."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, backend))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [MIXED, CASES[-2]], ids=lambda case: case.reason)
def test_nobody_reads_what_lies_beyond(backend, case):
    """Keys and values beyond may be NaN, as in uninitialised memory.

    Not a bit changes, and their gradients are exactly 0.
    """
    call = build(case)
    expected = results_of(call, backend)
    beyond = torch.arange(case.lengths[1]) >= call.options["key_lengths"][:, None]
    with torch.no_grad():
        for x in (call.k, call.v):
            x[beyond[:, None].expand(x.shape[:3])] = float("nan")
    got = results_of(call, backend)
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for gradient in (got.dk, got.dv):
        assert (gradient[beyond[:, None].expand(gradient.shape[:3])] == 0).all()


@pytest.mark.needs_engine
@pytest.mark.cpu_only
@pytest.mark.parametrize("case", [MIXED, CASES[-1]], ids=lambda case: case.reason)
def test_the_engine_does_what_it_does_without_the_rest_of_the_cache(case):
    """Bits are equal, because tasks, threads and sums are those of tensors that end after the longest sequence."""
    call = build(case)
    longest = int(call.options["key_lengths"].max())
    cut = _with_keys(call, longest)
    whole, part = results_of(call, "cpp"), results_of(cut, "cpp")
    for name in NAMES:
        value = getattr(whole, name)
        value = value[:, :, :longest] if name in ("dk", "dv") else value
        assert torch.equal(value, getattr(part, name)), name


def _with_keys(call: Call, length: int) -> Call:
    """The call with only the first keys."""
    options = dict(call.options)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][:, :length]
    k, v = (x.detach()[:, :, :length].requires_grad_() for x in (call.k, call.v))
    return replace(call, k=k, v=v, options=options)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("lengths", "wrong"), [((5, 7), "7 for sequence 1"), ((-1, 6), "-1 for sequence 0")])
def test_a_length_out_of_range_is_named_with_its_sequence(backend, lengths, wrong):
    """A GPU call does not check lengths. There such a length counts as the nearest length in range."""
    call = build(Case("wrong", (5, 6), options=_lengths(*lengths)))
    message = f"`key_lengths` must be between 0 and `key`'s length 6, got {wrong}"
    with pytest.raises(ValueError, match=re.escape(message)):
        results_of(call, backend)


def test_offsets_beyond_a_table_are_judged_as_if_all_sequences_were_full(backend):
    """No device reads lengths or a mask for this check. A window or a longer table makes the call valid."""
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 20, 8)
    options = {**_lengths(4, 5), "key_padding_mask": torch.arange(20).expand(2, 20) < 5, "beyond": "error"}
    with pytest.raises(ValueError, match="offsets -5 to 5, but offsets -2 to 19 are attended to"):
        offset_bias_attention(q, k, k, torch.randn(2, 11), **options, backend=backend)
    for columns, window in ((11, (5, 5)), (39, (-1, -1))):
        table = torch.randn(2, columns)
        out = offset_bias_attention(q, k, k, table, **options, window_size=window, backend=backend)
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_compiled_graph_serves_every_length(backend, dtype):
    """Lengths are data, forward and backward, so a new length compiles nothing."""
    call = build(Case("graph", (9, 40), columns=21, through_lse=True, options={"is_causal": True}))
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, bias, lengths):
        options = {**call.options, "key_lengths": lengths, "deterministic": True, "backend": backend}
        return offset_bias_attention(q, k, v, bias, **options, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for lengths in ([40, 13], [0, 40], [9, 1]):
        inputs, results = [call.q, call.k, call.v, call.bias], []
        for function in (attend, compiled):
            outputs = function(*inputs, torch.tensor(lengths, dtype=dtype))
            results.append(Results(*outputs, *torch.autograd.grad(outputs, inputs, [call.dout, call.dlse])))
        for name in NAMES:
            torch.testing.assert_close(getattr(results[1], name), getattr(results[0], name))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def _forward_without_checks(call: Call, lengths: torch.Tensor) -> list[torch.Tensor]:
    """The four results of the GPU kernels for lengths that are not checked, as on a GPU."""
    options = {"dropout_p": 0.0, "is_causal": True, "scale": None, "enable_gqa": True, "bias_origin": None}
    options |= {"beyond": "clamp", "window_size": (-1, -1), "deterministic": False}
    masks = dict.fromkeys(("query_start", "key_padding_mask", "query_positions", "key_positions"))
    inputs = [x.detach() for x in (call.q, call.k, call.v, call.bias)]
    problem = checked_attention(*inputs, **masks, key_lengths=lengths, options=options)
    results = [torch.empty_like(call.dout), *torch.empty(3, *call.dout.shape[:3])]
    BACKENDS["triton"].forward(problem, *results)
    return results


@needs_kernels
@pytest.mark.parametrize("len_q", [1, 70])
def test_kernels_take_a_length_out_of_range_for_the_nearest(len_q):
    """Kernels read nothing outside of the tensors, even if nobody checks lengths."""
    call = build(Case("unchecked", (len_q, 520), heads=(2, 1), columns=81))
    expected = _forward_without_checks(call, torch.tensor([520, 0]))
    for wrong in (torch.tensor([521, -1]), torch.tensor([2**40, -(2**40)])):
        assert all(torch.equal(*pair) for pair in zip(_forward_without_checks(call, wrong), expected, strict=True))
