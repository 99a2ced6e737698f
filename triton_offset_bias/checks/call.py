"""Checks of a call. They turn the public arguments into a `Problem`, or raise an error that names the mistake."""

from typing import TypedDict

import torch
from torch import Tensor

from triton_offset_bias import dropout, table
from triton_offset_bias.autocast import has_autocast
from triton_offset_bias.checks.arguments import (
    check_flag,
    checked_beyond,
    checked_causal_by,
    checked_deterministic,
    checked_dropout,
    checked_int,
    checked_scale,
    checked_window,
)
from triton_offset_bias.checks.tensors import (
    check_bias,
    check_bounds,
    check_padded,
    check_sizes,
    check_tensors,
    checked_rank,
)
from triton_offset_bias.problem import Problem


class Options(TypedDict, total=False):
    """The keywords that both public functions have and that are checked here. `functional` adds its own.

    Callers of the public functions may leave some out. The functions here get all of them.
    """

    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    bias_origin: int | None
    beyond: str
    window_size: tuple[int, int]
    deterministic: bool | None


def checked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    query_start: int | None,
    key_padding_mask: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_lengths: Tensor | None,
    bias_gate: Tensor | None = None,
    causal_by: str = "position",
    options: Options,
) -> Problem:
    """Checks every argument of `offset_bias_attention` and fills in the defaults.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    masks = (key_padding_mask, query_positions, key_positions, key_lengths)
    check_padded(query, key, value, bias, bias_gate, *masks, enable_gqa=options["enable_gqa"])
    len_q, len_k = query.shape[2], key.shape[2]
    for name, others in (("positions", query_positions), ("`key_lengths`", key_lengths)):
        if others is not None and query_start is not None:
            raise ValueError(
                f"`query_start` must be None when {name} are given, since these already place the queries, "
                f"got {query_start!r}"
            )
    problem = _checked_problem(
        query=query,
        key=key,
        value=value,
        bias=bias,
        bias_gate=bias_gate,
        key_padding_mask=key_padding_mask,
        query_positions=query_positions,
        key_positions=key_positions,
        key_lengths=key_lengths,
        causal_by=causal_by,
        query_start=len_k - len_q if query_start is None else checked_int("query_start", query_start),
        max_seqlen_q=len_q,
        max_seqlen_k=len_k,
        options=options,
    )
    _check_reach_of_lengths(problem)
    return problem


def checked_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias_gate: Tensor | None = None,
    options: Options,
) -> Problem:
    """Checks every argument of `offset_bias_attention_varlen` except the longest lengths and the numbers in the bounds.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    check_tensors(query, key, value, "(total, heads, head_dim)", 3)
    check_sizes(query, key, value, options["enable_gqa"], heads=1, length=0)
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_bounds(name, bounds, query)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"`cu_seqlens_k` must describe as many sequences as `cu_seqlens_q` ({cu_seqlens_q.shape[0] - 1}), "
            f"got {cu_seqlens_k.shape[0] - 1}"
        )
    rank = None
    if bias_gate is not None:
        rank = checked_rank(bias_gate, bias, query, query.shape[:2])
        bias_gate = bias_gate.transpose(0, 1).unsqueeze(0)
    if bias is not None:
        check_bias(bias, query, cu_seqlens_q.shape[0] - 1, query.shape[1], rank)
    return _checked_problem(
        query=query.transpose(0, 1).unsqueeze(0),
        key=key.transpose(0, 1).unsqueeze(0),
        value=value.transpose(0, 1).unsqueeze(0),
        bias=bias,
        bias_gate=bias_gate,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_start=0,
        max_seqlen_q=torch.sym_min(max_seqlen_q, query.shape[0]),
        max_seqlen_k=torch.sym_min(max_seqlen_k, key.shape[0]),
        options=options,
    )


def _checked_problem(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias_gate: Tensor | None,
    key_padding_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal_by: str = "position",
    query_start: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
) -> Problem:
    check_flag("is_causal", options["is_causal"])
    min_offset, max_offset, is_causal_by_index = table.attended_interval_by(
        options["is_causal"],
        checked_causal_by(causal_by, options["is_causal"]),
        checked_window(options["window_size"]),
        query_positions is not None,
    )
    bias_origin = options["bias_origin"]
    default_origin = table.default_origin(1 if bias is None else bias.shape[-1])
    dropout_p = checked_dropout(options["dropout_p"])
    if bias is not None and bias_gate is not None and bias_gate.dim() == 3:  # one table: its rank is 1
        bias, bias_gate = bias.unsqueeze(-2), bias_gate.unsqueeze(-1)
    return Problem(
        query=query,
        key=key,
        value=value,
        bias=bias,
        bias_gate=bias_gate,
        key_padding_mask=key_padding_mask,
        query_positions=query_positions,
        key_positions=key_positions,
        key_lengths=key_lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_starts=None,
        seed=dropout.new_seed(query.device) if dropout_p > 0.0 else None,
        scale=checked_scale(options["scale"], query.shape[-1]),
        dropout_p=dropout_p,
        query_start=query_start,
        min_offset=min_offset,
        max_offset=max_offset,
        is_causal_by_index=is_causal_by_index,
        bias_origin=default_origin if bias_origin is None else checked_int("bias_origin", bias_origin),
        beyond=checked_beyond(options["beyond"]),
        deterministic=checked_deterministic(options["deterministic"]),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_place=None,
    )


def with_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the autocast dtype where autocast is on for their device, as SDPA casts them."""
    if not isinstance(query, Tensor) or not has_autocast(query.device.type):
        return query, key, value
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    cast = [x.to(dtype) if _is_castable(x) else x for x in (query, key, value)]
    return cast[0], cast[1], cast[2]


def _is_castable(tensor: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _check_reach_of_lengths(problem: Problem) -> None:
    """Checks `beyond="error"` where the tensors' lengths decide: without positions, and with no mask or `key_lengths`.

    No call waits for the numbers in `key_lengths`. The check assumes a sequence that has all keys, none of them masked.
    """
    if problem.beyond != "error" or problem.bias is None or problem.query_positions is not None:
        return
    if problem.key_padding_mask is not None and problem.key_lengths is None:
        return
    if problem.query.numel() == 0 or problem.key.numel() == 0:
        return
    len_q, len_k = problem.query.shape[2], problem.key.shape[2]
    lo, hi = table.reachable_offsets(len_q, len_k, problem.query_start)
    lo, hi = max(lo, problem.min_offset), min(hi, problem.max_offset)
    if lo <= hi:
        table.check_reach(problem.bias.shape[-1], problem.bias_origin, lo, hi)
