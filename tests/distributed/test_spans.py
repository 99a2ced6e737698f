"""Spans and plans, which need no ranks: who holds what, who needs which keys."""

import itertools

import pytest
from spread_cases import CASES

from triton_offset_bias import table
from triton_offset_bias.distributed import spans_of
from triton_offset_bias.distributed.plan import Layout, Plan
from triton_offset_bias.distributed.spans import LAYOUTS, merged


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("length", "world"), [(0, 2), (1, 3), (7, 4), (64, 4), (97, 3), (100, 1)])
def test_spans_hold_every_position_once_and_sizes_differ_by_one_a_span(layout, length, world):
    """No position is left over where ranks do not divide the length."""
    held = spans_of(length, world, layout)
    assert len(held) == world
    positions = [p for spans in held for span in spans for p in range(*span)]
    assert sorted(positions) == list(range(length))
    sizes = [span.size for spans in held for span in spans]
    assert max(sizes) - min(sizes) <= 1


def test_zigzag_gives_all_ranks_the_same_work_under_causality():
    """The pairs of queries with keys before them, counted."""
    for world in (2, 3, 4):
        work = [sum(i + 1 for span in spans for i in range(*span)) for spans in spans_of(48 * world, world, "zigzag")]
        assert max(work) == min(work)


def test_spans_that_touch_are_merged():
    """Empty spans vanish."""
    assert merged([*spans_of(40, 4, "zigzag")[3], *spans_of(0, 1)[0]]) == [(15, 25)]


def _needed_pairs(plan: Plan, reader: int, owner: int) -> set[int]:
    return {p for span in plan.needed(reader, owner) for p in range(*span)}


@pytest.mark.parametrize("case", [c for c in CASES if "query_positions" not in c.options], ids=lambda c: c.reason)
@pytest.mark.parametrize(("ring", "heads"), [(3, 1), (2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_that_a_query_reaches_is_needed_once(case, ring, heads, layout):
    """Of each owner the needed keys hold all that are attended to. They end with attended ones."""
    band = table.attended_interval(case.options.get("is_causal", False), case.options.get("window_size", (-1, -1)))
    start = case.options.get("query_start", case.lengths[1] - case.lengths[0])
    plan = Plan(Layout(case.lengths, ring, heads, layout, start, *band, None, False))
    for reader, owner in itertools.product(range(ring), range(ring)):
        attended = {
            key
            for span in plan.keys[owner]
            for key in range(*span)
            if any(band[0] <= start + q - key <= band[1] for side in plan.queries[reader] for q in range(*side))
        }
        needed = _needed_pairs(plan, reader, owner)
        assert attended <= needed
        for span in plan.needed(reader, owner):
            assert {span.start, span.stop - 1} <= attended


def test_documents_reach_only_their_own_keys():
    """A span of queries that begins within one document and ends within another."""
    bounds = (0, 10, 10, 22, 40)
    plan = Plan(Layout((40, 40), 2, 1, "contiguous", 0, 0, 2**61, (bounds, bounds), False))
    assert plan.needed(0, 0) == [(0, 20)]
    assert plan.needed(0, 1) == []
    assert plan.needed(1, 0) == [(10, 20)]
    assert [document.number for document in plan.documents_of(plan.queries[1][0])] == [2, 3]
