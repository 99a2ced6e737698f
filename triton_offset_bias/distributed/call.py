"""A checked call on all ranks, and the calls of its parts."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from triton_offset_bias import dropout
from triton_offset_bias.distributed.plan import Plan
from triton_offset_bias.distributed.spans import Span
from triton_offset_bias.distributed.trade import heads_of, to_heads, to_sequence
from triton_offset_bias.distributed.travel import Run
from triton_offset_bias.distributed.world import World
from triton_offset_bias.problem import Problem
from triton_offset_bias.table import reachable_offsets


class Part(NamedTuple):
    """The attention of some neighbouring queries of this rank to some neighbouring keys.

    Attributes:
        row: the place of the first query among this rank's.
        keys: the keys, and where their gradients are kept.
        problem: the call. Offsets are those of the whole sequence.
        tables: the tables that it sees, where packed sequences have tables of their own.
        reach: the lowest and the highest offset between queries and keys; None: as contiguous positions have it.
    """

    row: int
    keys: Run
    problem: Problem
    tables: slice
    reach: tuple[int, int] | None

    @property
    def num_rows(self) -> int:
        """The number of queries."""
        return self.problem.query.shape[2]


@dataclass(frozen=True)
class Call:
    """A checked call on all ranks.

    Attributes:
        problem: the options, and the tensors that do not travel.
        plan, world, method, backend: who holds what, who takes part, and how.
        key_padding_mask, key_positions: those of all keys, in order.
        heads: numbers of query heads and of key heads of the whole.
        returns_lse: whether the log-sum-exp is a result, which travels too.
    """

    problem: Problem
    plan: Plan
    world: World
    method: str
    backend: str
    key_padding_mask: Tensor | None
    key_positions: Tensor | None
    heads: tuple[int, int]
    returns_lse: bool

    @property
    def has_gate(self) -> bool:
        """Whether the table has an axis of the rank of a gate."""
        return self.problem.bias_gate is not None

    @property
    def head_range(self) -> tuple[int, int]:
        """The first of the query heads that this rank attends with, and the one behind the last."""
        return heads_of(self.heads[0], self.world.heads.rank, self.world.heads.size)

    def to_heads(self, x: Tensor, side: int) -> Tensor:
        """Trades a tensor of queries (side 0) or keys (side 1) for some heads of all its positions."""
        return x if self.world.heads.size == 1 else to_heads(x, self._held(side), self.world.heads)

    def to_sequence(self, x: Tensor, side: int) -> Tensor:
        """Trades it back."""
        if self.world.heads.size == 1:
            return x
        return to_sequence(x, self._held(side), self.heads[side], self.world.heads)

    def _held(self, side: int) -> list[list[Span]]:
        first = self.world.ring.rank * self.world.heads.size
        return self.plan.parts[side][first : first + self.world.heads.size]

    def table(self, bias: Tensor) -> Tensor:
        """The table of this rank's heads."""
        first, stop = self.head_range
        axis = -3 if self.has_gate else -2
        return bias if bias.dim() < -axis or bias.shape[axis] == 1 else bias.narrow(axis, first, stop - first)

    def constants_of_rows(self, constants: Tensor) -> Tensor:
        """A table's constants, (1 or B, 1 or H, 1) or fewer axes, as they broadcast to this rank's rows (B, H, L)."""
        bounds = self.plan.layout.bounds
        if bounds is None or constants.dim() < 3:
            return constants
        documents = [Span(*pair) for pair in itertools.pairwise(bounds[0])]
        sizes = [document.cut(span).size for span in self._queries for document in documents]
        numbers = torch.arange(len(documents), device=constants.device).repeat(len(self._queries))
        rows = numbers.repeat_interleave(torch.tensor(sizes, device=constants.device))
        return constants[rows, :, 0].mT

    @property
    def _queries(self) -> list[Span]:
        return self.plan.queries[self.world.ring.rank]

    def parts(self, query: Tensor, gate: Tensor | None, table: Tensor | None, run: Run) -> list[Part]:
        """The calls of all queries with the keys of a run that they reach."""
        found, row = [], 0
        for span in self._queries:
            keys = run.span.cut(self.plan.reached(span))
            if keys.size:
                part = self._contiguous if self.plan.layout.bounds is None else self._packed
                found.append(part(query, gate, table, row, span, run.cut(keys)))
            row += span.size
        return found

    def _contiguous(
        self, query: Tensor, gate: Tensor | None, table: Tensor | None, row: int, span: Span, keys: Run
    ) -> Part:
        mask, key_positions = self.key_padding_mask, self.key_positions
        query_positions, (start, stop) = self.problem.query_positions, keys.span
        place = dropout.Place(span.start, start, self.head_range[0], self.heads[0])
        problem = self.problem._replace(
            query=query.narrow(2, row, span.size),
            key=keys.tensors[0],
            value=keys.tensors[1],
            bias=table,
            bias_gate=None if gate is None else gate.narrow(2, row, span.size),
            key_padding_mask=None if mask is None else mask[:, start:stop],
            query_positions=None if query_positions is None else query_positions[..., row : row + span.size],
            key_positions=None if key_positions is None else key_positions[..., start:stop],
            query_start=self.plan.layout.start + span.start - start,
            max_seqlen_q=span.size,
            max_seqlen_k=keys.span.size,
            dropout_place=None if self.problem.seed is None else place,
        )
        return Part(row, keys, problem, slice(None), None)

    def _packed(
        self, query: Tensor, gate: Tensor | None, table: Tensor | None, row: int, span: Span, keys: Run
    ) -> Part:
        """The part of all documents that have some of the queries and some of the keys, and of those between them."""
        assert self.plan.layout.bounds is not None
        bounds_q, bounds_k = self.plan.layout.bounds
        inside = [d for d in self.plan.documents_of(span) if d.keys.cut(keys.span).size]
        first, stop = inside[0].number, inside[-1].number + 1
        cut_q, cut_k = (
            [min(max(bound, side.start), side.stop) for bound in bounds[first : stop + 1]]
            for bounds, side in ((bounds_q, span), (bounds_k, keys.span))
        )
        starts, reaches = [], []
        for i in range(stop - first):
            size_q, size_k = (bounds[first + i + 1] - bounds[first + i] for bounds in (bounds_q, bounds_k))
            start = size_k - size_q + (cut_q[i] - bounds_q[first + i]) - (cut_k[i] - bounds_k[first + i])
            len_q, len_k = cut_q[i + 1] - cut_q[i], cut_k[i + 1] - cut_k[i]
            starts.append(start)
            if len_q and len_k:
                reaches.append(reachable_offsets(len_q, len_k, start))
        lowest, highest = zip(*reaches, strict=True)
        keys = keys.cut(Span(cut_k[0], cut_k[-1]))
        row += cut_q[0] - span.start
        is_of_each = table is not None and table.dim() == 3 + self.has_gate
        tables = slice(first, stop) if is_of_each else slice(None)
        device, is_whole = query.device, self.world.ring.size == 1
        problem = self.problem._replace(
            query=query.narrow(2, row, cut_q[-1] - cut_q[0]),
            key=keys.tensors[0],
            value=keys.tensors[1],
            bias=None if table is None else table[tables],
            bias_gate=None if gate is None else gate.narrow(2, row, cut_q[-1] - cut_q[0]),
            cu_seqlens_q=torch.tensor([bound - cut_q[0] for bound in cut_q], dtype=torch.int32, device=device),
            cu_seqlens_k=torch.tensor([bound - cut_k[0] for bound in cut_k], dtype=torch.int32, device=device),
            query_starts=None if is_whole else torch.tensor(starts, dtype=torch.int64, device=device),
            max_seqlen_q=max(cut_q[i + 1] - cut_q[i] for i in range(stop - first)),
            max_seqlen_k=max(cut_k[i + 1] - cut_k[i] for i in range(stop - first)),
            dropout_place=None if self.problem.seed is None else (0, 0, self.head_range[0], self.heads[0]),
        )
        return Part(row, keys, problem, tables, (min(lowest), max(highest)))
