"""What is measured: the named shapes, the suites that use them, and the tensors of a shape."""

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
MODES = (FORWARD, BACKWARD, BOTH)


@dataclass(frozen=True)
class Case:
    """A named shape of self-attention.

    Attributes:
        name: what the command line and the CSV call it.
        batch: sequences.
        heads: heads of query, key and value.
        length: keys a sequence.
        head_dim: dimensions a head.
        dtype: name of the torch dtype of query, key and value; the table is always float32.
        is_causal: attend only where offset >= 0.
        decoded: queries a sequence, the last ones, as in decoding with a cache; None: as many as keys.
        window: keys on each side that a query attends to; -1: all.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int = 64
    dtype: str = "float32"
    is_causal: bool = False
    decoded: int | None = None
    window: int = -1

    @property
    def queries(self) -> int:
        """Queries a sequence."""
        return self.length if self.decoded is None else self.decoded

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return 2 * self.batch * self.heads * self.length * self.head_dim * getattr(torch, self.dtype).itemsize

    def flops(self, mode: str) -> float:
        """Floating point operations of the matmuls: 4 BHMND forward, 10 backward; half of it when causal."""
        pairs = self.batch * self.heads * self.length**2 * (0.5 if self.is_causal else 1.0)
        return {FORWARD: 4, BACKWARD: 10, BOTH: 14}[mode] * pairs * self.head_dim


def _both_masks(name: str, batch: int, heads: int, length: int) -> list[Case]:
    plain = Case(name, batch, heads, length)
    return [plain, Case(f"{name}_causal", batch, heads, length, is_causal=True)]


CASES = {
    case.name: case
    for case in (
        *_both_masks("h8_l1024", 1, 8, 1024),
        *_both_masks("h8_l2048", 1, 8, 2048),
        *_both_masks("h8_l4096", 1, 8, 4096),
        *_both_masks("h8_l8192", 1, 8, 8192),
        *_both_masks("b8h8_l128", 8, 8, 128),  # many short sequences: call overhead counts
        *_both_masks("h1_l2048", 1, 1, 2048),  # one head: threads must share it
        *_both_masks("h3_l512", 1, 3, 512),  # heads that two threads cannot share evenly
        Case("h8_l512_bf16", 1, 8, 512, dtype="bfloat16"),
        Case("h1_l8192_w128", 1, 1, 8192, window=128),
        Case("h8_cache32k", 1, 8, 32768, is_causal=True, decoded=1),
        Case("h8_cache32k_d128", 1, 8, 32768, 128, is_causal=True, decoded=1),
        Case("b4h8_cache8k", 4, 8, 8192, is_causal=True, decoded=1),
        Case("h8_cache32k_bf16", 1, 8, 32768, dtype="bfloat16", is_causal=True, decoded=1),
    )
}


@dataclass(frozen=True)
class Suite:
    """A kind of measurement, and what it is taken of unless the command line says otherwise."""

    about: str
    cases: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]


def _with_causal(*names: str) -> tuple[str, ...]:
    return tuple(name + suffix for name in names for suffix in ("", "_causal"))


SUITES = {
    "speed": Suite(
        "time of every provider and its ratio to ours",
        (*_with_causal("h8_l1024", "b8h8_l128"), "h8_l512_bf16"),
        (FORWARD, BOTH),
        (
            *("ours", "ours_no_bias", "sdpa_no_bias", "sdpa_index", "sdpa_strided", "sdpa_strided_copy"),
            *("t5_eager", "t5_compiled", "flex_compiled"),
        ),
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
        ("ours", "sdpa_no_bias", "sdpa_strided"),  # of the dense ones the leanest
    ),
}

# What --quick keeps of the suites above; it leaves out the compiled providers as well.
QUICK_CASES = {
    "speed": _with_causal("h8_l1024"),
    "gemm": _with_causal("h8_l2048"),
    "threads": ("h8_l1024", "h1_l2048_causal"),
    "decode": ("h8_cache32k",),
    "window": ("h1_l8192_w128",),
    "memory": ("h8_l2048",),
}


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; all but `dout` are leaves that require a gradient.

    Attributes:
        q: (B, H, M, D), as is `dout`, the gradient that comes back to the output; `k` and `v` (B, H, L, D).
        table: (H, 2L - 1) float32, the bias of every offset from -(L - 1) to L - 1.
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

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, table), the leaves."""
        return self.q, self.k, self.v, self.table

    def detached(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, table) of which no gradient will be asked: what inference has."""
        return self.q.detach(), self.k.detach(), self.v.detach(), self.table.detach()


def make_inputs(case: Case, device: str) -> Inputs:
    """The same random tensors for every provider, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    dtype = getattr(torch, case.dtype)
    lengths = (case.queries, case.length, case.length)
    shapes = [(case.batch, case.heads, length, case.head_dim) for length in lengths]
    q, k, v = (normal(*shape, dtype=dtype).requires_grad_() for shape in shapes)
    table = normal(case.heads, 2 * case.length - 1, dtype=torch.float32).requires_grad_()
    return Inputs(q, k, v, table, normal(*shapes[0], dtype=dtype), case.is_causal, case.window)
