"""Checks of a call on all ranks: this rank's own first, then that all ranks agree, then what needs everyone's data."""

import itertools

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import checked_length, shape
from triton_offset_bias.dispatch import select_backend
from triton_offset_bias.distributed.plan import Plan
from triton_offset_bias.distributed.spans import size_of
from triton_offset_bias.distributed.world import METHODS, World
from triton_offset_bias.problem import Problem


def check_method(method: str) -> None:
    """Raises ValueError unless `method` is one of `METHODS`."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}")


def check_plain(**tensors: object) -> None:
    """Raises TypeError for DTensors, whose gradients would be those of another loss, R times too large or too small."""
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            advice = "`to_local()` gives this rank's part"
            if name == "bias":
                advice = "`to_local(grad_placements=[Partial()])` of a replicated one gives the table and takes shares"
            raise TypeError(
                f"`{name}` must be a plain tensor, got a DTensor with placements {tensor.placements}: {advice}"
            )


def checked_lengths(lengths: tuple[int, int] | None, query: Tensor, key: Tensor, world: World) -> tuple[int, int]:
    """The whole's numbers of queries and keys; by default all ranks hold equally many."""
    if lengths is None:
        return query.shape[2] * world.size, key.shape[2] * world.size
    if not isinstance(lengths, tuple | list) or len(lengths) != 2:
        raise TypeError(f"`lengths` must be a pair (queries, keys) of ints, got {lengths!r}")
    len_q, len_k = (checked_length("lengths", length) for length in lengths)
    return len_q, len_k


def check_parts(query: Tensor, key: Tensor, plan: Plan, world: World) -> None:
    """Raises ValueError unless this rank has as many queries and keys as its part of the whole, and heads to trade."""
    for name, tensor, parts, whole in zip(("query", "key"), (query, key), plan.parts, plan.layout.lengths, strict=True):
        expected = size_of(parts[world.rank])
        if tensor.shape[2] != expected:
            raise ValueError(
                f"`{name}` must have length {expected} on rank {world.rank} of {world.size}, its part of {whole} in "
                f"layout {plan.layout.name!r}, got shape {shape(tensor)}"
            )
    heads, ranks = (query.shape[1], key.shape[1]), world.heads.size
    if heads[0] % ranks or (heads[1] % ranks and ranks % heads[1]):
        raise ValueError(
            f"`query` and `key` must have numbers of heads that divide among the {ranks} ranks that trade heads (of "
            f"`key` the number may also divide {ranks}), got {heads[0]} and {heads[1]}"
        )


def checked_backend(problem: Problem, plan: Plan, world: World, backend: str) -> str:
    """The name of the backend that serves the parts of a call.

    Raises:
        NotImplementedError: no backend serves them, or nobody could drop the weights that one process drops.
    """
    if problem.seed is not None:
        if problem.cu_seqlens_q is not None and world.ring.size > 1:
            raise NotImplementedError(
                "`dropout_p` must be 0 for packed sequences that are spread by 'gather' or 'ring': cut sequences would "
                "drop other weights than whole ones; method='all_to_all' serves it"
            )
        problem = problem._replace(dropout_place=(0, 0, 0, problem.query.shape[1]))
    if problem.cu_seqlens_q is not None and world.ring.size > 1:
        problem = problem._replace(query_starts=problem.cu_seqlens_q[:-1])
    return select_backend(problem, backend)


def check_reach(
    problem: Problem, plan: Plan, mask: Tensor | None, positions: tuple[Tensor, Tensor] | None, num_columns: int
) -> None:
    """Raises on all ranks alike if an attended offset of the whole is outside the table: `beyond="error"`."""
    limits, (len_q, len_k) = (problem.min_offset, problem.max_offset), plan.layout.lengths
    extremes: tuple[int, int] | None
    if positions is not None:
        extremes = table.attended_extremes_of_positions(*positions, mask, *limits)
    elif mask is not None:
        extremes = table.attended_extremes(mask, len_q, plan.layout.start, *limits)
    else:
        sides = [(d.queries.size, d.keys.size, d.start) for d in plan.documents]
        sides = sides if plan.layout.bounds is not None else [(len_q, len_k, plan.layout.start)]
        reaches = [table.reachable_offsets(*side) for side in sides if side[0] and side[1]]
        lowest = max(min((low for low, _ in reaches), default=1), limits[0])
        highest = min(max((high for _, high in reaches), default=-1), limits[1])
        extremes = (lowest, highest) if reaches and lowest <= highest else None
    if extremes is not None:
        table.check_reach(num_columns, problem.bias_origin, *extremes)


def described(tensor: Tensor | None) -> str:
    """What must be equal on all ranks of a tensor: its shape without its length, dtype, need of a gradient."""
    if tensor is None:
        return "None"
    needs = " that needs a gradient" if tensor.requires_grad and torch.is_grad_enabled() else ""
    sizes = (*tensor.shape[:2], tensor.shape[3]) if tensor.dim() == 4 else tensor.shape[:-1]
    return f"{tuple(sizes)} {tensor.dtype} on {tensor.device.type}{needs}"


def checked_bounds(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The bounds of packed sequences as numbers, read from the device."""
    found = []
    for name, tensor, most in zip(("q", "k"), (cu_seqlens_q, cu_seqlens_k), longest, strict=True):
        bounds = tuple(tensor.tolist())
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        if bounds[0] != 0 or any(size < 0 for size in sizes):
            raise ValueError(f"`cu_seqlens_{name}` must begin with 0 and never decrease, got {list(bounds)}")
        if most < max(sizes, default=0):
            raise ValueError(f"`max_seqlen_{name}` must be at least the longest sequence's {max(sizes)}, got {most}")
        found.append(bounds)
    return found[0], found[1]
