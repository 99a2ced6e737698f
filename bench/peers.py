"""The providers that this package is compared with.

A materialised bias is materialised in every call, because the table changes in training. `sdpa_index` is written as
models write it, with a causal mask of all pairs. The other peers put -inf into the table instead, which is faster.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.cases import Inputs
from bench.provider import Run


def flash_attn(inputs: Inputs) -> Run:
    """flash-attn, if it is installed; it has no such bias."""
    from flash_attn import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=inputs.is_causal).transpose(1, 2)

    return run


def sdpa_no_bias(inputs: Inputs) -> Run:
    """SDPA, torch's fused attention, which is at its best without a bias."""
    return lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=inputs.is_causal)


def sdpa_flash(inputs: Inputs) -> Run:
    """SDPA's FlashAttention, by name: it takes no bias."""
    return _named_sdpa(SDPBackend.FLASH_ATTENTION, sdpa_no_bias(inputs))


def sdpa_cudnn(inputs: Inputs) -> Run:
    """SDPA's cuDNN, by name."""
    return _named_sdpa(SDPBackend.CUDNN_ATTENTION, sdpa_no_bias(inputs))


def sdpa_efficient(inputs: Inputs) -> Run:
    """SDPA's memory-efficient attention, by name: the fused one that takes a bias for every pair, and trains it."""
    return _named_sdpa(SDPBackend.EFFICIENT_ATTENTION, sdpa_index(inputs))


def _named_sdpa(backend: SDPBackend, run: Run) -> Run:
    def run_by_it(*arguments: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return run(*arguments)

    return run_by_it


def sdpa_index(inputs: Inputs) -> Run:
    """SDPA with a bias that is looked up and masked for every pair, as Swin and most models write it."""
    index = _table_index(inputs)
    is_future = index < inputs.reach  # (M, N)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table[:, index]  # (H, M, N)
        if inputs.is_causal:
            bias = bias.masked_fill(is_future, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None])

    return run


def sdpa_strided(inputs: Inputs) -> Run:
    """SDPA with the bias as an overlapping view of the table: no copy, unless SDPA makes one.

    Strides cannot be negative, so the keys and values are reversed: query i and key N - 1 - j meet at column i + j.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = _all_offsets(table, inputs).unfold(-1, k.shape[2], 1)  # (H, M, N), strides (2L - 1, 1, 1)
        return F.scaled_dot_product_attention(q, k.flip(2), v.flip(2), bias.to(q.dtype)[None])

    return run


def sdpa_strided_copy(inputs: Inputs) -> Run:
    """SDPA with the bias copied from the overlapping view: no index, keys in their order."""

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = _all_offsets(table, inputs).unfold(-1, k.shape[2], 1).flip(-1)  # (H, M, N)
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None])

    return run


def t5_eager(inputs: Inputs) -> Run:
    """Matmul, bias, softmax and matmul, as T5 is written."""
    index = _table_index(inputs)
    return lambda q, k, v, table: _t5(q, k, v, table, index, inputs.is_causal)


def t5_compiled(inputs: Inputs) -> Run:
    """Matmul, bias, softmax and matmul, compiled."""
    index = _table_index(inputs)
    compiled = _compile(_t5)
    return lambda q, k, v, table: compiled(q, k, v, table, index, inputs.is_causal)


def flex_compiled(inputs: Inputs) -> Run:
    """Compiled FlexAttention that captures the table. On a CPU it has no backward."""
    length, reach, mask = inputs.q.shape[2], inputs.reach, _flex_mask(inputs)
    compiled = _compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            offset = i - j if reach == length - 1 else (i - j).clamp(-reach, reach)
            return score + table[h, offset + reach]

        return compiled(q, k, v, score_mod=add_bias, block_mask=mask)

    return run


def flex_no_bias(inputs: Inputs) -> Run:
    """Compiled FlexAttention without a bias."""
    mask, compiled = _flex_mask(inputs), _compile(flex_attention)
    return lambda q, k, v, _: compiled(q, k, v, block_mask=mask)


def _flex_mask(inputs: Inputs) -> BlockMask | None:
    if not inputs.is_causal:
        return None
    length, device = inputs.q.shape[2], inputs.q.device.type
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def _t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor, is_causal: bool) -> Tensor:
    bias = _masked_table(table, is_causal)[:, index].to(q.dtype)  # (H, M, N)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias  # (B, H, M, N)
    return scores.softmax(-1) @ v


def _masked_table(table: Tensor, is_causal: bool) -> Tensor:
    """The table with -inf where causality forbids the offset."""
    if not is_causal:
        return table
    offsets = torch.arange(table.shape[1], device=table.device) - table.shape[1] // 2
    return table.masked_fill(offsets < 0, float("-inf"))


def _all_offsets(table: Tensor, inputs: Inputs) -> Tensor:
    """The masked table for all offsets, (H, 2L - 1), with its ends repeated where it is shorter than the sequence."""
    beyond = inputs.q.shape[2] - 1 - inputs.reach
    masked = _masked_table(table, inputs.is_causal)
    return F.pad(masked[None], (beyond, beyond), mode="replicate")[0] if beyond else masked


def _table_index(inputs: Inputs) -> Tensor:
    """The table's column for every pair, (M, N)."""
    positions = inputs.positions
    if positions is None:
        positions = torch.arange(inputs.q.shape[2], device=inputs.q.device)
    return (positions[:, None] - positions[None, :]).clamp(-inputs.reach, inputs.reach) + inputs.reach


def _compile(function: Callable) -> Callable:
    # Inductor bakes the thread count into its code, yet its cache looks only at options.
    return torch.compile(function, dynamic=False, fullgraph=True, options={"cpp.threads": torch.get_num_threads()})
