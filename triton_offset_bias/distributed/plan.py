"""Who needs which keys: from lengths, layout and band alone, so that all ranks agree without a message."""

import functools
import itertools
from typing import NamedTuple

from triton_offset_bias.distributed.spans import Span, merged, spans_of


class Document(NamedTuple):
    """One of the packed sequences: its place among them, its queries and its keys."""

    number: int
    queries: Span
    keys: Span

    @property
    def start(self) -> int:
        """The position of its first query counted from its first key: its last query lies on its last key."""
        return self.keys.size - self.queries.size

    @property
    def shift(self) -> int:
        """The offset of a query and a key, less the difference of their places among all."""
        return self.start + self.keys.start - self.queries.start


class Layout(NamedTuple):
    """Everything that a plan is made of.

    Attributes:
        lengths: the whole's queries and keys.
        ring, heads: the sizes of the two sides of the world.
        name: "contiguous" or "zigzag".
        start: position of the whole's first query counted from its first key.
        min_offset, max_offset: the band.
        bounds: ends of packed sequences' queries and keys, from 0 on; None if there is one sequence.
        has_positions: whether tensors give positions, so that any query may reach any key.
    """

    lengths: tuple[int, int]
    ring: int
    heads: int
    name: str
    start: int
    min_offset: int
    max_offset: int
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None
    has_positions: bool


class Plan:
    """The holdings of ring groups' ranks, and what their queries reach.

    The ranks of a heads group hold the spans of one rank of the ring, which are merged here.

    Attributes:
        parts: spans of queries and of keys that each rank of the world holds.
        queries, keys: spans that each rank of the ring holds, in order.
        documents: the packed sequences, none of them without queries or without keys.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        world = layout.ring * layout.heads
        self.parts = tuple(spans_of(length, world, layout.name) for length in layout.lengths)
        self.queries, self.keys = (
            [merged([*itertools.chain(*side[i : i + layout.heads])]) for i in range(0, world, layout.heads)]
            for side in self.parts
        )
        self.documents: list[Document] = []
        if layout.bounds is not None:
            spans = ([Span(*pair) for pair in itertools.pairwise(side)] for side in layout.bounds)
            found = (Document(i, q, k) for i, (q, k) in enumerate(zip(*spans, strict=True)))
            self.documents = [document for document in found if document.queries.size and document.keys.size]
        self._needed: dict[tuple[int, int], list[Span]] = {}

    def documents_of(self, queries: Span) -> list[Document]:
        """The documents that have some of these queries."""
        return [document for document in self.documents if document.queries.cut(queries).size]

    def reached(self, queries: Span) -> Span:
        """The keys from the first to the last that a span of queries may attend to; some of them may not exist."""
        layout = self.layout
        if layout.has_positions:
            return Span(0, layout.lengths[1])
        if layout.bounds is None:
            return _reached(queries, layout.start, layout)
        found = [
            _reached(document.queries.cut(queries), document.shift, layout).cut(document.keys)
            for document in self.documents_of(queries)
        ]
        found = [span for span in found if span.size]
        return Span(min(span.start for span in found), max(span.stop for span in found)) if found else Span(0, 0)

    def needed(self, reader: int, owner: int) -> list[Span]:
        """The parts of the owner's spans that the reader's queries reach, in order."""
        if (reader, owner) not in self._needed:
            reaches = [self.reached(span) for span in self.queries[reader]]
            parts = []
            for held in self.keys[owner]:
                cuts = [cut for cut in (held.cut(reach) for reach in reaches) if cut.size]
                if cuts:
                    parts.append(Span(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)))
            self._needed[reader, owner] = parts
        return self._needed[reader, owner]

    @functools.cached_property
    def steps(self) -> list[int]:
        """The distances between ranks at which any rank needs something. All ranks walk through the same list."""
        ring = self.layout.ring
        return [t for t in range(ring) if any(self.needed((rank + t) % ring, rank) for rank in range(ring))]


def _reached(queries: Span, start: int, layout: Layout) -> Span:
    first = start + queries.start - layout.max_offset
    return Span(first, start + queries.stop - layout.min_offset if queries.size else first)


@functools.lru_cache(maxsize=64)
def plan_of(layout: Layout) -> Plan:
    """The plan of a layout, remembered from an earlier call."""
    return Plan(layout)
