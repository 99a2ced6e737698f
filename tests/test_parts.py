"""Attention that meets the keys part by part: sums that go on, pieces of the table, gradients that add up."""

import functools
import itertools

import pytest
import torch
from cases import DROPOUT_SEED, Call, Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from oracle import Results, oracle
from torch import Tensor

from triton_offset_bias import dropout, offset_bias_attention_varlen, parts, table
from triton_offset_bias.checks.call import Options, checked_attention
from triton_offset_bias.problem import Problem

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
served = pytest.mark.parametrize("backend", AVAILABLE)
DEFAULTS = {
    **{"is_causal": False, "scale": None, "enable_gqa": False, "bias_origin": None, "beyond": "clamp"},
    **{"window_size": (-1, -1), "deterministic": None, "dropout_p": 0.0},
}

CASES = [
    Case("all pairs", (50, 61), (16, 24), through_lse=True),
    Case("causal: some parts reach nothing", (70, 70), through_lse=True, options={"is_causal": True}),
    Case("grouped heads, a window", (64, 64), heads=(4, 2), options={"window_size": (9, 3)}),
    Case("a table that ends within a part", (60, 60), columns=31, options={"beyond": "zero", "bias_origin": 20}),
    Case("the same, clamped, and queries before keys", (60, 40), columns=31, options={"query_start": -25}),
    Case("holes, and rows without any key", (40, 60), mask="one sequence has no key", through_lse=True),
    Case("one table for all heads, transposed", (40, 60), bias="N", layout="transposed BLHD"),
    Case("a table for each sequence, numbers that forbid", (50, 50), bias="BHN", forbidden=(40, 41, 42, 55)),
    Case("no table", (50, 50), bias=None, options={"is_causal": True, "scale": -0.3}),
    Case("one query: keys are read where they lie", (1, 90), heads=(4, 2), through_lse=True),
    Case("bfloat16", (70, 70), (32, 24), dtype=BF16, through_lse=True, options={"is_causal": True}),
    Case("float16, bfloat16 table", (40, 60), dtype=F16, bias_dtype=BF16),
    Case("float64", (50, 61), dtype=F64, bias_dtype=F64, through_lse=True, options={"is_causal": True}),
    Case("dropout", (50, 61), heads=(4, 2), options={"dropout_p": 0.3, "is_causal": True}),
    Case("dropout, longer than a block of 96", (130, 140), options={"dropout_p": 0.5}),
    Case("positions", (30, 40), options={"query_positions": torch.arange(30) // 2 * 3,
                                         "key_positions": torch.arange(40).flip(0)}),
    Case("a gate", (50, 61), (16, 24), heads=(4, 2), rank=1, through_lse=True, options={"is_causal": True}),
    Case("a gate of rank 5, a table that ends within a part", (60, 60), columns=31, rank=5, through_lse=True,
         options={"beyond": "zero", "bias_origin": 20}),
    Case("one query with a gate", (1, 90), heads=(4, 2), rank=3, through_lse=True),
    Case("a gate of rank 3, one table for each sequence, dropout", (50, 61), bias="BHN", rank=3,
         options={"dropout_p": 0.3}),
    Case("positions and a gate of rank 2", (30, 40), rank=2, options={
        "query_positions": torch.arange(30) // 2 * 3, "key_positions": torch.arange(40).flip(0)}),
]  # fmt: skip


def _problem(call: Call) -> Problem:
    """The call, checked, with a seed that the oracle draws too."""
    tensors = ("query_start", "key_padding_mask", "query_positions", "key_positions", "key_lengths")
    torch.manual_seed(DROPOUT_SEED)
    return checked_attention(
        *(None if x is None else x.detach() for x in (call.q, call.k, call.v, call.bias)),
        **{name: call.options.get(name) for name in tensors},
        bias_gate=None if call.gate is None else call.gate.detach(),
        options=Options(**{name: call.options.get(name, value) for name, value in DEFAULTS.items()}),
    )


def _part(problem: Problem, queries: tuple[int, int], keys: tuple[int, int]) -> Problem:
    """The call of some queries with some keys, in place of the whole."""
    (q, q_end), (k, k_end) = queries, keys
    cut = {name: getattr(problem, name)[:, :, k:k_end] for name in ("key", "value")}
    if problem.bias_gate is not None:
        cut["bias_gate"] = problem.bias_gate[:, :, q:q_end]
    for name, (begin, end) in {"key_padding_mask": keys, "key_positions": keys, "query_positions": queries}.items():
        if getattr(problem, name) is not None:
            cut[name] = getattr(problem, name)[..., begin:end]
    return problem._replace(
        query=problem.query[:, :, q:q_end],
        **cut,
        query_start=problem.query_start + q - k,
        max_seqlen_q=q_end - q,
        max_seqlen_k=k_end - k,
        dropout_place=dropout.Place(q, k, 0, problem.query.shape[1]) if problem.seed is not None else None,
    )


def _in_parts(call: Call, backend: str, bounds_q: tuple[int, ...], bounds_k: tuple[int, ...]) -> Results:
    """The results of a call whose queries and keys are cut at the bounds."""
    problem = _problem(call)
    dtype = parts.arithmetic_dtype(problem.query.dtype)
    constants = None
    if problem.bias is not None:
        bias, constants = parts.counted_table(problem.bias, problem.query, problem.beyond, call.gate is not None)
        problem = problem._replace(bias=bias)
    rows = parts.new_rows(problem.query, problem.value.shape[3])
    for x in rows[:2]:  # nobody reads what a row's first part finds there
        x.fill_(torch.nan)
    calls = list(itertools.product(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k)))
    for queries, keys in calls:
        parts.attend(_part(problem, queries, keys), rows.narrow(queries[0], queries[1] - queries[0]), backend)
    out, lse = rows.finish(constants)
    whole = parts.Rows(out.to(problem.query.dtype), rows.row_max, rows.row_sum)
    dquery, dkey, dvalue = (torch.zeros_like(x, dtype=dtype) for x in problem[:3])
    dbias, dgate = (None if x is None else torch.zeros_like(x) for x in (problem.bias, problem.bias_gate))
    for queries, keys in calls:

        def cut(x: Tensor | None, bounds: tuple[int, int] = queries) -> Tensor | None:
            return None if x is None else x[:, :, bounds[0] : bounds[1]]

        totals = parts.Gradients(cut(dquery), cut(dkey, keys), cut(dvalue, keys), dbias, cut(dgate))
        those = whole.narrow(queries[0], queries[1] - queries[0])
        parts.differentiate(_part(problem, queries, keys), those, cut(call.dout), cut(call.dlse), totals, backend)
    gradients = [x.to(problem.query.dtype) for x in (dquery, dkey, dvalue)]
    return Results(whole.acc, lse, *gradients, None if dbias is None else dbias.to(call.bias.dtype), dgate)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.reason}")
        for name, case in itertools.product(AVAILABLE, CASES)
        if name != "triton" or (case.dtype != F64 and (case.rank or 1) == 1)
    ],
)
def test_parts_add_up_to_the_whole(backend, case):
    """Queries are cut in two, keys in four, one of them a single key: output, log-sum-exp and gradients are right."""
    call = build(case)
    len_q, len_k = case.lengths
    bounds_q = (0, len_q) if len_q == 1 else (0, len_q // 3, len_q)
    got = _in_parts(call, backend, bounds_q, (0, 1, len_k // 4, len_k // 2 + 3, len_k))
    assert_matches_oracle(call, got)


@served
def test_parts_in_16_bits_are_not_rounded(backend):
    """The results from 60 parts err no more than the results of one call, on the root of the mean square.

    Parts take delta from the rounded output, as fused backends do. The reference in one call does not.
    """
    call = build(Case("bfloat16", (60, 60), dtype=BF16))
    truth = oracle(*(x.detach() for x in (call.q, call.k, call.v, call.bias)), dout=call.dout)
    whole = results_of(call, backend)
    got = _in_parts(call, backend, (0, 60), tuple(range(61)))
    for name in ("out", "dv") if backend == "reference" else ("out", "dq", "dk", "dv", "dbias"):
        error, allowed = ((getattr(x, name) - getattr(truth, name)).square().mean().sqrt() for x in (got, whole))
        assert error <= 1.1 * allowed, name


@served
@pytest.mark.parametrize("level", [1000.0, -1000.0, 0.0])
def test_large_tables_lose_no_digits(backend, level):
    """The constant of the whole table is taken off once. Pieces have no constants of their own."""
    call = build(Case("large", (40, 40), through_lse=True, options={"is_causal": True}))
    with torch.no_grad():
        call.bias.add_(level)
    got = _in_parts(call, backend, (0, 20, 40), (0, 13, 40))
    assert_matches_oracle(call, got)


def test_the_constant_of_a_row_is_a_number_of_it_where_subtracting_is_exact():
    """Infinite numbers do not count, and rows with both signs, or too far apart, have 0."""
    inf = float("inf")
    rows = torch.tensor([[3.0, 4, 6, -inf], [-3, -6, -4, -inf], [3, 7, 4, 4], [-1, 1, 1, 1], [-inf] * 4])
    assert table.exact_constants(rows).squeeze(-1).tolist() == [3, -3, 0, 0, 0]


@pytest.mark.parametrize("lowest", range(-6, 7))
@pytest.mark.parametrize("span", [0, 1, 5])
def test_the_columns_that_offsets_see(lowest, span):
    """They are those of the clamped offsets, in one range."""
    seen = [min(max(offset + 2, 0), 4) for offset in range(lowest, lowest + span + 1)]
    assert table.columns_seen(5, 2, lowest, lowest + span) == (min(seen), max(seen) + 1)


@served
@pytest.mark.parametrize("deterministic", [True, False])
def test_parts_give_the_same_bits_again(backend, deterministic):
    """Two runs agree, on one machine."""
    call = build(Case("again", (70, 70), options={"deterministic": deterministic}))
    first, second = (_in_parts(call, backend, (0, 30, 70), (0, 20, 70)) for _ in range(2))
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in ("out", "lse", "dq", "dk", "dv", "dbias"))


FORWARD = torch.ops.triton_offset_bias.attention.default


@served
@pytest.mark.parametrize("place", [(0, 0, 0, 4), (16, 32, 2, 4), (5, 19, 1, 7)])
def test_a_part_of_the_rows_and_heads_drops_the_weights_that_the_whole_drops(backend, place):
    """Queries, keys and heads in the middle of a whole, two sequences; the weights are read off a value of ones."""
    first_q, first_k, first_h, heads = place
    len_q, len_k, here = 21, 37, 2
    seed = torch.tensor(5)
    whole = dropout.kept(seed, 0.5, 0, 2, heads, first_q + len_q, first_k + len_k)
    expected = whole[:, first_h : first_h + here, first_q:, first_k:]
    assert torch.equal(dropout.kept(seed, 0.5, 0, 2, here, len_q, len_k, dropout.Place(*place)), expected)
    q = torch.zeros(2, here, len_q, 8)
    call = Call(q, torch.zeros(2, here, len_k, 8), torch.eye(len_k).expand(2, here, -1, -1), None, q, None, {})
    problem = _problem(call)._replace(seed=seed, dropout_p=0.5, dropout_place=dropout.Place(*place))
    rows = parts.new_rows(q, len_k)
    parts.attend(problem, rows, backend)
    assert torch.equal(rows.acc != 0, expected)
    if backend != "reference":
        out, *_ = FORWARD(*problem, backend)
        assert torch.equal(out != 0, expected)


@served
@pytest.mark.parametrize("bias_shape", [(3, 41), (4, 3, 41)])
def test_packed_sequences_that_are_cut(backend, bias_shape):
    """Sequences of 9, 0, 14 and 17 tokens, cut where two processes meet: `query_starts` places what is left of each."""
    lengths, heads, cut = (9, 0, 14, 17), 3, 19
    bounds = [0, *itertools.accumulate(lengths)]
    dtype, atol = (torch.float32, 2e-6) if backend == "triton" else (F64, 1e-12)
    tensors = [torch.randn(40, heads, 8, dtype=dtype).to(F64).requires_grad_() for _ in range(3)]
    bias = torch.randn(bias_shape, dtype=dtype).to(F64).requires_grad_()
    cu = torch.tensor(bounds, dtype=torch.int32)
    out, lse = offset_bias_attention_varlen(
        *tensors, bias, cu, cu, 17, 17, is_causal=True, return_lse=True, backend="reference"
    )
    dout, dlse = (torch.randn_like(x, dtype=dtype).to(F64) for x in (out, lse))
    expected = torch.autograd.grad((out, lse), (*tensors, bias), (dout, dlse))

    bias, dout, dlse = (x.detach().to(dtype) for x in (bias, dout, dlse))
    q, k, v = (x.detach().to(dtype).transpose(0, 1).unsqueeze(0) for x in tensors)
    problem = _problem(Call(q, k, v, None, q, None, {"is_causal": True}))
    problem = problem._replace(bias=bias, bias_origin=20)
    rows = parts.new_rows(q, 8)
    sides = [(0, cut), (cut, 40)]

    def piece(queries: tuple[int, int], keys: tuple[int, int]) -> Problem:
        """Every sequence's rows in two ranges of rows."""
        cut_q, cut_k = ([min(max(x, lo), hi) for x in bounds] for lo, hi in (queries, keys))
        starts = [(q0 - b) - (k0 - b) for b, q0, k0 in zip(bounds, cut_q, cut_k, strict=False)][: len(lengths)]
        return _part(problem, queries, keys)._replace(
            cu_seqlens_q=torch.tensor(cut_q, dtype=torch.int32) - queries[0],
            cu_seqlens_k=torch.tensor(cut_k, dtype=torch.int32) - keys[0],
            query_starts=torch.tensor(starts),
        )

    for queries, keys in itertools.product(sides, sides):
        parts.attend(piece(queries, keys), rows.narrow(queries[0], queries[1] - queries[0]), backend, (-40, 40))
    got_out, got_lse = rows.finish(None)
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=atol, check_dtype=False)
    same(got_out[0].transpose(0, 1), out.detach())
    same(got_lse[0], lse.detach())
    totals = parts.Gradients(*(torch.zeros_like(x) for x in (q, k, v)), torch.zeros_like(bias))
    dout, dlse = dout.transpose(0, 1).unsqueeze(0), dlse.unsqueeze(0)
    whole = parts.Rows(got_out, *rows[1:])
    for queries, keys in itertools.product(sides, sides):
        (a, b), (c, d) = queries, keys
        here = parts.Gradients(totals.dquery[:, :, a:b], totals.dkey[:, :, c:d], totals.dvalue[:, :, c:d], totals.dbias)
        parts.differentiate(
            piece(queries, keys), whole.narrow(a, b - a), dout[:, :, a:b], dlse[:, :, a:b], here, backend, (-40, 40)
        )
    for x, gradient in zip(totals[:3], expected, strict=False):
        same(x[0].transpose(0, 1), gradient)
    same(totals.dbias, expected[3])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"query_starts": torch.tensor([0])}, ValueError, "`query_starts` must be None unless sequences are packed"),
        ({"dropout_place": (0, 0, 0)}, ValueError, r"`dropout_place` must be four integers .* got \(0, 0, 0\)"),
        ({"dropout_place": (0, -1, 0, 1)}, ValueError, r"`dropout_place` must be four integers .* got \(0, -1, 0, 1\)"),
    ],
    ids=["starts", "three numbers", "below 0"],
)
@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_the_operator_refuses_places_that_do_not_fit(wrong, error, message):
    """Otherwise the engine would read other memory."""
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(error, match=message):
        FORWARD(*_problem(Call(q, q, q, None, q, None, {}))._replace(**wrong), "cpp")


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_the_operator_refuses_starts_that_are_not_one_for_each_sequence():
    """Two packed sequences, and three starts."""
    q, bounds = torch.randn(5, 1, 8), torch.tensor([0, 2, 5])
    problem = _problem(Call(*(q.transpose(0, 1).unsqueeze(0),) * 3, None, q, None, {}))
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "query_starts": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"`query_starts` must have shape \(2,\), got shape \(3,\)"):
        FORWARD(*problem._replace(**packed), "cpp")
