"""Checks inside the operators: numbers in tensors, which tracing does not see, and tensors that a graph may get wrong.

On a GPU, reading a number waits for the device. Only `beyond="error"`, which a user chooses, reads numbers there. The
lengths `key_lengths` and the bounds `cu_seqlens_q` and `cu_seqlens_k` are not read on a GPU, as in flash-attn.
"""

import itertools

import torch
from torch import Tensor

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import shape
from triton_offset_bias.checks.tensors import check_padded, check_per_sequence
from triton_offset_bias.problem import Problem


def check_data(problem: Problem) -> None:
    """Raises for wrong lengths or bounds, and for offsets that `beyond="error"` forbids."""
    if problem.query.device.type == "cpu":
        if problem.cu_seqlens_q is not None:
            sequences(problem)
        elif problem.key_lengths is not None and not torch.compiler.is_compiling():  # tracing sees no values
            checked_key_lengths(problem)
        if problem.bias_gate is not None:
            _check_gated_table(problem)
    if problem.beyond != "error" or problem.bias is None or not problem.query.numel() or not problem.key.numel():
        return
    extremes = _attended_extremes(problem)
    if extremes is not None:
        table.check_reach(problem.bias.shape[-1], problem.bias_origin, *extremes)


def _check_gated_table(problem: Problem) -> None:
    """Raises for -inf in a table with a gate. Tracing and `vmap` see no values; there the product is NaN."""
    assert problem.bias is not None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or problem.bias.numel() == 0:
        return
    if problem.bias.detach().amin() == float("-inf"):
        raise ValueError("`bias` must be finite where `bias_gate` is given, since 0 * -inf is NaN, got -inf")


def check_fit(problem: Problem) -> None:
    """Raises for tensors that the public functions would refuse: a graph may call the operator with any tensors."""
    check_padded(
        problem.query,
        problem.key,
        problem.value,
        problem.bias,
        problem.bias_gate,
        problem.key_padding_mask,
        problem.query_positions,
        problem.key_positions,
        problem.key_lengths,
        enable_gqa=True,
        num_sequences=problem.num_sequences,
    )
    _check_places(problem)
    lengths = problem.query.shape[2], problem.key.shape[2]
    if problem.cu_seqlens_q is None and lengths != (problem.max_seqlen_q, problem.max_seqlen_k):
        raise ValueError(
            f"`query` and `key` must have the lengths that this graph was traced for, {problem.max_seqlen_q} and "
            f"{problem.max_seqlen_k}, got {lengths[0]} and {lengths[1]}: torch.jit.trace and make_fx make lengths "
            "constant; torch.export and torch.compile can keep them symbolic"
        )


def _check_places(problem: Problem) -> None:
    starts, place = problem.query_starts, problem.dropout_place
    if starts is not None and problem.cu_seqlens_q is None:
        raise ValueError(f"`query_starts` must be None unless sequences are packed, got shape {shape(starts)}")
    if starts is not None:
        check_per_sequence("query_starts", starts, problem.query, problem.num_sequences)
    if place is not None and (len(place) != 4 or any(x < 0 for x in place)):
        raise ValueError(f"`dropout_place` must be four integers of at least 0, got {tuple(place)}")


def check_rows(
    problem: Problem, dout: Tensor | None, dlse: Tensor | None, out: Tensor, row_max: Tensor, row_sum: Tensor
) -> None:
    """Raises unless the tensors that `attention_backward` gets beside the problem fit it. All have a row per query."""
    query = problem.query
    rows, real = query.shape[:3], torch.promote_types(query.dtype, torch.float32)
    for name, tensor in (("out", out), ("dout", dout)):
        if tensor is not None:
            _check_one(name, tensor, (*rows, problem.value.shape[3]), query.dtype, query)
    for name, tensor in (("row_max", row_max), ("row_sum", row_sum), ("dlse", dlse)):
        if tensor is not None:
            _check_one(name, tensor, rows, real, query)


def _check_one(name: str, tensor: Tensor, expected: tuple[int, ...], dtype: torch.dtype, query: Tensor) -> None:
    if tensor.shape != expected:
        raise ValueError(f"`{name}` must have shape {tuple(expected)}, got shape {shape(tensor)}")
    if tensor.dtype != dtype:
        raise TypeError(f"`{name}` must be {dtype} where `query` is {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"`{name}` must be on `query`'s device {query.device}, got {tensor.device}")


def sequences(problem: Problem) -> list[tuple[int, int, int, int]]:
    """The first query, first key, number of queries and of keys of every packed sequence."""
    assert problem.cu_seqlens_q is not None
    assert problem.cu_seqlens_k is not None
    bounds_q = _bounds("q", problem.cu_seqlens_q, "query", problem.query, problem.max_seqlen_q)
    bounds_k = _bounds("k", problem.cu_seqlens_k, "key", problem.key, problem.max_seqlen_k)
    ranges = zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True)
    return [(q, k, q_end - q, k_end - k) for (q, q_end), (k, k_end) in ranges]


def query_starts(problem: Problem) -> list[int]:
    """The position of every packed sequence's first query, counted from its first key."""
    if problem.query_starts is not None:
        starts: list[int] = problem.query_starts.tolist()
        return starts
    return [len_k - len_q for _, _, len_q, len_k in sequences(problem)]


def checked_key_lengths(problem: Problem) -> list[int]:
    """The number of keys of every sequence of a problem with `key_lengths`."""
    assert problem.key_lengths is not None
    lengths: list[int] = problem.key_lengths.tolist()
    for sequence, length in enumerate(lengths):
        if not 0 <= length <= problem.key.shape[2]:
            raise ValueError(
                f"`key_lengths` must be between 0 and `key`'s length {problem.key.shape[2]}, "
                f"got {length} for sequence {sequence}"
            )
    return lengths


def _bounds(letter: str, cu_seqlens: Tensor, packed_name: str, packed: Tensor, max_seqlen: int) -> list[int]:
    name, total = f"cu_seqlens_{letter}", packed.shape[2]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"`{name}` must run from 0 to `{packed_name}`'s total length {total}, got {bounds[0]} to {bounds[-1]}"
        )
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if any(length < 0 for length in lengths):
        raise ValueError(f"`{name}` must never decrease, got {bounds}")
    longest = max(lengths, default=0)
    if max_seqlen < longest:
        raise ValueError(f"`max_seqlen_{letter}` must be at least the longest sequence's {longest}, got {max_seqlen}")
    return bounds


def _attended_extremes(problem: Problem) -> tuple[int, int] | None:
    """The smallest and the largest attended offset; None if there is none, or if `call` has checked the lengths."""
    limits = problem.min_offset, problem.max_offset
    if problem.cu_seqlens_q is not None:
        placed = zip(sequences(problem), query_starts(problem), strict=True)
        reaches = [
            table.reachable_offsets(len_q, len_k, start) for (_, _, len_q, len_k), start in placed if len_q and len_k
        ]
        lowest = max(min((low for low, _ in reaches), default=1), limits[0])
        highest = min(max((high for _, high in reaches), default=-1), limits[1])
        return (lowest, highest) if lowest <= highest else None
    if problem.query_positions is not None and problem.key_positions is not None:
        placed_pairs = problem.query_positions.long(), problem.key_positions.long(), problem.key_padding_mask
        if problem.is_causal_by_index:
            return table.attended_extremes_by_index(*placed_pairs, problem.query_start, *limits)
        return table.attended_extremes_of_positions(*placed_pairs, *limits)
    if problem.key_padding_mask is None or problem.key_lengths is not None:
        return None
    return table.attended_extremes(problem.key_padding_mask, problem.query.shape[2], problem.query_start, *limits)
