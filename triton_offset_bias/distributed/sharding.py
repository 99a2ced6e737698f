"""Parts of whole tensors, and whole tensors of parts."""

import torch
from torch import Tensor

from triton_offset_bias.checks.arguments import checked_length
from triton_offset_bias.distributed.spans import Span, size_of, spans_of
from triton_offset_bias.distributed.world import Group, gathered, world_of


def shard(x: Tensor, dim: int, group: Group = None, layout: str = "contiguous") -> Tensor:
    """This rank's part of a tensor that every rank has whole. Differentiable: the gradient of other parts is 0.

    Args:
        x: any tensor, equal on all ranks.
        dim: the axis of the sequence.
        group: process group, or mesh; default all ranks.
        layout: "contiguous" or "zigzag", see `spans_of`.

    Returns:
        A new tensor. Its size along `dim` is ``x.shape[dim] / ranks``, rounded up or down.
    """
    spans = _my_spans(x.shape[dim], group, layout)
    return torch.cat([x.narrow(dim, span.start, span.size) for span in spans], dim)


def unshard(x: Tensor, dim: int, length: int, group: Group = None, layout: str = "contiguous") -> Tensor:
    """The whole tensor of the parts that all ranks hold: the inverse of `shard`. Without a gradient.

    Args:
        x: this rank's part.
        dim: the axis of the sequence.
        length: the whole's size along it.
        group: process group, or mesh; default all ranks.
        layout: "contiguous" or "zigzag", as in `shard`.

    Raises:
        ValueError: `x` has another size along `dim` than this rank's part.
    """
    world = world_of(group)
    held = spans_of(checked_length("length", length), world.size, layout)
    expected = size_of(held[world.rank])
    if x.shape[dim] != expected:
        raise ValueError(
            f"`x` must have size {expected} along `dim` on rank {world.rank}, which has that many of {length} "
            f"positions, got shape {tuple(x.shape)}"
        )
    moved = x.detach().movedim(dim, -1).contiguous()
    return in_order(gathered(moved, [size_of(spans) for spans in held], world), held).movedim(-1, dim).contiguous()


def in_order(parts: list[Tensor], held: list[list[Span]], dim: int = -1) -> Tensor:
    """The whole of all ranks' parts, the positions in order along `dim`."""
    pieces: dict[Span, Tensor] = {}
    for spans, part in zip(held, parts, strict=True):
        pieces.update(zip(spans, part.split([span.size for span in spans], dim), strict=True))
    return torch.cat([pieces[span] for span in sorted(pieces)], dim)


def positions(
    length: int, group: Group = None, layout: str = "contiguous", device: torch.device | str | None = None
) -> Tensor:
    """The positions in the whole sequence of what this rank holds, (length / ranks,) int64, for rotary and the like.

    Args:
        length: positions of the whole sequence.
        group: process group, or mesh; default all ranks.
        layout: "contiguous" or "zigzag", see `spans_of`.
        device: device of the result; default torch's.
    """
    spans = _my_spans(checked_length("length", length), group, layout)
    return torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])


def _my_spans(length: int, group: Group, layout: str) -> list[Span]:
    world = world_of(group)
    return spans_of(length, world.size, layout)[world.rank]
