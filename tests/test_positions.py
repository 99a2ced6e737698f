"""Offsets from position tensors: offset = query_positions[i] - key_positions[j], in any number of dimensions."""

import pytest
import torch
from cases import Call, Case, assert_matches_oracle, build, results_of

from triton_offset_bias import offset_bias_attention


def _gaps(length: int, seed: int) -> torch.Tensor:
    """Increasing positions with gaps: packed documents, or images cut in patches."""
    return torch.randint(
        0, 4, (length,), generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    ).cumsum(0)


def _shuffled(batch: int, length: int, seed: int) -> torch.Tensor:
    draw = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.stack([torch.randperm(2 * length, generator=draw)[:length] - length // 2 for _ in range(batch)])


def _windows(length: int, seed: int) -> torch.Tensor:
    """Positions of six sequences, of two kinds that take turns."""
    return _shuffled(2, length, seed).repeat(3, 1)


def _swapped(positions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"query_positions": positions["key_positions"], "key_positions": positions["query_positions"]}


SHARED = {"query_positions": _gaps(13, 0), "key_positions": _gaps(17, 1)}
EACH = {"query_positions": _shuffled(2, 13, 2), "key_positions": _shuffled(2, 17, 3)}
BY_INDEX = {"is_causal": True, "causal_by": "index"}
# A few positions each, 35 years apart in milliseconds.
CLUSTERS = {name: x % 5 * 2**40 + x % 3 for name, x in EACH.items()}
CASES = [
    Case("the same for all sequences", (13, 17), columns=21, through_lse=True, options=SHARED),
    Case("the same for all, causal", (13, 17), columns=21, options={**SHARED, "is_causal": True}),
    Case("out of order, for each sequence", (13, 17), options=EACH),
    Case("out of order, causal, some see nothing", (13, 17), through_lse=True, options={**EACH, "is_causal": True}),
    Case("deterministic", (13, 17), columns=21, through_lse=True, options={**EACH, "deterministic": True}),
    Case(
        "a window, grouped heads, padding",
        (13, 17),
        heads=(4, 2),
        mask="holes",
        options={**EACH, "window_size": (5, 3)},
    ),
    Case(
        "queries for each sequence, keys for all, a table each",
        (13, 17),
        bias="BHN",
        columns=9,
        options={**EACH, "key_positions": SHARED["key_positions"], "beyond": "zero"},
    ),
    Case("no table: positions still say what is causal", (13, 17), bias=None, options={**EACH, "is_causal": True}),
    Case(
        "int32 and a moved origin",
        (13, 17),
        bias="N",
        columns=11,
        options={**{name: x.int() for name, x in SHARED.items()}, "bias_origin": 2},
    ),
    Case(
        "unsigned bytes, whose difference must not wrap",
        (13, 17),
        options={**{name: x.to(torch.uint8) for name, x in SHARED.items()}, "is_causal": True},
    ),
    Case(
        "one bucket of time for several events, causal by index",
        (13, 17),
        columns=7,
        through_lse=True,
        options={**{name: x // 4 for name, x in SHARED.items()}, **BY_INDEX},
    ),
    Case(
        "by index, no table, positions for each sequence, padding",
        (13, 17),
        bias=None,
        mask="holes",
        options={**EACH, **BY_INDEX},
    ),
    Case("by index, more queries than keys", (17, 13), options={**_swapped(EACH), **BY_INDEX}),
    Case(
        "by index, across tiles, a window of positions, grouped heads, deterministic",
        (150, 170),
        heads=(4, 2),
        columns=31,
        through_lse=True,
        options={
            "query_positions": _gaps(150, 4) // 5,
            "key_positions": _gaps(170, 5) // 5,
            "window_size": (40, 30),
            "deterministic": True,
            **BY_INDEX,
        },
    ),
    Case(
        "by index, few queries",
        (3, 300),
        columns=9,
        options={**{"query_positions": _gaps(3, 6), "key_positions": _gaps(300, 7) // 3}, **BY_INDEX},
    ),
    Case(
        "windows of two kinds, which recur",
        (33, 40),
        (24, 16),
        batch=6,
        columns=21,
        through_lse=True,
        options={"query_positions": _windows(33, 8), "key_positions": _windows(40, 10), "window_size": (9, 9)},
    ),
    Case(
        "the same window for all sequences, grouped heads, padding, one table for all heads",
        (33, 40),
        (24, 16),
        batch=6,
        heads=(4, 2),
        bias="N",
        mask="holes",
        options={"query_positions": _gaps(33, 12), "key_positions": _gaps(40, 13), "is_causal": True},
    ),
    Case(
        "windows that recur and fill a cache, by index, across tiles, deterministic",
        (150, 170),
        (40, 24),
        batch=6,
        heads=(3, 3),
        columns=31,
        through_lse=True,
        options={
            **{"query_positions": _gaps(150, 14) // 5, "key_positions": _windows(170, 15) // 3},
            **{"deterministic": True, **BY_INDEX},
        },
    ),
    Case(
        "windows that recur, no table, dropout",
        (33, 40),
        (24, 16),
        batch=6,
        bias=None,
        options={
            **{"query_positions": _windows(33, 16), "key_positions": _gaps(40, 17)},
            **{"is_causal": True, "dropout_p": 0.2},
        },
    ),
    *(
        Case(
            f"windows of {length} tokens, which recur", (length, length), (40, 24), batch=4, columns=31, options=options
        )
        for length in (32, 64)
        for options in [{"query_positions": _gaps(length, 18), "key_positions": _gaps(length, 19)}]
    ),
    Case("one column for all offsets", (13, 17), columns=1, through_lse=True, options=EACH),
    Case("clusters far apart", (13, 17), columns=9, options=CLUSTERS),
    Case("clusters far apart, causal, no table", (13, 17), bias=None, options={**CLUSTERS, "is_causal": True}),
    Case(
        "clusters far apart, a window beyond a table far to one side, zeros",
        (13, 17),
        columns=5,
        options={**CLUSTERS, "window_size": (900, -1), "bias_origin": -700, "beyond": "zero"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_every_result_is_as_accurate_as_plain_pytorch(backend, case):
    """Output, log-sum-exp and gradients are compared with the oracle."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, backend))


@pytest.mark.cpu_only
@pytest.mark.needs_engine
def test_positions_too_far_apart_for_the_engine_are_an_error_that_tells_how_far():
    """A window that reaches from one cluster to the next leaves no gap to shorten."""
    q, k = torch.randn(2, 2, 13, 8), torch.randn(2, 2, 17, 8)
    with pytest.raises(ValueError, match=r"`query_positions`.* within 536870912 .*got positions \d+ apart"):
        offset_bias_attention(q, k, k, None, **CLUSTERS, window_size=(2**41, -1), backend="cpp")


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "beyond": "zero"}, {"window_size": (4, 6)}], ids=str)
def test_contiguous_positions_equal_the_default(options):
    """Keys count from 0, and the last query lies on the last key. Shifting all positions changes nothing."""
    case = Case("contiguous", (11, 15), columns=9, through_lse=True, options=options)
    expected = results_of(build(case), "reference")
    for shift in (0, -1000):
        call = build(case)
        positions = {"query_positions": torch.arange(4, 15) + shift, "key_positions": torch.arange(15) + shift}
        call.options = {**call.options, **positions}
        got = results_of(call, "reference")
        for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(3, 4), (7, 7), (16, 9), (32, 32)], ids=str)
def test_one_integer_per_offset_serves_two_dimensions(backend, size):
    """Swin's bias over (row, column) offsets has p = row (2 W - 1) + column, and the flattened 2-D table."""
    height, width = size
    heads = 1 if height == 32 else 2
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    q, k, v, dout = (torch.randn(heads, heads, height * width, 8) for _ in range(4))
    table = torch.randn(heads, 2 * height - 1, 2 * width - 1, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [table]

    row_offsets = rows[:, None] - rows[None, :] + height - 1
    column_offsets = columns[:, None] - columns[None, :] + width - 1
    materialised = table[:, row_offsets, column_offsets].expand(heads, -1, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=materialised)
    expected = [expected, *torch.autograd.grad(expected, leaves, dout)]

    positions = rows * (2 * width - 1) + columns
    out = offset_bias_attention(
        q, k, v, table.flatten(1), query_positions=positions, key_positions=positions, backend=backend
    )
    for got, wanted in zip([out, *torch.autograd.grad(out, leaves, dout)], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def _attend(options: dict, backend: str, columns: int = 9, bias_origin: int = 4) -> torch.Tensor:
    q, k, v = (torch.ones(2, 1, length, 4) for length in (3, 6, 6))
    return offset_bias_attention(
        q, k, v, torch.zeros(1, columns), bias_origin=bias_origin, beyond="error", **options, backend=backend
    )


FAR_KEY = {"query_positions": torch.tensor([3, 4, 5]), "key_positions": torch.tensor([2, 3, 4, 5, 6, 90])}
FAR_KEY_IN_ONE = {
    "query_positions": FAR_KEY["query_positions"],
    "key_positions": torch.stack([FAR_KEY["key_positions"], torch.arange(1, 7)]),
}
KEEP_FIRST_FIVE = {"key_padding_mask": (torch.arange(6) < 5).expand(2, 6)}
HIDE_LAST_OF_ONE = {"key_padding_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]) > 0}
COVERED = {
    "causality hides the far key": {**FAR_KEY, "is_causal": True},
    "the window hides the far key": {**FAR_KEY, "window_size": (-1, 80)},
    "the mask hides the far key": {**FAR_KEY, **KEEP_FIRST_FIVE},
    "the far key's sequence hides it": {**FAR_KEY_IN_ONE, **HIDE_LAST_OF_ONE},
    "without positions, the mask hides the first key": {"key_padding_mask": torch.arange(6).expand(2, 6) > 0},
    "without positions, the window": {"window_size": (4, -1)},
    "nothing is attended to": {**FAR_KEY, "key_padding_mask": torch.zeros(2, 6) > 0},
}
UNCOVERED = {
    "the far key": (FAR_KEY, r"-87 to 3"),
    "the far key of one sequence": ({**FAR_KEY_IN_ONE, "window_size": (4, -1)}, r"-87 to 4"),
    "the mask leaves the far key to one sequence": ({**FAR_KEY, **HIDE_LAST_OF_ONE}, r"-87 to 3"),
    "without positions, the first key": ({}, r"-2 to 5"),
    "without positions, a mask that keeps the first key": (KEEP_FIRST_FIVE, r"-1 to 5"),
}


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize("options", COVERED.values(), ids=COVERED)
def test_an_offset_beyond_the_table_is_no_error_where_no_pair_attends_to_it(options, name):
    """Values are equal. So the output is 1, or 0 where nothing is attended to."""
    visible = options.get("key_padding_mask", torch.ones(2, 6) > 0).any()
    assert (_attend(options, name) == float(visible)).all()


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(("options", "attended"), UNCOVERED.values(), ids=UNCOVERED)
def test_an_attended_offset_beyond_the_table_is_an_error_that_tells_the_range(options, attended, name):
    """The message tells which offsets the table holds and which are attended to."""
    with pytest.raises(ValueError, match=rf"`bias` .*-4 to 4.*{attended}"):
        _attend(options, name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_a_deterministic_gradient_does_not_hide_nan(backend):
    """Its sum may be of integers, which have no NaN. The other head's gradient stays right."""
    q, k, v, positions = *(torch.randn(1, 2, 9, 8) for _ in range(3)), torch.arange(9) * 2 % 9
    bias = torch.randn(2, 17, requires_grad=True)
    options = {"query_positions": positions, "key_positions": positions, "deterministic": True, "backend": backend}
    expected = torch.autograd.grad(offset_bias_attention(q, k, v, bias, **options).sum(), bias)[0]
    q[0, 0, 3, 1] = float("nan")
    got = torch.autograd.grad(offset_bias_attention(q, k, v, bias, **options).sum(), bias)[0]
    assert got[0].isnan().any()
    torch.testing.assert_close(got[1], expected[1])


def test_the_gradient_at_equal_positions_sums_over_all_pairs():
    """All tokens lie in one place, so one column gets the whole gradient. It is the sum of dlse."""
    call: Call = build(
        Case(
            "one place",
            (6, 7),
            columns=5,
            through_lse=True,
            options={"query_positions": torch.full((6,), 3), "key_positions": torch.full((7,), 3)},
        )
    )
    dbias = results_of(call, "reference").dbias
    assert dbias[:, [0, 1, 3, 4]].count_nonzero() == 0
    torch.testing.assert_close(dbias[:, 2], call.dlse.sum((0, 2)))


def test_events_in_one_bucket_of_time_do_not_see_later_events(backend):
    """By position the first event of a bucket sees the last. By index its output does not depend on the last."""
    (query, key, value), bias = torch.randn(3, 1, 2, 6, 8), torch.randn(2, 5)
    hours = torch.tensor([3, 3, 3, 4, 4, 9])
    options = {"is_causal": True, "query_positions": hours, "key_positions": hours, "backend": backend}
    changed = value.clone()
    changed[:, :, 2] += 1.0
    for causal_by, sees in (("position", [0, 1, 2, 3, 4, 5]), ("index", [2, 3, 4, 5])):
        outs = [offset_bias_attention(query, key, x, bias, causal_by=causal_by, **options) for x in (value, changed)]
        assert (outs[0] != outs[1]).any(-1).any(1)[0].nonzero().flatten().tolist() == sees
    by_order = offset_bias_attention(query, key, value, bias, is_causal=True, backend=backend)
    without = offset_bias_attention(query, key, value, bias, is_causal=True, causal_by="index", backend=backend)
    assert torch.equal(by_order, without)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False, True], [False, True, True, True]])])
def test_beyond_error_looks_only_at_pairs_that_indices_allow(backend, mask):
    """Query 0 attends to keys 0 and 1 only, whatever the other positions are."""
    query, key = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 4, 8)
    options = {"is_causal": True, "causal_by": "index", "beyond": "error", "backend": backend, "key_padding_mask": mask}
    options |= {"query_positions": torch.tensor([0, 5, 5]), "key_positions": torch.tensor([0, 1, 5, 5])}
    offset_bias_attention(query, key, key, torch.randn(1, 11), **options)  # offsets from -1 to 5 are attended to
    with pytest.raises(ValueError, match=r"offsets -3 to 3, but offsets (-1|0) to 5 are attended to"):
        offset_bias_attention(query, key, key, torch.randn(1, 7), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal_by": "time"}, "`causal_by` must be one of 'position', 'index', got 'time'"),
        ({"causal_by": "index"}, "`causal_by` must be 'position' where `is_causal` is False, got 'index'"),
    ],
)
def test_a_causality_that_means_nothing_is_an_error(options, message):
    """It is refused without positions, too."""
    query = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match=message):
        offset_bias_attention(query, query, query, None, **options)
