"""Who holds which positions of a sequence, from lengths alone, so that all ranks agree."""

from typing import NamedTuple

LAYOUTS = ("contiguous", "zigzag")


class Span(NamedTuple):
    """Positions [start, stop) of the whole sequence."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of positions."""
        return max(self.stop - self.start, 0)

    def cut(self, other: "Span") -> "Span":
        """The positions that lie in the other span too."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))


def spans_of(length: int, world: int, layout: str = "contiguous") -> list[list[Span]]:
    """The spans of a sequence that each of `world` ranks holds, in the order in which they lie in its part.

    "contiguous" gives rank r the r-th of `world` spans. "zigzag" gives it the spans r and ``2 world - 1 - r`` of
    ``2 world``, so that causality leaves all ranks the same work. Any length will do: sizes differ by 1 at most.

    Args:
        length: positions of the whole sequence.
        world: number of ranks. Of a two-dimensional mesh it is the number of all its ranks.
        layout: "contiguous" or "zigzag".

    Returns:
        A list of spans for each rank. A span ``(start, stop)`` has the positions start to stop - 1.

    Raises:
        ValueError: `layout` is neither of the two.

    Source: "zigzag" is the order of Llama 3 (arXiv:2407.21783), section 3.3.2.
    """
    check_layout(layout)
    count = world if layout == "contiguous" else 2 * world
    spans = [Span(length * i // count, length * (i + 1) // count) for i in range(count)]
    if layout == "contiguous":
        return [[span] for span in spans]
    return [[spans[rank], spans[count - 1 - rank]] for rank in range(world)]


def check_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is one of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


def size_of(spans: list[Span]) -> int:
    """The number of positions in some spans."""
    return sum(span.size for span in spans)


def merged(spans: list[Span]) -> list[Span]:
    """The same positions in order, in as few spans as possible; no span is empty."""
    found: list[Span] = []
    for span in sorted(span for span in spans if span.size):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found
