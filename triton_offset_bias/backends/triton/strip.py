"""The host's side of the strip: the bias of every offset, laid out for the kernels, and where it stops changing."""

import torch
from torch import Tensor

from triton_offset_bias.backends.triton.kernels.arguments import Bounds, Loops
from triton_offset_bias.backends.triton.kernels.scores import STRIP_PAD
from triton_offset_bias.backends.triton.kernels.strip import BLOCK, LARGEST
from triton_offset_bias.problem import Problem

PAD: int = STRIP_PAD.value  # tiles overhang the score matrix by less than this


class Strip:
    """The layout of a problem's strip, and where its bias stops changing. It holds no tensors.

    The strip itself is (1 or B, 1 or H, columns) float32: the table minus constants at every offset, in `unit`s, -inf
    outside the band. Offsets that no tile looks up are left out. With positions the strip is the table alone. Finite
    numbers stay finite: only -inf forbids a pair.

    Each row of the table is counted from a constant, (1 or B, 1 or H, 1) float32. If all numbers of a row, except -inf,
    have one sign and lie within a factor of 2 of one another, the constant is one of them. The subtraction is then
    exact (Sterbenz 1974), and scores keep the digits that the table's size would cost them. Otherwise it is 0.

    Attributes:
        bounds: see `Bounds`.
        loops: which of the kernels' loops over whole tiles have work.
        shape: the strip's shape.
        unit: the strip's unit.
        limit: the largest number that stays finite when it is multiplied by `unit`.
        has_constants: False if all rows count from 0: inputs of 16 bits have no such digits to keep, with zeros beyond
            the table the numbers are not close to one another, tables of parts are cut to what they reach, and a gate
            multiplies the constant too.
        is_zero_beyond: whether offsets outside the table have no bias.
        table_strides: the strides of the table with all its axes.
        num_columns: of the table.
        columns: the strip's number of columns, the table's column that is its first, and the range that is not -inf.
            The number is a multiple of 16, so that kernels know that rows of the strip are aligned.
        offsets: the range of the strip's columns whose offsets some pair may have.
        programs: the number of programs that fill it.
        strides: see `StripStrides`.
        is_cut: whether the strip has a mask behind it, of its own shape: it is gated, and a band forbids some pair.
        may_leave_rows_empty: whether some query may have no key to attend to, if the table has no -inf.
    """

    def __init__(self, problem: Problem, unit: float, *, is_part: bool = False) -> None:
        self.bounds = bounds_of(problem)
        self.loops = _loops(problem, self.bounds)
        self.unit, self.limit = unit, _limit(unit)
        self.may_leave_rows_empty = _may_leave_rows_empty(problem, self.bounds)
        self.has_constants, self._is_part = False, is_part
        self.is_zero_beyond = problem.beyond == "zero"
        self.shape, self.columns = (0, 0, 0), (0, 0, 0, 0)
        self.table_strides: tuple[int, ...] = (0, 0, 0)
        self.num_columns = 0
        self.offsets, self.programs, self.strides, self.is_cut = (0, 0), 0, (0, 0, 0), False
        if problem.bias is not None:
            self._lay_out(problem, problem.bias)

    def _lay_out(self, problem: Problem, bias: Tensor) -> None:
        may_have = not self._is_part and problem.beyond != "zero" and problem.bias_gate is None
        self.has_constants = may_have and problem.query.dtype == torch.float32
        first, used = _columns(problem, self.bounds)
        begin, end = 0, used
        self.offsets = (0, used)
        if problem.query_positions is None:
            lo, hi = _strip_offsets(problem, self.bounds)
            begin = PAD + min(max(problem.min_offset - lo, 0), used)
            end = used - PAD - min(max(hi - problem.max_offset, 0), used)
            self.offsets = (PAD, used - PAD)
            self.is_cut = problem.bias_gate is not None and (begin, end) != self.offsets
        width = -(-used // 16) * 16
        rows, strides = (1, 1, *bias.shape[:-1])[-2:], (0, 0, *bias.stride())[-3:]
        self.shape = (*rows, width)
        self.table_strides, self.num_columns = strides, bias.shape[-1]
        self.columns = (width, first, begin, end)
        self.programs = rows[0] * rows[1] * -(-width // BLOCK)
        mask = rows[0] * rows[1] * width if self.is_cut else 0
        self.strides = (rows[1] * width if rows[0] > 1 else 0, width if rows[1] > 1 else 0, mask)


def _may_leave_rows_empty(problem: Problem, bounds: Bounds) -> bool:
    tensors = (problem.key_padding_mask, problem.query_positions, problem.cu_seqlens_q, problem.key_lengths)
    if any(x is not None for x in tensors):
        return True
    return bounds.band_lo > 0 or bounds.band_hi < problem.query.shape[2] - problem.key.shape[2]


def bounds_of(problem: Problem) -> Bounds:
    """The bounds of a problem with at least one query and one key."""
    if problem.query_positions is not None:
        return _bounds_of_positions(problem)
    start = _start(problem)
    lowest, highest = counted_reach(problem)
    never_lo, never_hi = lowest - PAD, highest + PAD  # out of the reach of any tile
    band_lo = min(max(problem.min_offset - start, lowest), highest + 1)
    band_hi = max(min(problem.max_offset - start, highest), lowest - 1)
    if problem.bias is None:
        changes_lo, changes_hi = never_hi, never_lo  # nowhere
    else:
        first, last = _changing(problem)
        changes_lo, changes_hi = first - start, last - start
    # An edge of the band that is within reach is a change too, and on its own side everything is near.
    is_cut_below, is_cut_above = band_lo > lowest, band_hi < highest
    near_lo = band_lo - 1 if is_cut_below else min(changes_lo, band_hi if is_cut_above else never_hi)
    near_hi = band_hi + 1 if is_cut_above else max(changes_hi, band_lo if is_cut_below else never_lo)
    if problem.bias is not None:  # the strip is read at the bounds
        near_lo, near_hi = min(near_lo, highest), max(near_hi, lowest)
    elif near_hi < lowest:  # one bias for all pairs: all are far left, none far right
        near_lo = never_lo
    near_lo, near_hi = max(near_lo, never_lo), min(near_hi, never_hi)
    return Bounds(PAD - max(lowest, near_lo - PAD), band_lo, band_hi, near_lo, near_hi)


def _start(problem: Problem) -> int:
    """The position of the first query from which `Bounds` count. Packed sequences count as the caller does."""
    return problem.query_start if problem.cu_seqlens_q is None else 0


def counted_reach(problem: Problem) -> tuple[int, int]:
    """The smallest and the largest offset between any query and any key, counted as in `Bounds`."""
    lowest, highest = problem.reachable_offsets
    return lowest - _start(problem), highest - _start(problem)


def _loops(problem: Problem, bounds: Bounds) -> Loops:
    if problem.query_positions is not None:
        return Loops(FAR_LEFT=False, NEAR=True, FAR_RIGHT=False)
    lowest, highest = counted_reach(problem)
    is_flat = bounds.near_hi < lowest  # one bias for all pairs: all of them are far left
    return Loops(
        FAR_LEFT=bounds.near_hi <= min(highest, bounds.band_hi),
        NEAR=not is_flat,
        FAR_RIGHT=not is_flat and bounds.near_lo >= max(lowest, bounds.band_lo),
    )


def _limit(unit: float) -> float:
    """The largest number that stays finite when it is multiplied by `unit`."""
    largest: float = LARGEST.value
    return min(largest, (1 - 2**-22) * largest / unit)


def _columns(problem: Problem, bounds: Bounds) -> tuple[int, int]:
    """The table's column that is the strip's first column, and the strip's number of columns."""
    assert problem.bias is not None
    if problem.query_positions is not None:
        added = problem.beyond == "zero"  # a column at each end
        return -added, problem.bias.shape[-1] + 2 * added
    lo, hi = _strip_offsets(problem, bounds)
    return lo + problem.bias_origin - PAD, hi - lo + 1 + 2 * PAD


def _strip_offsets(problem: Problem, bounds: Bounds) -> tuple[int, int]:
    """The first and the last offset that a strip holds, as the caller counts them."""
    lo, hi = problem.reachable_offsets
    start = _start(problem)
    return max(lo, bounds.near_lo - PAD + start), min(hi, bounds.near_hi + PAD + start)


def _changing(problem: Problem) -> tuple[int, int]:
    """The lowest and the highest offset up to which the bias changes: the ends of the table, as the caller counts."""
    assert problem.bias is not None
    outside = problem.beyond == "zero"  # the end's bias differs from the 0 beyond it
    first, last = -problem.bias_origin, problem.bias.shape[-1] - 1 - problem.bias_origin
    return first - outside, last + outside


def _bounds_of_positions(problem: Problem) -> Bounds:
    first, last = (0, 0) if problem.bias is None else _changing(problem)
    return Bounds(-first, problem.min_offset, problem.max_offset, first, last)
