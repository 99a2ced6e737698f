"""The providers: every way to compute the same attention from the same inputs.

A provider's `prepare` does the work that a model would do once (indices, masks, compilation). It is not timed. It
returns the function that is timed, from (q, k, v, table) to the output. A materialised bias is materialised in every
call, because the table changes in training. `sdpa_index` is written as models write it, with a causal mask of all
pairs. The other peers put -inf into the table instead, which is faster.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.cases import FORWARD, MODES, Inputs
from bench.eager import eager_gated
from triton_offset_bias import offset_bias_attention
from triton_offset_bias.backends import cpp
from triton_offset_bias.backends.cpp import library

VECTORS = "avx512_bf16"

Run = Callable[..., Tensor]  # q, k, v, table, and the gate if there is one -> out


class AbsentError(RuntimeError):
    """A provider cannot run on this machine, and need not."""


@dataclass(frozen=True)
class Provider:
    """A way to compute the attention of `Inputs`.

    Attributes:
        label: the name in plots.
        prepare: returns the function to be timed.
        uses_table: False for attention without a bias.
        is_ungated: takes `Inputs.ungated`.
        is_dense: stores B*H*M*N numbers.
        is_compiled: compiled by torch.compile for one shape.
        cpu_modes: the modes in which it can run on a CPU.
        why_not: the reason why it cannot run in the other modes.
        context: the context manager around every step, backward too.
    """

    label: str
    prepare: Callable[[Inputs], Run]
    uses_table: bool = True
    is_ungated: bool = False
    is_dense: bool = False
    is_compiled: bool = False
    cpu_modes: tuple[str, ...] = MODES
    why_not: str = ""
    context: Callable[[], AbstractContextManager] = nullcontext

    def seen(self, inputs: Inputs) -> Inputs:
        """The inputs that the provider takes."""
        return inputs.ungated() if self.is_ungated else inputs


def ours(inputs: Inputs) -> Run:
    """This package."""
    options = {**_band(inputs), "query_positions": inputs.positions, "key_positions": inputs.positions}
    return lambda q, k, v, table, gate=None: offset_bias_attention(q, k, v, table, bias_gate=gate, **options)


def ours_ungated(inputs: Inputs) -> Run:
    """This package without factors from the query. The difference to `ours` is their cost."""
    return ours(inputs)


def ours_no_bias(inputs: Inputs) -> Run:
    """This package without the bias. The difference to `ours` is the cost of the bias."""
    return lambda q, k, v, _: offset_bias_attention(q, k, v, None, **_band(inputs))


def ours_vectors(inputs: Inputs) -> Run:
    """This package by the engine's build avx512_bf16 where another one is loaded: vectors instead of AMX tiles."""
    if cpp.BUILD == VECTORS or VECTORS not in cpp.RUNNABLE:
        raise AbsentError(f"it compares {VECTORS} with another build, got {cpp.BUILD} of {', '.join(cpp.RUNNABLE)}")
    return ours(inputs)


@contextmanager
def _vectors() -> Iterator[None]:
    with _variable(cpp.BUILD_VARIABLE, VECTORS):
        other = _loaded(VECTORS)
    loaded, cpp._ENGINE = cpp._ENGINE, other
    try:
        yield
    finally:
        cpp._ENGINE = loaded


@cache
def _loaded(build: str) -> ctypes.CDLL:
    engine = library.load()
    if engine.library is None:
        raise RuntimeError(f"{build}: {engine.reason}")
    return engine.library


def ours_atomics(inputs: Inputs) -> Run:
    """This package's GPU kernels with an atomic add for every score, as compilers generate them."""
    return lambda q, k, v, table: offset_bias_attention(q, k, v, table, **_band(inputs), backend="triton")


def _band(inputs: Inputs) -> dict[str, Any]:
    return {"is_causal": inputs.is_causal, "window_size": (inputs.window, inputs.window)}


def _atomics_of_scores() -> AbstractContextManager:
    from triton_offset_bias.backends.triton.configs import GATHERING_VARIABLE

    return _variable(GATHERING_VARIABLE, "elements")


def ours_hopper(inputs: Inputs) -> Run:
    """This package's GPU kernels, the forward one for Hopper alone."""
    capability = torch.cuda.get_device_capability(inputs.q.device)
    if capability[0] != 9:
        raise RuntimeError(f"`ours_hopper` needs a GPU of compute capability 9, got {capability}")
    return ours_atomics(inputs)


def _hopper_kernels() -> AbstractContextManager:
    from triton_offset_bias.backends.triton.hopper import HOPPER_VARIABLE

    return _variable(HOPPER_VARIABLE, "1")


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable, and gives it its old value back."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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


PROVIDERS = {
    "ours": Provider("ours", ours),
    "ours_no_bias": Provider("ours, no bias", ours_no_bias, uses_table=False),
    "ours_ungated": Provider("ours, no gate", ours_ungated, is_ungated=True),
    "eager_gated": Provider("dense, eager", eager_gated, is_dense=True),
    "ours_vectors": Provider("ours, avx512_bf16", ours_vectors, context=_vectors),
    "ours_atomics": Provider(
        "ours, atomic per score",
        ours_atomics,
        cpu_modes=(),
        why_not="it is about GPU kernels",
        context=_atomics_of_scores,
    ),
    "ours_hopper": Provider(
        "ours, Hopper's forward",
        ours_hopper,
        cpu_modes=(),
        why_not="it is about GPU kernels",
        context=_hopper_kernels,
    ),
    "flash_attn": Provider(
        "flash-attn, no bias",
        flash_attn,
        uses_table=False,
        cpu_modes=(),
        why_not="flash-attn is for GPUs",
    ),
    "sdpa_no_bias": Provider("SDPA, no bias", sdpa_no_bias, uses_table=False),
    "sdpa_flash": Provider("SDPA flash, no bias", sdpa_flash, uses_table=False),
    "sdpa_cudnn": Provider(
        "SDPA cuDNN, no bias", sdpa_cudnn, uses_table=False, cpu_modes=(), why_not="cuDNN is for NVIDIA GPUs"
    ),
    "sdpa_efficient": Provider(
        "SDPA efficient + bias[:, index]",
        sdpa_efficient,
        is_dense=True,
        cpu_modes=(),
        why_not="SDPA's efficient attention is for GPUs",
    ),
    "sdpa_index": Provider("SDPA + bias[:, index]", sdpa_index, is_dense=True),
    "sdpa_strided": Provider("SDPA + strided view", sdpa_strided, is_dense=True),
    "sdpa_strided_copy": Provider("SDPA + copied view", sdpa_strided_copy, is_dense=True),
    "t5_eager": Provider("T5-style, eager", t5_eager, is_dense=True),
    "t5_compiled": Provider("T5-style, compiled", t5_compiled, is_dense=True, is_compiled=True),
    "flex_compiled": Provider(
        "FlexAttention, compiled",
        flex_compiled,
        is_compiled=True,
        cpu_modes=(FORWARD,),
        why_not="FlexAttention has no backward on a CPU",
    ),
    "flex_no_bias": Provider(
        "FlexAttention, no bias",
        flex_no_bias,
        uses_table=False,
        is_compiled=True,
        cpu_modes=(FORWARD,),
        why_not="FlexAttention has no backward on a CPU",
    ),
}
EXPERIMENTAL = ("ours_hopper",)  # this package's kernels that are behind a switch
SDPA_WITH_BIAS = ("sdpa_index", "sdpa_strided", "sdpa_strided_copy")
TRAINABLE_PEERS = (*SDPA_WITH_BIAS, "t5_eager", "t5_compiled")
