"""The strip that GPU kernels read: the table at every offset, and the bounds from which on it does not change."""

import math

import pytest
import torch
from oracle import attended_pairs, pair_offsets

from triton_offset_bias import table
from triton_offset_bias.checks import check_attention

strip = pytest.importorskip("triton_offset_bias.backends.triton.strip", reason="Triton is not installed")

DEFAULTS = {
    **{"dropout_p": 0.0, "is_causal": False, "scale": None, "bias_origin": None, "beyond": "clamp"},
    **{"window_size": (-1, -1), "deterministic": None, "return_lse": False},
}
PROBLEMS = {
    "a table that covers all": (20, 24, 47, {}),
    "clamped on both sides": (20, 24, 9, {}),
    "so long that the strip is cut": (700, 650, 9, {}),
    "so long that the strip is cut, causal": (700, 650, 9, {"is_causal": True}),
    "so long that the strip is cut, a window": (650, 700, 1200, {"window_size": (30, 40)}),
    "clamped, nothing beyond": (20, 24, 9, {"beyond": "zero"}),
    "clamped, causal": (20, 24, 9, {"is_causal": True}),
    "a table of future offsets, causal": (20, 24, 5, {"is_causal": True, "bias_origin": 15}),
    "a window inside the table": (20, 24, 31, {"window_size": (4, 6)}),
    "a window outside the table": (20, 24, 5, {"window_size": (9, -1)}),
    "queries past the keys": (6, 10, 9, {"query_start": 40}),
    "queries before the keys": (6, 10, 9, {"query_start": -40, "is_causal": True}),
    "one column": (7, 5, 1, {"bias_origin": 3}),
    "a table far below": (7, 5, 3, {"bias_origin": 100}),
    "a table far above": (7, 5, 3, {"bias_origin": -100}),
    "no table": (20, 24, None, {}),
    "no table, causal": (20, 24, None, {"is_causal": True}),
    "no table, a window to the left": (20, 24, None, {"window_size": (7, -1)}),
    "no table, a window": (20, 24, None, {"window_size": (7, 3)}),
}


def _problem(len_q, len_k, columns, options):
    q, k = torch.randn(1, 2, len_q, 8), torch.randn(1, 2, len_k, 8)
    bias = None if columns is None else torch.randn(2, columns)
    query_start = options.get("query_start")
    masks = {"key_padding_mask": None, "query_positions": None, "key_positions": None}
    chosen = {**DEFAULTS, **{name: x for name, x in options.items() if name != "query_start"}}
    return check_attention(q, k, k, bias, enable_gqa=False, query_start=query_start, **masks, options=chosen)


def _biases_in_bits(problem, options):
    """{offset counted from the first query and key: (2,) bias in bits, -inf where the pair is not attended to}."""
    len_q, len_k = problem.query.shape[2], problem.key.shape[2]
    offsets = pair_offsets(len_q, len_k, problem.query_start, None, None)
    attended = attended_pairs(offsets, options.get("is_causal", False), options.get("window_size", (-1, -1)), None)[0]
    found = {}
    for i in range(len_q):
        for j in range(len_k):
            value = torch.zeros(2)
            if problem.bias is not None:
                column = int(offsets[0, i, j]) + problem.bias_origin
                inside = 0 <= column < problem.bias.shape[1]
                value = problem.bias[:, min(max(column, 0), problem.bias.shape[1] - 1)]
                value = value if inside or problem.beyond == "clamp" else torch.zeros(2)
            found[i - j] = value * math.log2(math.e) if attended[i, j] else torch.full((2,), -math.inf)
    return found


@pytest.mark.parametrize(("len_q", "len_k", "columns", "options"), PROBLEMS.values(), ids=PROBLEMS)
def test_the_strip_is_the_table_at_every_offset_and_constant_beyond_the_bounds(len_q, len_k, columns, options):
    """What a kernel reads for a pair is its bias; far tiles may use one value; loops that are left out have no work."""
    problem = _problem(len_q, len_k, columns, options)
    expected, bounds = _biases_in_bits(problem, options), strip.bounds_of(problem)
    constants = strip.constants_of(problem)
    values = strip.build_strip(problem, bounds, math.log2(math.e), constants)
    for offset, bias in expected.items():
        is_attended = bounds.band_lo <= offset <= bounds.band_hi
        assert is_attended == bool((bias > -math.inf).all())
        if values is not None:
            within = min(max(offset, bounds.near_lo - strip.PAD // 2), bounds.near_hi + strip.PAD // 2)
            torch.testing.assert_close(
                values[0, :, bounds.zero + within] + math.log2(math.e) * constants[0, :, 0], bias
            )
    parts = strip.loops(problem, bounds)
    for name, is_far, end in (
        ("FAR_LEFT", lambda offset: bounds.near_hi <= offset <= bounds.band_hi, max(bounds.near_hi, 1 - len_k)),
        ("FAR_RIGHT", lambda offset: bounds.band_lo <= offset <= bounds.near_lo, min(bounds.near_lo, len_q - 1)),
    ):
        far = [offset for offset in expected if is_far(offset)]
        assert not far or parts[name] or (name == "FAR_RIGHT" and not parts["NEAR"])
        for offset in far:
            torch.testing.assert_close(expected[offset], expected[end])


def test_the_gradient_of_every_offset_folds_back_into_the_table():
    """A gradient of one for every offset counts, in each column, the offsets that see it."""
    problem = _problem(20, 24, 9, {})
    doffsets = torch.ones(1, 2, 20 + 24 - 1)
    lo, hi = table.reachable_offsets(20, 24, 4)
    columns = (torch.arange(lo, hi + 1) + 4).clamp(0, 8)
    expected = torch.bincount(columns, minlength=9).float().expand(2, -1)
    assert torch.equal(strip.fold_offsets(problem, doffsets, lo), expected)


ROWS = {
    "of one sign, near one another": ([1000.0, 1001.5, 999.25], 999.25),
    "negative ones": ([-1000.0, -1001.5, -999.25], -1001.5),
    "of both signs": ([1.0, -1.0, 0.5], 0.0),
    "too far from one another": ([1.0, 2.5, 2.0], 0.0),
    "forbidden ones beside them": ([8.0, -math.inf, 10.0], 8.0),
    "forbidden ones alone": ([-math.inf, -math.inf, -math.inf], 0.0),
    "infinite ones": ([math.inf, math.inf, math.inf], 0.0),
    "one that is not a number": ([8.0, math.nan, 10.0], 0.0),
}


@pytest.mark.parametrize(("bias", "expected"), ROWS.values(), ids=ROWS)
def test_a_row_is_counted_from_one_of_its_numbers_where_that_is_exact(bias, expected):
    """Whatever other rows are like. Zeros beyond the table are numbers too; inputs of 16 bits have no use for it."""
    problem = _problem(20, 24, 3, {})
    bias = torch.tensor([bias, [1.0, -1.0, 0.0]])
    constants = strip.constants_of(problem._replace(bias=bias))
    assert torch.equal(constants, torch.tensor([[[expected], [0.0]]]))
    constants = strip.constants_of(problem._replace(bias=bias.expand(5, -1, -1)))
    assert torch.equal(constants, torch.tensor([[[expected], [0.0]]]).expand(5, -1, -1))
    assert not strip.constants_of(problem._replace(bias=bias, beyond="zero")).any()
    assert strip.constants_of(problem._replace(bias=bias, query=problem.query.bfloat16())) is None
