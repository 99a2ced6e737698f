"""Argument checking: turns the public call into a `Problem`, or raises an error that names what was wrong."""

import itertools

import torch
from torch import Tensor

from triton_offset_bias import table
from triton_offset_bias.problem import Problem
from triton_offset_bias.validators import (
    check_flag,
    check_tensor,
    checked_beyond,
    checked_deterministic,
    checked_dropout,
    checked_int,
    checked_scale,
    checked_window,
    shape,
)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bias_origin: int | None,
    beyond: str,
    query_start: int | None,
    window_size: tuple[int, int],
    key_padding_mask: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    deterministic: bool | None,
    return_lse: bool,
) -> Problem:
    """Checks every argument of `offset_bias_attention` and fills in the defaults.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check_tensors(query, key, value, "(batch, heads, length, head_dim)", 4)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"`{name}` must have `query`'s batch size {query.shape[0]}, got shape {shape(tensor)}")
    _check_sizes(query, key, value, enable_gqa, heads=1, length=2)
    check_flag("is_causal", is_causal)
    check_flag("return_lse", return_lse)
    batch, num_heads, len_q, head_dim = query.shape
    len_k = key.shape[2]
    if bias is not None:
        _check_bias(bias, query, batch, num_heads)
    num_columns = 1 if bias is None else bias.shape[-1]
    if key_padding_mask is not None:
        _check_key_padding_mask(key_padding_mask, query, batch, len_k)
    has_positions = _check_positions(query, query_positions, key_positions, batch, len_q, len_k)
    if has_positions and query_start is not None:
        raise ValueError("`query_start` must be None when positions are given: the positions already place the queries")
    min_offset, max_offset = table.attended_interval(is_causal, checked_window(window_size))
    problem = Problem(
        query=query,
        key=key,
        value=value,
        bias=bias,
        key_padding_mask=key_padding_mask,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=checked_scale(scale, head_dim),
        dropout_p=checked_dropout(dropout_p),
        query_start=len_k - len_q if query_start is None else checked_int("query_start", query_start),
        min_offset=min_offset,
        max_offset=max_offset,
        bias_origin=table.default_origin(num_columns)
        if bias_origin is None
        else checked_int("bias_origin", bias_origin),
        beyond=checked_beyond(beyond),
        deterministic=checked_deterministic(deterministic),
    )
    _check_reach_of_lengths(problem)
    return problem


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    enable_gqa: bool,
) -> tuple[list[int], list[int]]:
    """Checks what only `offset_bias_attention_varlen` has; returns every sequence's number of queries and of keys.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check_tensors(query, key, value, "(total, heads, head_dim)", 3)
    _check_sizes(query, key, value, enable_gqa, heads=1, length=0)
    lengths_q = _sequence_lengths("cu_seqlens_q", cu_seqlens_q, "query", query, "max_seqlen_q", max_seqlen_q)
    lengths_k = _sequence_lengths("cu_seqlens_k", cu_seqlens_k, "key", key, "max_seqlen_k", max_seqlen_k)
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"`cu_seqlens_k` must describe as many sequences as `cu_seqlens_q` ({len(lengths_q)}), got {len(lengths_k)}"
        )
    if bias is not None:
        _check_bias(bias, query, len(lengths_q), query.shape[1])
    return lengths_q, lengths_k


def with_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the autocast dtype where autocast is on for their device, as SDPA casts them."""
    if not isinstance(query, Tensor) or not torch.amp.is_autocast_available(query.device.type):
        return query, key, value
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    cast = [x.to(dtype) if _is_castable(x) else x for x in (query, key, value)]
    return cast[0], cast[1], cast[2]


def _is_castable(tensor: Tensor) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, layout: str, axes: int) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != axes:
            raise ValueError(f"`{name}` must have shape {layout}, got shape {shape(tensor)}")
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"`query` must be float16, bfloat16, float32 or float64, got {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"`{name}` must have `query`'s dtype {query.dtype}, got {tensor.dtype}")
        _check_device(name, tensor, query)


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, heads: int, length: int) -> None:
    """Head dims, lengths and heads; `heads` and `length` are the axes that hold them."""
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"`key` must have `query`'s head_dim {query.shape[-1]}, got shape {shape(key)}")
    if value.shape[length] != key.shape[length]:
        raise ValueError(f"`value` must have `key`'s length {key.shape[length]}, got shape {shape(value)}")
    if value.shape[heads] != key.shape[heads]:
        raise ValueError(f"`value` must have `key`'s {key.shape[heads]} heads, got shape {shape(value)}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] < 1:
            raise ValueError(f"`{name}` must have a head_dim of at least 1, got shape {shape(tensor)}")
    check_flag("enable_gqa", enable_gqa)
    heads_q, heads_kv = query.shape[heads], key.shape[heads]
    if heads_q == heads_kv:
        return
    if not enable_gqa:
        raise ValueError(
            f"`key` must have `query`'s {heads_q} heads, got shape {shape(key)}; enable_gqa=True shares key heads"
        )
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(
            f"`key` must have a number of heads that divides `query`'s {heads_q} (enable_gqa=True), "
            f"got shape {shape(key)}"
        )


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"`{name}` must be on `query`'s device {query.device}, got {tensor.device}")


def _check_bias(bias: Tensor, query: Tensor, batch: int, num_heads: int) -> None:
    check_tensor("bias", bias)
    if not bias.is_floating_point():
        raise TypeError(f"`bias` must have a floating-point dtype, got {bias.dtype}")
    _check_device("bias", bias, query)
    if bias.dim() not in (1, 2, 3):
        raise ValueError(f"`bias` must have shape (N,), (H, N) or (B, H, N), got shape {shape(bias)}")
    if bias.shape[-1] == 0:
        raise ValueError(f"`bias` must have at least one column, got shape {shape(bias)}")
    if bias.dim() >= 2 and bias.shape[-2] != 1 and bias.shape[-2] != num_heads:
        raise ValueError(f"`bias` must have {num_heads} heads or 1, got shape {shape(bias)}")
    if bias.dim() == 3 and bias.shape[0] != batch:
        raise ValueError(f"`bias` must have batch size {batch}, got shape {shape(bias)}")


def _check_key_padding_mask(mask: Tensor, query: Tensor, batch: int, len_k: int) -> None:
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"`key_padding_mask` must be bool (True = attend), got {mask.dtype}")
    _check_device("key_padding_mask", mask, query)
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != len_k:
        raise ValueError(f"`key_padding_mask` must have shape ({batch}, {len_k}), got shape {shape(mask)}")


def _check_positions(
    query: Tensor, query_positions: Tensor | None, key_positions: Tensor | None, batch: int, len_q: int, len_k: int
) -> bool:
    if query_positions is None and key_positions is None:
        return False
    for name, positions, length in (
        ("query_positions", query_positions, len_q),
        ("key_positions", key_positions, len_k),
    ):
        if positions is None:
            raise ValueError(f"`{name}` must be given too: positions come for queries and keys together, got None")
        check_tensor(name, positions)
        if positions.dtype not in INTEGER_DTYPES:
            raise TypeError(f"`{name}` must have an integer dtype, got {positions.dtype}")
        _check_device(name, positions, query)
        if positions.dim() not in (1, 2) or positions.shape[-1] != length:
            raise ValueError(
                f"`{name}` must have shape ({length},) or ({batch}, {length}), got shape {shape(positions)}"
            )
        if positions.dim() == 2 and positions.shape[0] != batch:
            raise ValueError(f"`{name}` must have batch size {batch}, got shape {shape(positions)}")
    return True


def _check_reach_of_lengths(problem: Problem) -> None:
    """`beyond="error"` where lengths alone tell which offsets are attended to; masks and positions wait for data."""
    if problem.beyond != "error" or problem.bias is None:
        return
    if problem.query_positions is not None or problem.key_padding_mask is not None:
        return
    if problem.query.numel() == 0 or problem.key.numel() == 0:
        return
    len_q, len_k = problem.query.shape[2], problem.key.shape[2]
    lo, hi = table.reachable_offsets(len_q, len_k, problem.query_start)
    lo, hi = max(lo, problem.min_offset), min(hi, problem.max_offset)
    if lo <= hi:
        table.check_reach(problem.bias.shape[-1], problem.bias_origin, lo, hi)


def _sequence_lengths(
    name: str, cu_seqlens: Tensor, packed_name: str, packed: Tensor, max_name: str, max_seqlen: int
) -> list[int]:
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"`{name}` must have shape (batch + 1,), got shape {shape(cu_seqlens)}")
    _check_device(name, cu_seqlens, packed)
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != packed.shape[0]:
        raise ValueError(
            f"`{name}` must run from 0 to `{packed_name}`'s total length {packed.shape[0]}, "
            f"got {bounds[0]} to {bounds[-1]}"
        )
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if any(length < 0 for length in lengths):
        raise ValueError(f"`{name}` must never decrease, got {bounds}")
    longest = max(lengths, default=0)
    if checked_int(max_name, max_seqlen) < longest:
        raise ValueError(f"`{max_name}` must be at least the longest sequence's {longest}, got {max_seqlen}")
    return lengths
