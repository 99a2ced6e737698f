"""Keys and values on their way to the queries that reach them, and their gradients on their way home.

Keys go straight from their owner to each rank that needs them, cut to what its queries reach. Gradients go straight
back, in the dtype of the arithmetic, and are added at home in one order, so that repeated runs give equal bits.

    ring      at step t a rank attends to the keys of the rank t before it, while the keys of the next step travel
    gather    one exchange brings all keys that a rank's queries reach, neighbours side by side
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_offset_bias.distributed.plan import Plan
from triton_offset_bias.distributed.spans import Span, merged, size_of
from triton_offset_bias.distributed.world import Side
from triton_offset_bias.parts import arithmetic_dtype

sent_bytes = 0  # by this process so far, for measurements


class Run(NamedTuple):
    """Neighbouring keys that are here, and where the sums of their gradients are kept: nowhere in a forward pass."""

    span: Span
    tensors: tuple[Tensor, Tensor]  # key and value, (B, Hkv, span.size, D or Dv)
    gradients: tuple[Tensor, Tensor] | None

    def cut(self, span: Span) -> "Run":
        """The keys of a span within, in the same memory."""
        start = span.start - self.span.start

        def narrow(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].narrow(2, start, span.size), pair[1].narrow(2, start, span.size)

        return Run(span, narrow(self.tensors), None if self.gradients is None else narrow(self.gradients))


class Messages(NamedTuple):
    """Messages on their way; the tensors that are sent live as long."""

    requests: list[Any]
    sent: list[Tensor]
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        """What was received, when all have arrived."""
        for request in self.requests:
            request.wait()
        return self.received


class Keys:
    """The keys and values of this rank, on one walk through all keys that its queries reach.

    Attributes:
        gradients: sums of the gradients of this rank's own keys and values; None in a forward pass.
    """

    def __init__(self, plan: Plan, side: Side, key: Tensor, value: Tensor, *, with_gradients: bool) -> None:
        self.plan, self.side, self.own = plan, side, (key, value)
        self.dtype = arithmetic_dtype(key.dtype)
        self.gradients = self._zeros(*self.own) if with_gradients else None

    def runs(self, method: str) -> Iterator[list[Run]]:
        """Yields the runs of each stage. Those of the next one travel meanwhile, and so do gradients."""
        if self.side.size == 1:
            yield [self._own_run(span) for span in self.plan.needed(0, 0)]
        else:
            yield from self._ring() if method == "ring" else self._gather()

    def _ring(self) -> Iterator[list[Run]]:
        steps = self.plan.steps
        coming = [self._fetch(step) for step in steps[:1]]
        homeward: list[tuple[Messages, list[tuple[Tensor, Tensor]]]] = []
        for index, step in enumerate(steps):
            arrived = coming.pop().wait()
            coming = [self._fetch(next_step) for next_step in steps[index + 1 : index + 2]]
            runs = self._arrived(step, arrived)
            del arrived
            yield runs
            if self.gradients is not None and step:
                before, homeward = homeward, [self._send_home(step, runs)]
                self._add(before)
        self._add(homeward)

    def _fetch(self, step: int) -> Messages:
        """Begins to send keys to the rank `step` ahead, and to receive those of the rank `step` behind."""
        if step == 0:
            return Messages([], [], [])
        ahead, behind = self._peers(step)
        sent = [x for span in self.plan.needed(ahead, self.side.rank) for x in self._held(self.own, span)]
        spans = self.plan.needed(self.side.rank, behind)
        return self._exchange(ahead, sent, behind, [self._empty(x, span) for span in spans for x in self.own])

    def _arrived(self, step: int, arrived: list[Tensor]) -> list[Run]:
        spans = self.plan.needed(self.side.rank, self._peers(step)[1])
        if step == 0:
            return [self._own_run(span) for span in spans]
        pairs = zip(arrived[::2], arrived[1::2], strict=True)
        return [
            Run(span, pair, None if self.gradients is None else self._zeros(*pair))
            for span, pair in zip(spans, pairs, strict=True)
        ]

    def _send_home(self, step: int, runs: list[Run]) -> tuple[Messages, list[tuple[Tensor, Tensor]]]:
        """Begins to send the gradients of a step's keys to their owner, and to receive those of own keys."""
        ahead, behind = self._peers(step)
        assert self.gradients is not None
        targets = [self._held(self.gradients, span) for span in self.plan.needed(ahead, self.side.rank)]
        received = [torch.empty_like(x, memory_format=torch.contiguous_format) for pair in targets for x in pair]
        sent = [x for run in runs for x in run.gradients or ()]
        return self._exchange(behind, sent, ahead, received), targets

    def _add(self, homeward: list[tuple[Messages, list[tuple[Tensor, Tensor]]]]) -> None:
        for messages, targets in homeward:
            for target, gradient in zip((x for pair in targets for x in pair), messages.wait(), strict=True):
                target += gradient

    def _exchange(self, to: int, sent: list[Tensor], source: int, received: list[Tensor]) -> Messages:
        global sent_bytes
        sent = [x.contiguous() for x in sent]
        ops = [dist.P2POp(dist.isend, x, group=self.side.group, group_peer=to) for x in sent]
        ops += [dist.P2POp(dist.irecv, x, group=self.side.group, group_peer=source) for x in received]
        sent_bytes += sum(x.numel() * x.element_size() for x in sent)
        return Messages(dist.batch_isend_irecv(ops) if ops else [], sent, received)

    def _gather(self) -> Iterator[list[Run]]:
        plan, (rank, world) = self.plan, self.side[1:]
        theirs = [plan.needed(rank, owner) if owner != rank else [] for owner in range(world)]
        mine = [plan.needed(reader, rank) if reader != rank else [] for reader in range(world)]
        sent = [[x for span in spans for x in self._held(self.own, span)] for spans in mine]
        shapes = [[self._shape(x, span) for span in spans for x in self.own] for spans in theirs]
        runs = self._assembled(theirs, exchanged(sent, shapes, self.own[0], self.side))
        yield runs
        if self.gradients is None:
            return
        back = [[x for span in spans for x in _gradients_of(runs, span)] for spans in theirs]
        targets = [[x for span in spans for x in self._held(self.gradients, span)] for spans in mine]
        shapes = [[x.shape for x in tensors] for tensors in targets]
        received = exchanged(back, shapes, self.gradients[0], self.side)
        for span in plan.needed(rank, rank):
            for target, gradient in zip(self._held(self.gradients, span), _gradients_of(runs, span), strict=True):
                target += gradient
        for tensors, gradients in zip(targets, received, strict=True):
            for target, gradient in zip(tensors, gradients, strict=True):
                target += gradient

    def _assembled(self, theirs: list[list[Span]], found: list[list[Tensor]]) -> list[Run]:
        """All keys that are reached, in runs as long as possible."""
        own = self.plan.needed(self.side.rank, self.side.rank)
        pieces = {span: self._held(self.own, span) for span in own}
        for spans, tensors in zip(theirs, found, strict=True):
            pieces.update(zip(spans, zip(tensors[::2], tensors[1::2], strict=True), strict=True))
        runs = []
        for span in merged(list(pieces)):
            inside = sorted(piece for piece in pieces if span.start <= piece.start < span.stop)
            assert size_of(inside) == span.size
            key, value = (torch.cat([pieces[piece][i] for piece in inside], 2) for i in range(2))
            runs.append(Run(span, (key, value), None if self.gradients is None else self._zeros(key, value)))
        return runs

    def _peers(self, step: int) -> tuple[int, int]:
        """The ranks `step` ahead and `step` behind."""
        rank, size = self.side.rank, self.side.size
        return (rank + step) % size, (rank - step) % size

    def _own_run(self, span: Span) -> Run:
        """Some of this rank's own keys."""
        gradients = None if self.gradients is None else self._held(self.gradients, span)
        return Run(span, self._held(self.own, span), gradients)

    def _held(self, pair: tuple[Tensor, Tensor], part: Span) -> tuple[Tensor, Tensor]:
        """The views of this rank's keys and values, or of their gradients, that hold a part of one of its spans."""
        before = 0
        for span in self.plan.keys[self.side.rank]:
            if span.start <= part.start and part.stop <= span.stop:
                start = before + part.start - span.start
                return pair[0].narrow(2, start, part.size), pair[1].narrow(2, start, part.size)
            before += span.size
        raise AssertionError(part)

    def _empty(self, x: Tensor, span: Span) -> Tensor:
        return x.new_empty(self._shape(x, span))

    @staticmethod
    def _shape(x: Tensor, span: Span) -> torch.Size:
        return torch.Size((*x.shape[:2], span.size, x.shape[3]))

    def _zeros(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (x.new_zeros(x.shape, dtype=self.dtype) for x in (key, value))
        return key, value


def _gradients_of(runs: list[Run], span: Span) -> tuple[Tensor, Tensor]:
    """The gradients of a span that lies in one of the runs."""
    run = next(run for run in runs if run.span.start <= span.start and span.stop <= run.span.stop)
    gradients = run.cut(span).gradients
    assert gradients is not None
    return gradients


def exchanged(sent: list[list[Tensor]], shapes: list[list[torch.Size]], like: Tensor, side: Side) -> list[list[Tensor]]:
    """The tensors that every rank sends to this one, by one all-to-all.

    `sent` has the tensors for each rank, and `shapes` the shapes of the tensors from each rank, all with the dtype and
    device of `like`. The same memory holds all that is received.
    """
    global sent_bytes
    counts = [sum(x.numel() for x in tensors) for tensors in sent]
    expected = [sum(shape.numel() for shape in found) for found in shapes]
    packed = torch.cat([x.reshape(-1) for tensors in sent for x in tensors] or [like.new_empty(0)])
    received = like.new_empty(sum(expected))
    dist.all_to_all_single(received, packed, expected, counts, group=side.group)
    sent_bytes += (sum(counts) - counts[side.rank]) * like.element_size()
    return [
        [x.view(shape) for x, shape in zip(block.split([shape.numel() for shape in found]), found, strict=True)]
        for block, found in zip(received.split(expected), shapes, strict=True)
    ]
