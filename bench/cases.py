"""The cases of the benchmark: named shapes, the suites that use them, and the tensors of a shape."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.case import BACKWARD as BACKWARD
from bench.case import BOTH, FORWARD, MODES, Case, ModelCase


def _both_masks(name: str, batch: int, heads: int, length: int, dtype: str = "float32") -> list[Case]:
    plain = Case(name, batch, heads, length, dtype=dtype)
    return [plain, replace(plain, name=f"{name}_causal", is_causal=True)]


GPU_TOKENS, GPU_MODEL_DIM = 16384, 2048  # of all sequences together, and of all heads together
GPU_CLAMP = 128


def _gpu_case(length: int, head_dim: int, clamp: int | None, is_causal: bool) -> Case:
    name = f"l{length}_d{head_dim}{'' if clamp is None else f'_c{clamp}'}{'_causal' * is_causal}"
    batch, heads = max(1, GPU_TOKENS // length), GPU_MODEL_DIM // head_dim
    return Case(name, batch, heads, length, head_dim, "bfloat16", is_causal, clamp=clamp)


GPU_CASES = [
    _gpu_case(length, head_dim, clamp, is_causal)
    for length in (512, 1024, 2048, 4096, 8192, 16384, 32768)
    for head_dim in (64, 128)
    for clamp in (None, GPU_CLAMP)
    for is_causal in (False, True)
]


def _model_cases() -> Iterator[ModelCase]:
    texts = [(model, *shape) for model in ("mpnet", "t5_encoder") for shape in ((32, 12, 128, 64), (8, 12, 384, 64))]
    texts += [("sentences", 256, 12, 128, 64)]
    windows = [("swin_t", 4, 3, 49, 32), ("swinv2_t_w8", 2, 3, 64, 32), ("swinv2_t_w16", 2, 3, 256, 32)]
    windows += [("beit_b", 2, 12, 197, 64), ("maxvit_t", 2, 2, 49, 32)]
    for model, batch, heads, length, dim in texts + windows:
        is_text = model in ("mpnet", "t5_encoder")
        paddings = (False, True) if is_text else (model == "sentences",)
        shape = f"_b{batch}_l{length}" if is_text else ""
        for is_padded, dtype in itertools.product(paddings, ("float32", "bfloat16")):
            name = f"{model}{shape}{'_padded' * (is_padded and is_text)}{'_bf16' * (dtype == 'bfloat16')}"
            yield ModelCase(name, batch, heads, length, dim, dtype, model=model, is_padded=is_padded)


MODEL_CASES = list(_model_cases())
_BOTH_DTYPES = (("", "float32"), ("_bf16", "bfloat16"))
_WINDOWS = Case("", 192, 4, 49, 32, is_grid=True)  # Swin's
_PATCHES = Case("", 8, 12, 196, is_grid=True)  # BEiT's
CASES = {
    case.name: case
    for case in (
        *GPU_CASES,
        *MODEL_CASES,
        *_both_masks("h8_l1024", 1, 8, 1024),
        *_both_masks("h8_l2048", 1, 8, 2048),
        *_both_masks("h8_l4096", 1, 8, 4096),
        *_both_masks("h8_l8192", 1, 8, 8192),
        Case("b8h8_l64", 8, 8, 64),  # many short sequences: call overhead counts
        *_both_masks("b8h8_l128", 8, 8, 128),
        Case("b8h8_l256", 8, 8, 256),
        *_both_masks("h1_l2048", 1, 1, 2048),  # one head: threads must share it
        *_both_masks("h3_l512", 1, 3, 512),  # heads that two threads cannot share evenly
        Case("b32h12_l128", 32, 12, 128),  # an encoder's
        Case("b192h4_l49", 192, 4, 49, 32),  # Swin's windows
        *(replace(_WINDOWS, name=f"b192h4_g7{name}", dtype=dtype) for name, dtype in _BOTH_DTYPES),
        *(replace(_PATCHES, name=f"b8h12_g14{name}", dtype=dtype) for name, dtype in _BOTH_DTYPES),
        Case("h8_l512_bf16", 1, 8, 512, dtype="bfloat16"),
        *_both_masks("h8_l1024_bf16", 1, 8, 1024, "bfloat16"),
        Case("h8_l2048_bf16", 1, 8, 2048, dtype="bfloat16"),
        Case("h8_l1024_d128_bf16", 1, 8, 1024, 128, "bfloat16"),
        Case("b8h8_l128_bf16", 8, 8, 128, dtype="bfloat16"),
        Case("b64h4_l49_bf16", 64, 4, 49, 32, "bfloat16"),
        Case("b32h12_l128_bf16", 32, 12, 128, dtype="bfloat16"),
        Case("h1_l8192_w128", 1, 1, 8192, window=128),
        *(Case(f"h8_l1024_r{rank}", 1, 8, 1024, rank=rank) for rank in (1, 16, 64)),
        *(Case(f"h8_l1024_c16_r{rank}", 1, 8, 1024, clamp=16, rank=rank) for rank in (16, 64)),
        *(Case(f"h8_l2048_r{rank}", 1, 8, 2048, rank=rank) for rank in (1, 16, 64)),
        Case("h8_cache32k", 1, 8, 32768, is_causal=True, decoded=1),
        Case("h8_cache32k_d128", 1, 8, 32768, 128, is_causal=True, decoded=1),
        Case("b4h8_cache8k", 4, 8, 8192, is_causal=True, decoded=1),
        Case("h8_cache32k_bf16", 1, 8, 32768, dtype="bfloat16", is_causal=True, decoded=1),
    )
}


@dataclass(frozen=True)
class Suite:
    """A kind of measurement, with the cases and the device that it uses unless the command line says otherwise.

    With `has_to_be_named` it is measured only where the command line names it.
    """

    about: str
    cases: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    device: str = "cpu"
    has_to_be_named: bool = False


def _with_causal(*names: str) -> tuple[str, ...]:
    return tuple(name + suffix for name in names for suffix in ("", "_causal"))


SUITES = {
    "speed": Suite(
        "time of every provider and its ratio to ours",
        (
            *_with_causal("h8_l1024", "h8_l1024_bf16"),
            *("b8h8_l64", *_with_causal("b8h8_l128"), "b8h8_l256", "h8_l512_bf16"),
        ),
        (FORWARD, BOTH),
        (
            *("ours", "ours_no_bias", "sdpa_no_bias", "sdpa_index", "sdpa_strided", "sdpa_strided_copy"),
            *("t5_eager", "t5_compiled", "flex_compiled"),
        ),
    ),
    "plain": Suite(
        "time of ours with a bias, and its ratio to SDPA without one",
        (
            *("h8_l2048", "b32h12_l128", "b192h4_l49", "h8_l512_bf16", *_with_causal("h8_l1024_bf16")),
            *("h8_l2048_bf16", "h8_l1024_d128_bf16", "b8h8_l128_bf16", "b64h4_l49_bf16", "b32h12_l128_bf16"),
        ),
        (FORWARD, BOTH),
        ("ours", "ours_vectors", "sdpa_no_bias"),
    ),
    "floors": Suite(
        "rate as a fraction of the processor's peak, and floors of the time as a fraction of the time",
        (*_with_causal("h8_l1024", "h8_l1024_bf16"), "h8_l2048", "h8_l2048_bf16"),
        (FORWARD, BOTH),
        ("ours",),
    ),
    "gemm": Suite(
        "rate of floating point operations as a fraction of a large matmul's",
        _with_causal("h8_l2048"),
        (FORWARD, BACKWARD),
        ("ours", "ours_no_bias", "sdpa_no_bias"),
    ),
    "threads": Suite(
        "speed-up by the second thread",
        (*_with_causal("h8_l1024", "h1_l2048"), "b8h8_l128", "h3_l512"),
        (FORWARD, BOTH),
        ("ours",),
    ),
    "decode": Suite(
        "rate of reading keys and values, and as a fraction of copying memory (bytes read and written)",
        ("h8_cache32k", "h8_cache32k_d128", "b4h8_cache8k", "h8_cache32k_bf16"),
        (FORWARD,),
        ("ours", "ours_no_bias"),
    ),
    "window": Suite(
        "speed-up by a window over the whole sequence",
        ("h1_l8192_w128",),
        (FORWARD, BOTH),
        ("ours",),
    ),
    "memory": Suite(
        "growth of the peak memory by one step, in a fresh process",
        _with_causal("h8_l2048", "h8_l4096", "h8_l8192"),
        (BOTH,),
        ("ours", "sdpa_no_bias", "sdpa_strided"),  # sdpa_strided takes the least memory of the dense providers
    ),
    "grid": Suite(
        "time with two-dimensional offsets, and its ratio to other ways and to attention without a bias",
        ("b192h4_g7", "b192h4_g7_bf16", "b8h12_g14", "b8h12_g14_bf16"),
        (FORWARD, BOTH),
        ("ours", "ours_no_bias", "sdpa_no_bias", "sdpa_index"),
    ),
    "models": Suite(
        "time of whole models with their own attention, and its ratio to the time with ours",
        tuple(case.name for case in MODEL_CASES),
        (FORWARD, BOTH),
        ("ours", "own_eager", "own_sdpa"),
        has_to_be_named=True,
    ),
    "gate": Suite(
        "time with factors from the query, and the ratio of the same call without them, and of dense eager code",
        (*(f"h8_l1024_r{rank}" for rank in (1, 16, 64)), *(f"h8_l1024_c16_r{rank}" for rank in (16, 64))),
        (FORWARD, BOTH),
        ("ours", "ours_ungated", "eager_gated"),
    ),
    "gate_memory": Suite(
        "growth of the peak memory by one step with factors from the query, in a fresh process",
        tuple(f"h8_l2048_r{rank}" for rank in (1, 16, 64)),
        (BOTH,),
        ("ours", "ours_ungated", "eager_gated"),
    ),
    "gpu": Suite(
        "time and rate of floating point operations on a GPU, over lengths, head dims, masks and clamps",
        tuple(case.name for case in GPU_CASES),
        MODES,
        ("ours", "ours_no_bias", "ours_atomics", "flash_attn", "sdpa_no_bias", "sdpa_index", "flex_compiled"),
        device="cuda",
    ),
}

# What --quick keeps of the suites above; it leaves out the compiled providers as well.
QUICK_CASES = {
    "speed": _with_causal("h8_l1024"),
    "plain": ("b192h4_l49", "h8_l1024_bf16"),
    "floors": ("h8_l1024", "h8_l1024_bf16"),
    "gemm": _with_causal("h8_l2048"),
    "threads": ("h8_l1024", "h1_l2048_causal"),
    "decode": ("h8_cache32k",),
    "window": ("h1_l8192_w128",),
    "memory": ("h8_l2048",),
    "grid": ("b192h4_g7",),
    "models": ("mpnet_b8_l384_bf16", "swin_t"),
    "gate": ("h8_l1024_r16",),
    "gate_memory": ("h8_l2048_r16",),
    "gpu": tuple(case.name for case in GPU_CASES if case.length in (1024, 4096) and case.head_dim == 64),
}


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; all but `dout` are leaves that require a gradient.

    Attributes:
        q, dout: (B, H, M, D); `dout` is the gradient of the output. `k` and `v` are (B, H, L, D).
        table: (H, 2R + 1) float32, the bias of every offset from -R to R, where R is L - 1 or the case's clamp; with a
            gate (H, rank, 2R + 1).
        gate: None, or (B, H, M, rank) float32, factors of the tables.
        positions: None where these are contiguous, or (L,) int64, the positions of queries and keys.
        is_causal: attend only where offset >= 0.
        window: keys on each side that a query attends to; -1: all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    dout: Tensor
    is_causal: bool
    window: int
    gate: Tensor | None = None
    positions: Tensor | None = None

    @property
    def reach(self) -> int:
        """The table's last offset on each side, R."""
        return self.table.shape[-1] // 2

    def arguments(self) -> tuple[Tensor, ...]:
        """The leaves (q, k, v, table), and the gate if there is one."""
        leaves = self.q, self.k, self.v, self.table
        return leaves if self.gate is None else (*leaves, self.gate)

    def detached(self) -> tuple[Tensor, ...]:
        """The tensors of `arguments` without gradients, as in inference."""
        return tuple(x.detach() for x in self.arguments())

    def ungated(self) -> "Inputs":
        """The same inputs without a gate, and with a head's first table."""
        if self.gate is None:
            return self
        return replace(self, table=self.table[:, 0].detach().clone().requires_grad_(), gate=None)


def make_inputs(case: Case, device: str) -> Inputs:
    """Random tensors from a fixed seed, the same for every provider."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    dtype = getattr(torch, case.dtype)
    lengths = (case.queries, case.length, case.length)
    shapes = [(case.batch, case.heads, length, case.head_dim) for length in lengths]
    q, k, v = (normal(*shape, dtype=dtype).requires_grad_() for shape in shapes)
    ranks = () if case.rank is None else (case.rank,)
    table = normal(case.heads, *ranks, 2 * case.reach + 1, dtype=torch.float32).requires_grad_()
    dout = normal(*shapes[0], dtype=dtype)
    gate = None
    if case.rank is not None:
        gate = (normal(*shapes[0][:3], case.rank, dtype=torch.float32) / case.rank**0.5).requires_grad_()
    positions = None
    if case.is_grid:
        rows, columns = torch.meshgrid(*2 * [torch.arange(case.side, device=device)], indexing="ij")
        positions = (rows * (2 * case.side - 1) + columns).flatten()
    return Inputs(q, k, v, table, dout, case.is_causal, case.window, gate, positions)
