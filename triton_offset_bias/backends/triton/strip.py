"""The host's side of the strip: the bias of every offset, laid out for the kernels, and where it stops changing."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triton_offset_bias import table
from triton_offset_bias.backends.triton.tiles import STRIP_PAD
from triton_offset_bias.problem import Problem

PAD: int = STRIP_PAD.value  # tiles overhang the score matrix by less than this


class Bounds(NamedTuple):
    """Ranges of offsets counted from the first query and key, in the order in which the kernels take them.

    Attributes:
        band_lo, band_hi: pairs outside are not attended to.
        near_lo, near_hi: at offsets <= near_lo the bias does not change any more, nor at offsets >= near_hi.
    """

    band_lo: int
    band_hi: int
    near_lo: int
    near_hi: int

    def parts(self, len_q: int, len_k: int) -> dict[str, bool]:
        """Which of the kernels' loops over whole tiles have work: far left | near | far right."""
        lowest, highest = 1 - len_k, len_q - 1
        is_flat = self.near_hi < lowest  # one bias for all pairs: all of them are far left
        return {
            "FAR_LEFT": self.near_hi <= highest,
            "NEAR": not is_flat,
            "FAR_RIGHT": not is_flat and self.near_lo >= lowest,
        }


def bounds_of(problem: Problem) -> Bounds:
    """The bounds of a problem with at least one query and one key."""
    len_q, len_k, start = problem.query.shape[2], problem.key.shape[2], problem.query_start
    lowest, highest = 1 - len_k, len_q - 1
    never_lo, never_hi = lowest - PAD, highest + PAD  # out of the reach of any tile
    band_lo = min(max(problem.min_offset - start, lowest), highest + 1)
    band_hi = max(min(problem.max_offset - start, highest), lowest - 1)
    if problem.bias is None:
        changes_lo, changes_hi = never_hi, never_lo  # nowhere
    else:
        outside = problem.beyond == "zero"  # there the end itself differs from what is beyond
        changes_lo = -problem.bias_origin - outside - start
        changes_hi = problem.bias.shape[-1] - 1 - problem.bias_origin + outside - start
    # An edge of the band that is within reach is a change too, and on its own side everything is near.
    is_cut_below, is_cut_above = band_lo > lowest, band_hi < highest
    near_lo = never_lo if is_cut_below else min(changes_lo, band_hi if is_cut_above else never_hi)
    near_hi = never_hi if is_cut_above else max(changes_hi, band_lo if is_cut_below else never_lo)
    if problem.bias is not None:  # the strip is read at the bounds
        near_lo, near_hi = min(near_lo, highest), max(near_hi, lowest)
    elif near_hi < lowest:  # one bias for all pairs: all are far left, none far right
        near_lo = never_lo
    return Bounds(band_lo, band_hi, max(near_lo, never_lo), min(near_hi, never_hi))


def build_strip(problem: Problem, unit: float) -> Tensor | None:
    """(1 or B, 1 or H, PAD + Lq + Lk - 1 + PAD) float32: the table at every offset times `unit`, -inf outside the band.

    Column PAD belongs to the last key's offset from the first query. Finite numbers stay finite: only -inf forbids.
    """
    bias = problem.bias
    if bias is None:
        return None
    lo, hi = table.reachable_offsets(problem.query.shape[2], problem.key.shape[2], problem.query_start)
    bias = bias.detach().float().reshape((1,) * (3 - bias.dim()) + bias.shape)
    values = table.per_offset(bias, lo, hi, problem.bias_origin, problem.beyond)
    largest = torch.finfo(torch.float32).max
    values = torch.where(values.isinf(), values, (values * unit).clamp(-largest, largest))
    strip = torch.nn.functional.pad(values, (PAD, PAD), value=-math.inf)
    below, above = max(problem.min_offset - lo, 0), max(hi - problem.max_offset, 0)
    if below:
        strip[..., : PAD + below] = -math.inf
    if above:
        strip[..., max(strip.shape[-1] - PAD - above, 0) :] = -math.inf
    return strip


def fold(problem: Problem, doffsets: Tensor) -> Tensor:
    """The gradient of every offset, (1 or B, 1 or H, Lq + Lk - 1), as the table's, in its shape and dtype."""
    bias = problem.bias
    assert bias is not None
    lo, _ = table.reachable_offsets(problem.query.shape[2], problem.key.shape[2], problem.query_start)
    folded = table.fold(doffsets, bias.shape[-1], lo, problem.bias_origin, problem.beyond)
    return folded.reshape(bias.shape).to(bias.dtype)
