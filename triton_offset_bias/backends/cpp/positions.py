"""The positions of queries and keys in the form that the CPU engine takes.

A sequence with contiguous positions has a start; other positions are tensors.
"""

import itertools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from triton_offset_bias import table
from triton_offset_bias.checks.data import checked_key_lengths, query_starts, sequences
from triton_offset_bias.problem import Problem

LARGEST_SPREAD = 2**29


class Placed(NamedTuple):
    """The sequences of a problem, and their positions where these are not contiguous.

    Attributes:
        sequences: five int64 for each sequence: first query row, first key row, number of queries, number of keys, and
            the first query's position counted from the first key.
        longest_k: the number of keys of the longest sequence, or more.
        query_positions, key_positions: (L,) or (B, L) contiguous int32; None where `sequences` has all positions.
    """

    sequences: "array[int]"
    longest_k: int
    query_positions: Tensor | None
    key_positions: Tensor | None


def placed(problem: Problem) -> Placed:
    """Places the sequences of a problem whose tensors are on the CPU.

    Raises:
        ValueError: positions are out of `table`'s range, or spread too wide for 32-bit arithmetic even after gaps
            beyond the table and the window are shortened.
    """
    len_q, len_k = problem.max_seqlen_q, problem.max_seqlen_k
    if problem.cu_seqlens_q is not None:
        rows = itertools.chain.from_iterable(
            (*row, start) for row, start in zip(sequences(problem), query_starts(problem), strict=True)
        )
        return Placed(array("q", rows), len_k, None, None)
    if problem.key_lengths is not None:
        lengths = checked_key_lengths(problem)
        rows = itertools.chain.from_iterable((0, 0, len_q, length, length - len_q) for length in lengths)
        return Placed(array("q", rows), max(1, *lengths), None, None)
    alike = array("q", (0, 0, len_q, len_k, problem.query_start)) * problem.num_sequences
    if problem.query_positions is None:
        return Placed(alike, len_k, None, None)
    starts = _contiguous_starts(problem)
    if starts is None or problem.is_causal_by_index:
        return Placed(alike, len_k, *_narrowed(problem))
    alike[4::5] = array("q", starts)
    return Placed(alike, len_k, None, None)


def _contiguous_starts(problem: Problem) -> list[int] | None:
    """The position of each sequence's first query counted from its first key; None if some are not contiguous."""
    assert problem.query_positions is not None
    assert problem.key_positions is not None
    queries, keys = problem.query_positions.long(), problem.key_positions.long()
    for name, positions in (("query_positions", queries), ("key_positions", keys)):
        _check_range(name, positions)
    if not all(bool((x.diff() == 1).all()) for x in (queries, keys)):
        return None
    starts = (queries[..., 0] - keys[..., 0]).expand(problem.num_sequences).tolist()
    # One strip of biases serves all sequences: starts far apart would make it long.
    spread = max(starts, default=0) - min(starts, default=0)
    return starts if spread <= 8 * (problem.max_seqlen_q + problem.max_seqlen_k) else None


def _check_range(name: str, positions: Tensor) -> None:
    lowest, highest = (int(x) for x in positions.aminmax())
    if not -table.UNLIMITED < lowest <= highest < table.UNLIMITED:
        raise ValueError(f"`{name}` must be between -2**61 and 2**61, got {lowest} to {highest}")


def _narrowed(problem: Problem) -> tuple[Tensor, Tensor]:
    assert problem.query_positions is not None
    assert problem.key_positions is not None
    queries, keys = problem.query_positions.long(), problem.key_positions.long()
    lowest = min(int(x.min()) for x in (queries, keys))
    if max(int(x.max()) for x in (queries, keys)) - lowest >= LARGEST_SPREAD:
        queries, keys = _moved_together(queries, keys, _reach(problem))
        lowest = 0
    narrowed_queries, narrowed_keys = ((x - lowest).to(torch.int32).contiguous() for x in (queries, keys))
    return narrowed_queries, narrowed_keys


def _reach(problem: Problem) -> int:
    """The distance from offset 0, to either side, beyond which bias and mask stay the same."""
    limits = [x for x in (problem.min_offset, problem.max_offset) if abs(x) != table.UNLIMITED]
    if problem.bias is not None:
        limits += [-problem.bias_origin, problem.bias.shape[-1] - 1 - problem.bias_origin]
    return 1 + max(map(abs, limits), default=0)


def _moved_together(queries: Tensor, keys: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Positions from 0 on that give every pair the same bias and mask: longer gaps are shortened to `reach`."""
    points, point_of = torch.cat([queries.flatten(), keys.flatten()]).unique(return_inverse=True)
    gaps = points.diff().clamp(max=min(reach, LARGEST_SPREAD))
    places = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    spread = int(places[-1])
    if spread >= LARGEST_SPREAD:
        raise ValueError(
            f"`query_positions` and `key_positions` must lie within {LARGEST_SPREAD} of each other for backend 'cpp', "
            f"not counting gaps beyond the table and the window, got positions {spread} apart; backend 'reference' has "
            "no such limit"
        )
    near_queries, near_keys = places[point_of].split([queries.numel(), keys.numel()])
    return near_queries.view(queries.shape), near_keys.view(keys.shape)
