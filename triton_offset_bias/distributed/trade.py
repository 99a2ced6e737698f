"""Parts of the sequence for parts of the heads, and back, among the ranks of a heads group (Ulysses).

Source: DeepSpeed-Ulysses, Jacobs et al. 2023 (arXiv:2309.14509).
"""

import torch
from torch import Tensor

from triton_offset_bias.distributed.sharding import in_order
from triton_offset_bias.distributed.spans import Span, size_of
from triton_offset_bias.distributed.travel import exchanged
from triton_offset_bias.distributed.world import Side


def heads_of(heads: int, rank: int, size: int) -> tuple[int, int]:
    """The first of the heads that a rank gets, and the one behind the last. Ranks share heads if there are fewer."""
    return rank * heads // size, max((rank + 1) * heads // size, rank * heads // size + 1)


def to_heads(x: Tensor, held: list[list[Span]], side: Side) -> Tensor:
    """(B, H, l, D) of this rank's spans to (B, H / ranks, L, D) of all, in order. `held` has every rank's spans."""
    heads = [heads_of(x.shape[1], rank, side.size) for rank in range(side.size)]
    sent = [[x[:, first:stop]] for first, stop in heads]
    first, stop = heads[side.rank]
    shapes = [[torch.Size((x.shape[0], stop - first, size_of(spans), x.shape[3]))] for spans in held]
    found = [tensors[0] for tensors in exchanged(sent, shapes, x, side)]
    return in_order(found, held, 2)


def to_sequence(x: Tensor, held: list[list[Span]], heads: int, side: Side) -> Tensor:
    """(B, H / ranks, L, D) to (B, H, l, D): the inverse of `to_heads`. The parts of ranks that share a head add up."""
    order = sorted(span for spans in held for span in spans)
    pieces = dict(zip(order, x.split([span.size for span in order], 2), strict=True))
    sent = [[pieces[span] for span in spans] for spans in held]
    ranges = [heads_of(heads, rank, side.size) for rank in range(side.size)]
    batch, dim = x.shape[0], x.shape[3]
    shapes = [[torch.Size((batch, stop - first, span.size, dim)) for span in held[side.rank]] for first, stop in ranges]
    found = exchanged(sent, shapes, x, side)
    total = x.new_empty(batch, heads, size_of(held[side.rank]), dim)
    if heads % side.size:
        total.zero_()
    for (first, stop), tensors in zip(ranges, found, strict=True):
        target = total[:, first:stop].split([span.size for span in held[side.rank]], 2)
        for part, tensor in zip(target, tensors, strict=True):
            part.copy_(tensor) if heads % side.size == 0 else part.add_(tensor)
    return total
