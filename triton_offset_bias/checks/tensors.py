"""Checks of the tensors of a call: shapes, dtypes and devices, but no values."""

import torch
from torch import Tensor

from triton_offset_bias.checks.arguments import check_flag, check_tensor, shape

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def check_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    bias_gate: Tensor | None,
    key_padding_mask: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_lengths: Tensor | None,
    *,
    enable_gqa: bool,
    num_sequences: int | None = None,
) -> None:
    """Raises unless the tensors fit one another.

    A `bias` may have a table for each of `num_sequences` sequences, by default for each batch entry.
    """
    check_tensors(query, key, value, "(batch, heads, length, head_dim)", 4)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"`{name}` must have `query`'s batch size {query.shape[0]}, got shape {shape(tensor)}")
    check_sizes(query, key, value, enable_gqa, heads=1, length=2)
    batch, num_heads, len_q, _ = query.shape
    len_k = key.shape[2]
    rank = None if bias_gate is None else checked_rank(bias_gate, bias, query, query.shape[:3])
    if bias is not None:
        check_bias(bias, query, batch if num_sequences is None else num_sequences, num_heads, rank)
    if key_padding_mask is not None:
        _check_key_padding_mask(key_padding_mask, query, batch, len_k)
    _check_positions(query, query_positions, key_positions, batch, len_q, len_k)
    if key_lengths is not None:
        check_per_sequence("key_lengths", key_lengths, query, batch)
        if query_positions is not None:
            raise ValueError(
                "`key_lengths` must be None when positions are given, since these already place the queries, "
                f"got shape {shape(key_lengths)}"
            )


def check_tensors(query: Tensor, key: Tensor, value: Tensor, layout: str, axes: int) -> None:
    """Raises unless the three are tensors of one floating dtype and device, laid out as `layout` says."""
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


def check_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, heads: int, length: int) -> None:
    """Checks head dims, lengths and heads; `heads` and `length` are the axes that hold them."""
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


def checked_rank(gate: Tensor, bias: Tensor | None, query: Tensor, rows: torch.Size) -> int | None:
    """The size R of the axis that `gate` has behind `rows`, the axes of the rows of queries; None without that axis."""
    check_tensor("bias_gate", gate)
    if bias is None:
        raise ValueError(f"`bias_gate` must be None where `bias` is None, got shape {shape(gate)}")
    if not gate.is_floating_point():
        raise TypeError(f"`bias_gate` must have a floating-point dtype, got {gate.dtype}")
    _check_device("bias_gate", gate, query)
    axes = len(rows)
    if gate.dim() not in (axes, axes + 1) or gate.shape[:axes] != rows:
        expected = ", ".join(str(size) for size in rows)
        raise ValueError(f"`bias_gate` must have shape ({expected}) or ({expected}, R), got shape {shape(gate)}")
    if gate.dim() == axes:
        return None
    if gate.shape[-1] == 0:
        raise ValueError(f"`bias_gate` must have a rank R of at least 1, got shape {shape(gate)}")
    return gate.shape[-1]


def check_bias(bias: Tensor, query: Tensor, batch: int, num_heads: int, rank: int | None) -> None:
    """Raises unless `bias` is a table for that batch size and number of heads, with an axis of a gate's `rank`."""
    check_tensor("bias", bias)
    if not bias.is_floating_point():
        raise TypeError(f"`bias` must have a floating-point dtype, got {bias.dtype}")
    _check_device("bias", bias, query)
    shapes, last = ("(N,), (H, N) or (B, H, N)", 1) if rank is None else ("(R, N), (H, R, N) or (B, H, R, N)", 2)
    if not last <= bias.dim() <= last + 2:
        raise ValueError(f"`bias` must have shape {shapes}, got shape {shape(bias)}")
    if bias.shape[-1] == 0:
        raise ValueError(f"`bias` must have at least one column, got shape {shape(bias)}")
    if rank is not None and bias.shape[-2] != rank:
        raise ValueError(f"`bias` must have the rank {rank} of `bias_gate` before its columns, got shape {shape(bias)}")
    heads = bias.shape[:-last]
    if heads and heads[-1] != 1 and heads[-1] != num_heads:
        raise ValueError(f"`bias` must have {num_heads} heads or 1, got shape {shape(bias)}")
    if len(heads) == 2 and heads[0] != batch:
        raise ValueError(f"`bias` must have batch size {batch}, got shape {shape(bias)}")


def check_sink(sink: Tensor, query: Tensor, batch: int, num_heads: int) -> None:
    """Raises unless `sink` has a logit for each of `num_heads` heads, of all sequences or of each of `batch`."""
    check_tensor("sink", sink)
    if not sink.is_floating_point():
        raise TypeError(f"`sink` must have a floating-point dtype, got {sink.dtype}")
    _check_device("sink", sink, query)
    if sink.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(f"`sink` must have shape ({num_heads},) or ({batch}, {num_heads}), got shape {shape(sink)}")


def _check_key_padding_mask(mask: Tensor, query: Tensor, batch: int, len_k: int) -> None:
    """Raises unless `mask` is a (batch, len_k) bool tensor."""
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"`key_padding_mask` must be bool (True = attend), got {mask.dtype}")
    _check_device("key_padding_mask", mask, query)
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != len_k:
        raise ValueError(f"`key_padding_mask` must have shape ({batch}, {len_k}), got shape {shape(mask)}")


def _check_positions(
    query: Tensor, query_positions: Tensor | None, key_positions: Tensor | None, batch: int, len_q: int, len_k: int
) -> None:
    """Raises unless the positions are both None, or both integers of fitting shapes."""
    if query_positions is None and key_positions is None:
        return
    for name, positions, length in (
        ("query_positions", query_positions, len_q),
        ("key_positions", key_positions, len_k),
    ):
        if positions is None:
            raise ValueError(f"`{name}` must be given too, because queries and keys need positions together, got None")
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


def check_per_sequence(name: str, numbers: Tensor, query: Tensor, sequences: int) -> None:
    """Raises unless the tensor has an integer for each sequence."""
    check_tensor(name, numbers)
    if numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must be int32 or int64, got {numbers.dtype}")
    _check_device(name, numbers, query)
    if numbers.dim() != 1 or numbers.shape[0] != sequences:
        raise ValueError(f"`{name}` must have shape ({sequences},), got shape {shape(numbers)}")


def check_bounds(name: str, cu_seqlens: Tensor, query: Tensor) -> None:
    """Raises unless `cu_seqlens` may be the bounds of packed sequences."""
    check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"`{name}` must have shape (batch + 1,), got shape {shape(cu_seqlens)}")
    _check_device(name, cu_seqlens, query)
