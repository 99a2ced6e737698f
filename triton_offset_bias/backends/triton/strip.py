"""The host's side of the strip: the bias of every offset, laid out for the kernels, and where it stops changing."""

import torch
from torch import Tensor

from triton_offset_bias.backends.triton.kernels.arguments import Bounds, Loops
from triton_offset_bias.backends.triton.kernels.scores import STRIP_PAD
from triton_offset_bias.backends.triton.kernels.strip import BLOCK, LARGEST, constants_kernel, fold_kernel, strip_kernel
from triton_offset_bias.problem import Problem

_OPTIONS = {"BLOCK": BLOCK, "enable_fp_fusion": True}
PAD: int = STRIP_PAD.value  # tiles overhang the score matrix by less than this


class Strip:
    """The bias of a problem as kernels read it. The constructor launches nothing.

    Attributes:
        bounds: see `Bounds`.
        loops: which of the kernels' loops over whole tiles have work.
        values: once filled, (1 or B, 1 or H, columns) float32: the table minus `constants` at every offset, in `unit`s,
            -inf outside the band. Offsets that no tile looks up are left out. With positions the strip is the table
            alone. Finite numbers stay finite: only -inf forbids a pair. None without a table.
        constants: once filled, (1 or B, 1 or H, 1) float32: the number that each row of the table is counted from.
            None: all rows count from 0. If all numbers of a row, except -inf, have one sign and lie within a factor of
            2 of one another, the constant is one of them. The subtraction is then exact (Sterbenz 1974), and scores
            keep the digits that the table's size would cost them. Otherwise it is 0. Inputs of 16 bits have no such
            digits to keep; with zeros beyond the table the numbers are not close to one another.
    """

    def __init__(self, problem: Problem, unit: float) -> None:
        self._problem = problem
        self._unit = unit
        self.bounds = bounds_of(problem)
        self.loops = _loops(problem, self.bounds)
        self.values: Tensor | None = None
        self.constants: Tensor | None = None

    def fill(self) -> None:
        """Launches the kernels that make the strip from the table."""
        problem = self._problem
        if problem.bias is None:
            return
        bias = _with_heads(problem.bias)
        if problem.query.dtype == torch.float32 and problem.beyond != "zero":
            self.constants = bias.new_empty(*bias.shape[:2], 1, dtype=torch.float32)
            rows = self.constants.numel()
            constants_kernel[(rows,)](bias, self.constants, *bias.stride(), *bias.shape[1:], **_OPTIONS)
        first, width = _columns(problem, self.bounds)
        begin, end = 0, width
        if problem.query_positions is None:
            lo, hi = _strip_offsets(problem, self.bounds)
            begin = PAD + min(max(problem.min_offset - lo, 0), width)
            end = width - PAD - min(max(hi - problem.max_offset, 0), width)
        self.values = bias.new_empty(*bias.shape[:2], width, dtype=torch.float32)
        strip_kernel[(bias.shape[0] * bias.shape[1] * -(-width // BLOCK),)](
            bias, bias if self.constants is None else self.constants, self.values,
            *bias.stride(), *bias.shape[1:], width, first, begin, end, self._unit, _limit(self._unit),
            HAS_CONSTANTS=self.constants is not None, IS_ZERO_BEYOND=problem.beyond == "zero", **_OPTIONS,
        )  # fmt: skip

    def add_constants(self, lse: Tensor) -> None:
        """Adds to a (B, H, M) log-sum-exp the constants that the table was counted from."""
        bounds_q = self._problem.cu_seqlens_q
        if self.constants is None:
            return
        constants = self.constants
        if bounds_q is not None and len(constants) > 1:  # of each token's sequence
            tokens = torch.arange(lse.shape[2], dtype=bounds_q.dtype, device=lse.device)
            constants = constants[torch.searchsorted(bounds_q[1:-1].contiguous(), tokens, right=True), :, 0].mT
        lse += constants

    def may_leave_rows_empty(self) -> bool:
        """Whether some query may have no key to attend to. Values of -inf in the table are not considered."""
        problem, bounds = self._problem, self.bounds
        tensors = (problem.key_padding_mask, problem.query_positions, problem.cu_seqlens_q, problem.key_lengths)
        if any(x is not None for x in tensors):
            return True
        return bounds.band_lo > 0 or bounds.band_hi < problem.query.shape[2] - problem.key.shape[2]

    def fold(self, dvalues: Tensor) -> Tensor:
        """The table's gradient, in its shape and dtype, from the gradient of `values`."""
        first, width = _columns(self._problem, self.bounds)
        pad = PAD if self._problem.query_positions is None else 0
        return _fold(self._problem, dvalues, first, pad, width - pad)


def bounds_of(problem: Problem) -> Bounds:
    """The bounds of a problem with at least one query and one key."""
    if problem.query_positions is not None:
        return _bounds_of_positions(problem)
    start = problem.query_start
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


def counted_reach(problem: Problem) -> tuple[int, int]:
    """The smallest and the largest offset between any query and any key, counted as in `Bounds`."""
    lowest, highest = problem.reachable_offsets
    return lowest - problem.query_start, highest - problem.query_start


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


def fold_offsets(problem: Problem, doffsets: Tensor, lo: int) -> Tensor:
    """The table's gradient, in its shape and dtype, from every offset's from `lo` on, (1 or B, 1 or H, offsets)."""
    return _fold(problem, doffsets, lo + problem.bias_origin, 0, doffsets.shape[-1])


def _fold(problem: Problem, dstrip: Tensor, first: int, begin: int, end: int) -> Tensor:
    assert problem.bias is not None
    dbias = torch.empty_like(problem.bias, memory_format=torch.contiguous_format)
    rows, columns = dstrip.flatten(0, 1), dbias.shape[-1]
    fold_kernel[(len(rows) * -(-columns // BLOCK),)](
        rows, dbias, rows.stride(0), columns, first, begin, end,
        IS_ZERO_BEYOND=problem.beyond == "zero", **_OPTIONS,
    )  # fmt: skip
    return dbias


def _with_heads(bias: Tensor) -> Tensor:
    """The table with all its axes: (1 or B, 1 or H, N)."""
    return bias.detach().reshape((1,) * (3 - bias.dim()) + bias.shape)


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
    start = problem.query_start
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
