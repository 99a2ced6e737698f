"""Packed sequences give the results of each sequence by itself."""

import re

import numpy as np
import pytest
import torch
from oracle import NAMES, Results, oracle
from tolerance import assert_accurate

from triton_offset_bias import offset_bias_attention_varlen

CASES = {
    "several lengths": ([5, 17, 1, 30], [5, 17, 1, 30], (2, 2), "HN", {}),
    "causal, lengths of queries and keys differ": ([4, 13, 20], [9, 13, 7], (2, 2), "HN", {"is_causal": True}),
    "a window on both sides": ([30, 41], [35, 29], (3, 3), "N", {"window_size": (7, 3)}),
    "grouped heads, causal": ([11, 3], [11, 3], (4, 2), "HN", {"is_causal": True, "enable_gqa": True}),
    "a table per sequence": ([6, 2, 9], [8, 3, 9], (2, 2), "BHN", {"beyond": "zero", "bias_origin": 4}),
    "a table per sequence, for all heads": ([6, 9], [8, 9], (3, 3), "B1N", {"scale": -0.4}),
    "no table": ([6, 9], [8, 9], (2, 2), None, {"is_causal": True}),
    "sequences without queries, without keys, without both": ([0, 7, 0, 5], [6, 0, 0, 5], (2, 2), "BHN", {}),
    "only an empty sequence": ([0], [0], (2, 2), "HN", {}),
    "no sequence": ([], [], (2, 2), "HN", {}),
}


def _bounds(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)


def _inputs(lengths_q, lengths_k, heads, bias) -> list[torch.Tensor | None]:
    shapes = {"N": (9,), "HN": (heads[0], 9), "BHN": (len(lengths_q), heads[0], 9), "B1N": (len(lengths_q), 1, 9)}
    q = torch.randn(sum(lengths_q), heads[0], 8)
    k = torch.randn(sum(lengths_k), heads[1], 8)
    v = torch.randn(sum(lengths_k), heads[1], 6)
    table = None if bias is None else torch.randn(shapes[bias])
    return [None if x is None else x.requires_grad_() for x in (q, k, v, table)]


@torch.no_grad()
def _each_by_itself(inputs, lengths_q, lengths_k, options, dout, dlse, dtype) -> Results:
    """The oracle's results of all sequences, packed; the gradient of a shared table is their sum."""
    q, k, v, bias = inputs
    parts = []
    rows = zip(q.split(lengths_q), dout.split(lengths_q), dlse.split(lengths_q, dim=1), strict=True)
    keys = zip(k.split(lengths_k), v.split(lengths_k), strict=True)
    for index, ((q_s, dout_s, dlse_s), (k_s, v_s)) in enumerate(zip(rows, keys, strict=True)):
        batched = (x.transpose(0, 1).unsqueeze(0) for x in (q_s, k_s, v_s))
        table = bias[index : index + 1] if bias is not None and bias.dim() == 3 else bias
        gradients = {"dout": dout_s.transpose(0, 1).unsqueeze(0), "dlse": dlse_s.unsqueeze(0)}
        parts.append(oracle(*batched, table, **options, **gradients, dtype=dtype))
    packed = {
        name: torch.cat([getattr(part, name)[0].transpose(0, 1) for part in parts])
        for name in ("out", "dq", "dk", "dv")
    }
    packed["lse"] = torch.cat([part.lse[0] for part in parts], dim=1)
    if bias is not None:
        for name in ("dbias", "summed"):
            tables = [getattr(part, name) for part in parts]
            packed[name] = torch.cat(tables) if bias.dim() == 3 else torch.stack(tables).sum(0)
    return Results(**packed)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize(("lengths_q", "lengths_k", "heads", "bias", "options"), CASES.values(), ids=CASES)
def test_packed_sequences_give_what_each_gives_by_itself(
    backend, lengths_q, lengths_k, heads, bias, options, deterministic
):
    """The results are the output, the log-sum-exp and every gradient."""
    inputs = _inputs(lengths_q, lengths_k, heads, bias)
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    out, lse = offset_bias_attention_varlen(
        *inputs,
        *(_bounds(lengths_q), _bounds(lengths_k), *longest),
        **options,
        deterministic=deterministic,
        return_lse=True,
        backend=backend,
    )
    assert lse.shape == (heads[0], sum(lengths_q))
    assert out.shape == (sum(lengths_q), heads[0], 6)
    if not lengths_q:
        return
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    leaves = [x for x in inputs if x is not None]
    got = Results(out, lse, *torch.autograd.grad([out, lse], leaves, [dout, dlse]))
    ref64, same = (
        _each_by_itself(inputs, lengths_q, lengths_k, options, dout, dlse, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for name in NAMES[: 2 + len(leaves)]:
        summed = ref64.summed if name == "dbias" else None
        eps = torch.finfo(torch.float32).eps
        assert_accurate(name, getattr(got, name), getattr(ref64, name), getattr(same, name), eps, summed)


def test_bounds_may_be_int64_and_maximum_lengths_too_large(backend):
    """Neither changes a bit of the results."""
    inputs = _inputs([5, 3], [4, 6], (2, 2), "HN")
    expected = offset_bias_attention_varlen(*inputs, _bounds([5, 3]), _bounds([4, 6]), 5, 6, backend=backend)
    wide = _bounds([5, 3], torch.int64), _bounds([4, 6], torch.int64)
    assert torch.equal(offset_bias_attention_varlen(*inputs, *wide, 500, 600, backend=backend), expected)


LENGTHS = {
    "a NumPy integer": lambda lengths: np.int64(lengths.max()),
    "a NumPy array": lambda lengths: np.array(int(lengths.max())),
    "no axis": lambda lengths: lengths.max(),
    "one axis, a byte": lambda lengths: lengths.max(dim=0, keepdim=True).values.to(torch.uint8),
    "more than the rows": lambda lengths: 100 * lengths.max(),
}
every_length = pytest.mark.parametrize("longest", LENGTHS.values(), ids=LENGTHS)


@every_length
def test_the_longest_length_may_be_a_tensor_with_one_integer(backend, longest):
    """flash-attn's callers pass such tensors. No bit of the results changes."""
    inputs = _inputs([5, 3], [4, 6], (2, 2), "HN")
    queries, keys = _bounds([5, 3]), _bounds([4, 6])
    expected = offset_bias_attention_varlen(*inputs, queries, keys, 5, 6, backend=backend)
    lengths = longest(queries.diff()), longest(keys.diff())
    assert torch.equal(offset_bias_attention_varlen(*inputs, queries, keys, *lengths, backend=backend), expected)


@every_length
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, wherever a graph breaks
def test_compiled_code_may_read_the_longest_length_from_a_tensor(longest, fullgraph):
    """Output and gradients are right for lengths that change. Too short a length is an error there too."""

    def attend(q, k, v, bias, bounds, lengths):
        q = 2 * q  # made by compiled code, too
        return offset_bias_attention_varlen(q, k, v, bias, bounds, bounds, lengths, lengths) * 3

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=fullgraph, backend="aot_eager")
    for lengths in ([5, 3], [4, 6, 2], [1, 9]):
        bounds, inputs = _bounds(lengths), _inputs(lengths, lengths, (2, 2), "HN")
        expected = attend(*inputs, bounds, max(lengths))
        got = compiled(*inputs, bounds, longest(bounds.diff()))
        torch.testing.assert_close(got, expected)
        wanted, gradients = (torch.autograd.grad(out.square().sum(), inputs) for out in (expected, got))
        torch.testing.assert_close(gradients, wanted)
    if "100" not in str(longest(torch.tensor([1]))):
        with pytest.raises(ValueError, match=r"`max_seqlen_q` must be at least .* 9, got 7"):
            compiled(*inputs, bounds, longest(bounds.diff() - 2))


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# The good call: query (8, 4, 6), key (10, 4, 6), value (10, 4, 3), bias (4, 9), bounds 0 5 8 and 0 4 10.
BAD_CALLS = {
    "bounds as a list": ({"cu_seqlens_q": [0, 5, 8]}, TypeError, r"`cu_seqlens_q` .*Tensor, got list"),
    "fractional bounds": (
        {"cu_seqlens_k": torch.tensor([0.0, 4, 10])},
        TypeError,
        r"`cu_seqlens_k` .*int32.*got torch.float32",
    ),
    "bounds with two axes": (
        {"cu_seqlens_q": _int32(0, 5, 8)[None]},
        ValueError,
        r"`cu_seqlens_q` .*got shape \(1, 3\)",
    ),
    "no bounds": ({"cu_seqlens_q": _int32()}, ValueError, r"`cu_seqlens_q` .*got shape \(0,\)"),
    "not from 0": ({"cu_seqlens_q": _int32(1, 5, 8)}, ValueError, r"`cu_seqlens_q` .*0 .*8.*got 1"),
    "not to the end": ({"cu_seqlens_k": _int32(0, 4, 9)}, ValueError, r"`cu_seqlens_k` .*10.*got .*9"),
    "past the end": ({"cu_seqlens_k": _int32(0, 4, 11)}, ValueError, r"`cu_seqlens_k` .*10.*got .*11"),
    "decreasing": ({"cu_seqlens_q": _int32(0, 9, 8)}, ValueError, r"`cu_seqlens_q` .*decrease.*got .*9"),
    "different numbers of sequences": ({"cu_seqlens_k": _int32(0, 4, 7, 10)}, ValueError, r"`cu_seqlens_k` .*2.*got 3"),
    "maximum too small": ({"max_seqlen_q": 4}, ValueError, r"`max_seqlen_q` .*5.*got 4"),
    "maximum fractional": ({"max_seqlen_k": 6.0}, TypeError, r"`max_seqlen_k` .*int.*got 6\.0"),
    "a maximum of several": (
        {"max_seqlen_q": _int32(5, 3)},
        TypeError,
        r"`max_seqlen_q` .*a tensor with one integer, got torch.int32 with shape \(2,\)",
    ),
    "a maximum in a fractional tensor": (
        {"max_seqlen_k": torch.tensor(6.0)},
        TypeError,
        r"`max_seqlen_k` .*one integer, got torch.float32 with shape \(\)",
    ),
    "a maximum in a tensor too small": ({"max_seqlen_q": torch.tensor(4)}, ValueError, r"`max_seqlen_q` .*5.*got 4"),
    "a negative maximum in a tensor": ({"max_seqlen_k": _int32(-1)}, ValueError, r"`max_seqlen_k` .*0, got -1"),
    "query with four axes": ({"query": torch.ones(1, 8, 4, 6)}, ValueError, r"`query` .*got shape \(1, 8, 4, 6\)"),
    "other key heads": (
        {"key": torch.ones(10, 2, 6), "value": torch.ones(10, 2, 3)},
        ValueError,
        r"`key` .*4 heads.*got shape \(10, 2, 6\)",
    ),
    "another head dim": ({"key": torch.ones(10, 4, 5)}, ValueError, r"`key` .*6.*got shape \(10, 4, 5\)"),
    "keys and values differ in number": (
        {"value": torch.ones(9, 4, 3)},
        ValueError,
        r"`value` .*10.*got shape \(9, 4, 3\)",
    ),
    "a table of another batch": ({"bias": torch.ones(3, 4, 9)}, ValueError, r"`bias` .*2.*got shape \(3, 4, 9\)"),
    "beyond the table": ({"beyond": "error"}, ValueError, r"`bias` .*-4 to 4"),
    "a bad window": ({"window_size": (-3, 0)}, ValueError, r"`window_size` .*got \(-3, 0\)"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(wrong, error, message):
    """Each listed call is wrong in one place. Shapes are shown as they were given."""
    good = {
        "query": torch.ones(8, 4, 6),
        "key": torch.ones(10, 4, 6),
        "value": torch.ones(10, 4, 3),
        "bias": torch.ones(4, 9),
        "cu_seqlens_q": _int32(0, 5, 8),
        "cu_seqlens_k": _int32(0, 4, 10),
        "max_seqlen_q": 5,
        "max_seqlen_k": 6,
    }
    with pytest.raises(error) as raised:
        offset_bias_attention_varlen(**{**good, **wrong})
    assert re.search(message, str(raised.value), re.DOTALL), str(raised.value)
