"""The strip that GPU kernels read: the table at every offset, and the bounds beyond which it does not change."""

import math

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from oracle import attended_pairs, pair_offsets

from triton_offset_bias import table
from triton_offset_bias.checks.call import checked_attention

strip = pytest.importorskip("triton_offset_bias.backends.triton.strip", reason="Triton is not installed")

from triton_offset_bias import ops  # noqa: E402
from triton_offset_bias.backends.triton.call import Call  # noqa: E402
from triton_offset_bias.backends.triton.dbias_sum import fold_offsets, fold_strip  # noqa: E402
from triton_offset_bias.backends.triton.kernels.arguments import Outputs  # noqa: E402
from triton_offset_bias.backends.triton.plan import Plan  # noqa: E402
from triton_offset_bias.backends.triton.prologue import prepare_forward  # noqa: E402

needs_kernels = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)

DEFAULTS = {
    **{"dropout_p": 0.0, "is_causal": False, "scale": None, "bias_origin": None, "beyond": "clamp"},
    **{"window_size": (-1, -1), "deterministic": None, "enable_gqa": False},
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
TABLES = [name for name, (*_, columns, _) in PROBLEMS.items() if columns is not None]


def _problem(len_q, len_k, columns, options):
    q, k = torch.randn(1, 2, len_q, 8), torch.randn(1, 2, len_k, 8)
    bias = None if columns is None else torch.randn(2, columns)
    query_start = options.get("query_start")
    masks = dict.fromkeys(("key_padding_mask", "query_positions", "key_positions", "key_lengths"))
    chosen = {**DEFAULTS, **{name: x for name, x in options.items() if name != "query_start"}}
    return checked_attention(q, k, k, bias, query_start=query_start, **masks, options=chosen)


def _biases_in_bits(problem, options):
    """{offset counted from the first query and key: (2,) bias in bits, -inf where the pair is not attended to}."""
    len_q, len_k = problem.query.shape[2], problem.key.shape[2]
    offsets = pair_offsets(len_q, len_k, problem.query_start, None, None)
    attended = attended_pairs(offsets, options.get("is_causal", False), options.get("window_size", (-1, -1)), None)[0]
    found = {}
    for offset in range(1 - len_k, len_q):
        i, j = max(offset, 0), max(-offset, 0)  # the first of its pairs
        value = torch.zeros(2)
        if problem.bias is not None:
            column = int(offsets[0, i, j]) + problem.bias_origin
            inside = 0 <= column < problem.bias.shape[1]
            value = problem.bias[:, min(max(column, 0), problem.bias.shape[1] - 1)]
            value = value if inside or problem.beyond == "clamp" else torch.zeros(2)
        found[offset] = value * math.log2(math.e) if attended[i, j] else torch.full((2,), -math.inf)
    return found


def _filled(problem, unit=1.0):
    """A call with its strip in a unit."""
    plan = Plan(problem)
    plan.strip = strip.Strip(problem, unit)
    call = Call(problem, plan=plan)
    out, lse, row_max, row_sum = ops._new_outputs(problem.query, problem.value)
    prepare_forward(call, Outputs(out, row_max, row_sum, lse))
    return call


@needs_kernels
@pytest.mark.parametrize("name", TABLES)
def test_the_strip_is_the_table_at_every_offset(name):
    """A kernel reads a pair's bias minus the constant of the table's row."""
    problem = _problem(*PROBLEMS[name])
    expected, made = _biases_in_bits(problem, PROBLEMS[name][-1]), _filled(problem, math.log2(math.e))
    values, bounds = made.strip, made.plan.strip.bounds
    added = 0.0 if made.constants is None else math.log2(math.e) * made.constants[0, :, 0]
    for offset, bias in expected.items():
        within = min(max(offset, bounds.near_lo - strip.PAD // 2), bounds.near_hi + strip.PAD // 2)
        torch.testing.assert_close(values[0, :, bounds.zero + within] + added, bias)


@pytest.mark.parametrize(("len_q", "len_k", "columns", "options"), PROBLEMS.values(), ids=PROBLEMS)
def test_beyond_the_bounds_the_bias_is_constant(len_q, len_k, columns, options):
    """Far tiles may use one value. Loops that are left out have no work. The band holds the attended pairs."""
    problem = _problem(len_q, len_k, columns, options)
    expected, bounds = _biases_in_bits(problem, options), strip.bounds_of(problem)
    for offset, bias in expected.items():
        assert (bounds.band_lo <= offset <= bounds.band_hi) == bool((bias > -math.inf).all())
    parts = strip.Strip(problem, 1.0).loops._asdict()
    for name, is_far, end in (
        ("FAR_LEFT", lambda offset: bounds.near_hi <= offset <= bounds.band_hi, max(bounds.near_hi, 1 - len_k)),
        ("FAR_RIGHT", lambda offset: bounds.band_lo <= offset <= bounds.near_lo, min(bounds.near_lo, len_q - 1)),
    ):
        far = [offset for offset in expected if is_far(offset)]
        assert not far or parts[name] or (name == "FAR_RIGHT" and not parts["NEAR"])
        for offset in far:
            torch.testing.assert_close(expected[offset], expected[end])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TABLES)
def test_a_strips_gradient_folds_back_into_the_table(name, dtype):
    """The inner product of strip and g equals that of table and fold of g. The fold has the table's shape and dtype."""
    problem = _problem(*PROBLEMS[name])
    problem = problem._replace(bias=problem.bias.to(dtype))
    made = _filled(problem, 1.0)
    # A table less its constants, so that the sum of the products is known to be of the table alone.
    values = made.strip + (0.0 if made.constants is None else made.constants)
    is_inside = values.isfinite()
    grad = torch.randint(-4, 5, values.shape).float() * is_inside  # sums that every dtype holds
    folded = fold_strip(made, grad)
    assert folded.dtype == dtype
    assert folded.shape == problem.bias.shape
    spread = (values.masked_fill(~is_inside, 0.0).double() * grad).sum()
    torch.testing.assert_close((problem.bias.double() * folded.double()).sum(), spread, rtol=1e-5, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("beyond", ["clamp", "zero"])
@pytest.mark.parametrize("shape", [(2500,), (3, 1500), (2, 3, 7)])
def test_every_offset_of_long_sequences_folds_back(shape, beyond):
    """There are more columns, and more offsets beyond them, than a program of the kernel takes."""
    problem = _problem(20, 24, 3, {})._replace(bias=torch.zeros(shape), bias_origin=shape[-1] // 3, beyond=beyond)
    lo, hi = -2100, 3300
    rows = (*(1,) * (3 - len(shape)), *shape[:-1])
    doffsets = torch.randint(-9, 10, (*rows, 2 * (hi - lo + 1))).float()[..., : hi - lo + 1]  # strided rows
    columns = torch.arange(lo, hi + 1) + problem.bias_origin
    is_seen = ((columns >= 0) & (columns < shape[-1])) | (beyond == "clamp")
    expected = torch.zeros(*rows, shape[-1])
    expected.index_add_(-1, columns.clamp(0, shape[-1] - 1), doffsets * is_seen)
    assert torch.equal(fold_offsets(Call(problem), doffsets, lo), expected.view(shape))


@needs_kernels
@pytest.mark.parametrize("origin", [-(2**31) + 24, -(2**31) + 280, 2**31 - 5, -(2**61) + 1, 2**40])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_table_out_of_reach_has_one_column_that_all_see(origin, deterministic):
    """However far away, where sums of indices need more bits than an index: its nearest end has all of the gradient."""
    call = build(Case("far", (20, 24), columns=9, options={"bias_origin": origin, "deterministic": deterministic}))
    assert_matches_oracle(call, results_of(call, "triton"))


@needs_kernels
@pytest.mark.parametrize("shape", [(2500,), (3, 1500), (2, 3, 7)])
def test_strips_of_several_blocks_are_the_table(shape):
    """Rows may have any stride, and have more columns than a program of the kernel takes."""
    bias = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    problem = _problem(1300, 1200, 3, {})._replace(bias=bias, bias_origin=shape[-1] // 2)
    made = _filled(problem, 2.0)
    values = made.strip[..., slice(*made.plan.strip.offsets)]
    lo = max(problem.reachable_offsets[0], made.plan.strip.bounds.near_lo - strip.PAD + problem.query_start)
    expected = 2.0 * table.per_offset(bias, lo, lo + values.shape[-1] - 1, problem.bias_origin)
    assert torch.equal(values, expected.expand_as(values))


@needs_kernels
def test_finite_numbers_stay_finite_in_a_strip():
    """Scaling does not forbid an offset. It does not hide a forbidden offset, an infinity or a NaN."""
    largest = torch.finfo(torch.float32).max
    bias = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan, 1.0, 0.0])
    problem = _problem(7, 1, 3, {})._replace(bias=bias, bias_origin=0, query_start=0)
    made = _filled(problem, 1.5)
    zero = made.plan.strip.bounds.zero
    values = made.strip[0, 0, zero : zero + 7]
    expected = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan, 1.5, 0.0])
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0, equal_nan=True)


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


@needs_kernels
@pytest.mark.parametrize(("bias", "expected"), ROWS.values(), ids=ROWS)
def test_a_row_is_counted_from_one_of_its_numbers_where_that_is_exact(bias, expected):
    """Whatever other rows are like. Zeros beyond the table are numbers too; inputs of 16 bits have no use for it."""
    problem = _problem(20, 24, 3, {})
    bias = torch.tensor([bias, [1.0, -1.0, 0.0]])
    constants = _filled(problem._replace(bias=bias)).constants
    assert torch.equal(constants, torch.tensor([[[expected], [0.0]]]))
    constants = _filled(problem._replace(bias=bias.expand(5, -1, -1))).constants
    assert torch.equal(constants, torch.tensor([[[expected], [0.0]]]).expand(5, -1, -1))
    assert _filled(problem._replace(bias=bias, beyond="zero")).constants is None
    assert _filled(problem._replace(bias=bias, query=problem.query.bfloat16())).constants is None


@needs_kernels
def test_a_row_of_several_blocks_is_counted_from_the_lowest_of_all():
    """The lowest number may stand in any block."""
    problem = _problem(20, 24, 3, {})
    bias = 100.0 + torch.rand(2, 5000)
    bias[0, 3], bias[1, 4990] = 99.0, 98.0
    constants = _filled(problem._replace(bias=bias)).constants
    assert torch.equal(constants, torch.tensor([[[99.0], [98.0]]]))
