"""The model of `bench.scaling`: its counts of pairs and keys, and what must hold of its times."""

import itertools

import pytest

from bench.scaling import Machine, overhead, pairs_of, steps_of
from triton_offset_bias.distributed.plan import Layout, Plan
from triton_offset_bias.distributed.spans import Span
from triton_offset_bias.table import UNLIMITED


def test_pairs_are_counted_as_one_by_one():
    """All small spans of queries and keys, one at or before the other or across it."""
    spans = [Span(a, b) for a, b in itertools.combinations(range(8), 2)]
    for queries, keys in itertools.product(spans, spans):
        counted = sum(key <= query for query in range(*queries) for key in range(*keys))
        assert pairs_of(queries, keys) == counted, (queries, keys)


@pytest.mark.parametrize(("layout", "sent"), [("zigzag", 2.25), ("contiguous", 1.5)])
def test_the_model_sends_what_four_ranks_send(layout, sent):
    """In units of all keys. `test_spread_training.py` measures the same on gloo ranks."""
    plan = Plan(Layout((128, 128), 4, 1, layout, 0, 0, UNLIMITED, None, False))
    steps = [list(steps_of(plan, rank)) for rank in range(4)]
    assert sum(step.keys for each in steps for step in each[1:]) == sent * 128
    assert sum(step.pairs for each in steps for step in each) == 128 * 129 // 2


def test_no_way_is_faster_than_its_kernels_and_long_sequences_hide_messages():
    """Overheads are at least 1, and fall as sequences grow."""
    machine = Machine()
    for way in ("gather", "ring", "mesh, ring"):
        found = [overhead(length, 128, way, machine, 0.8) for length in (2**17, 2**19, 2**21)]
        present = [x for x in found if x is not None]
        assert present == sorted(present, reverse=True)
        assert min(present) >= 1.0


def test_a_faster_network_never_costs_time():
    """Each way at one size, with a network twice as fast."""
    fast = Machine(network=100e9)
    for way in ("gather", "ring", "mesh, gather", "mesh, ring"):
        assert overhead(2**18, 128, way, fast, 0.8) <= overhead(2**18, 128, way, Machine(), 0.8)
