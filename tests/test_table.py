"""The table's layout: from offsets to columns and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_offset_bias import table

BEYOND = st.sampled_from(["clamp", "zero"])
RANGE = st.tuples(st.integers(-40, 40), st.integers(0, 40)).map(lambda start: (start[0], start[0] + start[1]))
COLUMNS = st.integers(1, 12)
ORIGIN = st.integers(-30, 30)


def _value(bias: torch.Tensor, offset: int, origin: int, beyond: str) -> float:
    """The bias that an offset sees by the documentation."""
    column = offset + origin
    if 0 <= column < len(bias):
        return float(bias[column])
    return 0.0 if beyond == "zero" else float(bias[0 if column < 0 else -1])


@settings(deadline=None, max_examples=150)
@given(RANGE, COLUMNS, ORIGIN)
def test_per_offset_lists_what_every_offset_sees(offsets, columns, origin):
    """An offset inside the table sees the column offset + origin, an offset outside the nearest end."""
    bias = torch.randn(2, columns)
    got = table.per_offset(bias, *offsets, origin)
    wanted = [[_value(row, o, origin, "clamp") for o in range(offsets[0], offsets[1] + 1)] for row in bias]
    assert torch.equal(got, torch.tensor(wanted))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(-20, 20), COLUMNS, ORIGIN, BEYOND, st.booleans())
def test_dense_bias_is_what_the_offset_of_every_pair_sees(len_q, len_k, query_start, columns, origin, beyond, batched):
    """The bias of pair (i, j) is that of query_start + i - j, whatever the path to it."""
    bias = torch.randn(1, 2, columns)
    lo, hi = table.reachable_offsets(len_q, len_k, query_start)
    assert (lo, hi) == (query_start - len_k + 1, query_start + len_q - 1)
    offsets = table.dense_offsets(torch.arange(len_q) + query_start, torch.arange(len_k))
    wanted = torch.tensor([[_value(row, o, origin, beyond) for o in range(lo, hi + 1)] for row in bias[0]])
    got = table.dense_bias(bias, offsets.expand(3, -1, -1) if batched else offsets, origin, beyond)
    assert torch.equal(got, wanted[None][..., offsets - lo].expand(got.shape))


@pytest.mark.parametrize(("columns", "origin"), [(1, 0), (2, 0), (3, 1), (4, 1), (127, 63)])
def test_the_default_origin_is_the_middle_the_left_one_of_two(columns, origin):
    """It is (N - 1) // 2. A table for lengths up to L has 2 L - 1 columns and origin L - 1."""
    assert table.default_origin(columns) == origin


@pytest.mark.parametrize(
    ("is_causal", "window", "attended"),
    [
        (False, (-1, -1), range(-9, 10)),
        (True, (-1, -1), range(0, 10)),
        (False, (3, -1), range(-9, 4)),
        (False, (-1, 3), range(-3, 10)),
        (True, (3, 2), range(0, 4)),
        (False, (0, 0), range(0, 1)),
    ],
)
def test_the_attended_interval_is_what_causality_and_window_say(is_causal, window, attended):
    """The interval keeps -right <= offset <= left, and offset >= 0 under causality."""
    lowest, highest = table.attended_interval(is_causal, window)
    assert [offset for offset in range(-9, 10) if lowest <= offset <= highest] == list(attended)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(-8, 8),
    st.integers(-9, 9),
    st.integers(-1, 9),
)
def test_the_attended_extremes_under_a_mask_are_those_of_all_pairs(mask, len_q, query_start, lowest, width):
    """The test lists every pair that the mask and the interval leave."""
    highest = lowest + width
    offsets = [query_start + i - j for row in mask for i in range(len_q) for j in range(5) if row[j]]
    attended = [offset for offset in offsets if lowest <= offset <= highest]
    expected = (min(attended), max(attended)) if attended else None
    assert table.attended_extremes(torch.tensor(mask), len_q, query_start, lowest, highest) == expected
