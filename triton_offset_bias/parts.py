"""Attention that meets the keys part by part, on any backend.

Rows keep un-normalised sums in the dtype of the arithmetic, so nothing is rounded between parts. Gradients of parts
need the whole rows' output and statistics only. FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithms 1 and 2, with
the loop over keys outside of the kernel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triton_offset_bias import table
from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.problem import Problem


class Rows(NamedTuple):
    """The softmax of rows over the keys met so far; see `forward_part` in `backends.contract`."""

    acc: Tensor  # (B, Hq, Lq, Dv)
    row_max: Tensor  # (B, Hq, Lq), bits
    row_sum: Tensor

    def narrow(self, start: int, length: int) -> "Rows":
        """The rows of some queries, in the same memory."""
        return Rows(*(x.narrow(2, start, length) for x in self))

    def finish(self, constants: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, in the memory of `acc`, and the log-sum-exp in nats. `constants` are those of `counted_table`."""
        is_empty = self.row_sum == 0
        total = self.row_sum.masked_fill(is_empty, 1.0)
        out = self.acc.div_(total.unsqueeze(-1)).masked_fill_(is_empty.unsqueeze(-1), 0.0)
        lse = math.log(2) * (self.row_max + total.log2())
        lse = lse if constants is None else lse + constants
        return out, lse.masked_fill(is_empty, float("-inf"))


class Gradients(NamedTuple):
    """Sums of gradients, in the dtype of the arithmetic."""

    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    dbias: Tensor | None
    dgate: Tensor | None = None


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are computed and added up."""
    return torch.promote_types(dtype, torch.float32)


def new_rows(query: Tensor, dim_v: int) -> Rows:
    """Rows of `query`, (B, Hq, Lq, D), that have met no key. They lie in memory as the queries do."""
    batch, heads, length, _ = query.shape
    dtype = arithmetic_dtype(query.dtype)
    if query.stride(1) < query.stride(2):
        acc = query.new_empty((batch, length, heads, dim_v), dtype=dtype).transpose(1, 2)
    else:
        acc = query.new_empty((batch, heads, length, dim_v), dtype=dtype)
    row_max = query.new_empty((batch, heads, length), dtype=dtype)
    return Rows(acc, row_max, torch.zeros_like(row_max))


def counted_table(bias: Tensor, query: Tensor, beyond: str, has_gate: bool) -> tuple[Tensor, Tensor | None]:
    """The table in the dtype of the arithmetic, less constants, and these, (1 or B, 1 or H, 1); None if all are 0.

    16-bit inputs have no digits to keep, zeros beyond the table are not close to its numbers, and a gate multiplies
    them.
    """
    dtype = arithmetic_dtype(query.dtype)
    bias = bias.detach().to(dtype)
    if query.dtype != dtype or beyond == "zero" or has_gate:
        return bias, None
    constants = table.exact_constants(bias)
    return bias - constants, constants


def attend(problem: Problem, rows: Rows, backend: str, reach: tuple[int, int] | None = None) -> None:
    """Adds the keys of `problem` to `rows`. The table is one of `counted_table`.

    `reach` has the lowest and the highest offset between queries and keys. None: those of contiguous positions.
    """
    part, _ = _with_piece(problem, reach)
    BACKENDS[backend].forward_part(part, *rows)


def differentiate(
    problem: Problem,
    rows: Rows,
    dout: Tensor,
    dlse: Tensor | None,
    totals: Gradients,
    backend: str,
    reach: tuple[int, int] | None = None,
) -> None:
    """Adds the gradients of the keys of `problem` to `totals`, whose `dbias` is that of the whole table.

    `rows` has the whole rows' output, in the query's dtype, in the place of `acc`.
    """
    part, (first, stop) = _with_piece(problem, reach)
    dbias = None if totals.dbias is None else totals.dbias[..., first:stop]
    BACKENDS[backend].backward_part(part, *rows, dout, dlse, *totals[:3], dbias, totals.dgate)


def _with_piece(problem: Problem, reach: tuple[int, int] | None) -> tuple[Problem, tuple[int, int]]:
    """The problem with the piece of the table that it reaches, and the piece's first column and the one behind it."""
    bias = problem.bias
    if bias is None or problem.query_positions is not None:
        return problem, (0, 0 if bias is None else bias.shape[-1])
    if reach is not None:  # backends take the reach from the longest lengths, which may be longer
        longest = max(problem.max_seqlen_q, 1 - reach[0]), max(problem.max_seqlen_k, reach[1] + 1)
        problem = problem._replace(max_seqlen_q=longest[0], max_seqlen_k=longest[1])
    lowest, highest = problem.reachable_offsets if reach is None else reach
    lowest, highest = max(lowest, problem.min_offset), min(highest, problem.max_offset)
    first, stop = table.columns_seen(bias.shape[-1], problem.bias_origin, lowest, highest)
    return problem._replace(bias=bias[..., first:stop], bias_origin=problem.bias_origin - first), (first, stop)
