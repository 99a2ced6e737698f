"""A listed attention call: its tensors, its results on a backend, and their comparison with the oracle."""

from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import GATED_NAMES, Results, oracle
from philox import dropout_factors
from tolerance import assert_accurate
from torch import Tensor

from triton_offset_bias import offset_bias_attention


@dataclass(frozen=True)
class Case:
    """An attention call. Options are keywords of `offset_bias_attention`; by default the table covers every offset."""

    reason: str
    lengths: tuple[int, int] = (29, 31)
    dims: tuple[int, int] = (16, 16)
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    bias: str | None = "HN"
    columns: int | None = None
    dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype = torch.float32
    mask: str | None = None
    forbidden: tuple[int, ...] = ()
    layout: str = "contiguous"
    through_lse: bool = False
    rank: int | None = None  # of a gate; 0: a gate without an axis of its rank
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """The tensors of a case: leaves that need gradients, the incoming gradients, and the keywords."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    options: dict[str, Any]
    gate: Tensor | None = None


def build(case: Case, seed: int = 0) -> Call:
    """The tensors of a case, the same every time."""
    draw = torch.Generator("cpu").manual_seed(seed)
    (len_q, len_k), (dim, dim_v), (heads_q, heads_kv) = case.lengths, case.dims, case.heads

    def tensor(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        values = torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").float()
        return values.to(torch.get_default_device(), dtype)

    q = lay_out(tensor(case.batch, heads_q, len_q, dim), case.layout)
    k = lay_out(tensor(case.batch, heads_kv, len_k, dim), case.layout)
    v = lay_out(tensor(case.batch, heads_kv, len_k, dim_v), case.layout)
    columns = 2 * max(len_q, len_k) - 1 if case.columns is None else case.columns
    shapes = {"N": (), "HN": (heads_q,), "1N": (1,), "BHN": (case.batch, heads_q), "B1N": (case.batch, 1)}
    ranks = (case.rank,) if case.rank else ()
    bias = None if case.bias is None else tensor(*shapes[case.bias], *ranks, columns, dtype=case.bias_dtype)
    for column in case.forbidden:
        bias[..., column] = float("-inf")
    options = dict(case.options)
    if heads_q != heads_kv:
        options["enable_gqa"] = True
    if case.mask is not None:
        options["key_padding_mask"] = padding_mask(case.mask, case.batch, len_k)
    real = torch.promote_types(case.dtype, torch.float32)
    dlse = tensor(case.batch, heads_q, len_q, dtype=real) if case.through_lse else None
    dout = tensor(case.batch, heads_q, len_q, dim_v)
    gate = None
    if case.rank is not None:
        gate = lay_out(tensor(case.batch, heads_q, len_q, max(case.rank, 1), dtype=case.bias_dtype), case.layout)
        gate = gate if case.rank else gate[..., 0]
    *leaves, gate = (None if x is None else x.requires_grad_() for x in (q, k, v, bias, gate))
    return Call(*leaves, dout, dlse, options, gate)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of a (B, H, L, D) tensor in another memory layout ("expanded": its first head for all heads)."""
    if layout == "transposed BLHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice of a packed qkv":
        packed = torch.stack([torch.zeros_like(x), x, torch.ones_like(x)]).permute(1, 3, 0, 2, 4).contiguous()
        return packed[:, :, 1].transpose(1, 2)
    if layout == "last stride not 1":
        return x.mT.contiguous().mT
    if layout == "every other element":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "heads of stride 0":
        return x[:, :1].clone().expand(x.shape)
    if layout == "negated view":
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    if layout == "rows 2**26 elements apart":
        assert x.shape[:2] == (1, 1)
        memory = torch.UntypedStorage(
            2**26 * x.shape[2] * x.element_size(), device=x.device
        )  # of which little is touched
        return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, (0, 0, 2**26, 1)).copy_(x)
    assert layout == "contiguous"
    return x


def padding_mask(kind: str, batch: int, length: int) -> Tensor:
    """A key padding mask, (B, L) bool, True = attend."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "right padding":
        for b in range(batch):
            mask[b, length - (b + 1) * length // 4 :] = False
    elif kind == "left padding":
        mask[:, : length // 3] = False
    elif kind == "a key to each side of panels of 16":
        mask[:, :15] = False
        mask[0, 33:] = False
        mask[1:, 65:] = False
    elif kind in ("holes", "holes, not contiguous"):
        mask[:, 1::3] = False
        mask[0, length // 2 : length // 2 + 20] = False
    else:
        assert kind == "one sequence has no key"
        mask[0] = False
    return torch.stack([mask, ~mask], dim=-1)[..., 0] if kind.endswith("not contiguous") else mask


DROPOUT_SEED = 11


def results_of(call: Call, backend: str) -> Results:
    """The output, log-sum-exp and every gradient of a call on a backend.

    It is deterministic only if the case asks for it.
    """
    torch.manual_seed(DROPOUT_SEED)
    options = {"deterministic": False, **call.options}  # the fixture `poisoned_memory` turns torch's own switch on
    inputs = (call.q, call.k, call.v, call.bias)
    out, lse = offset_bias_attention(*inputs, **options, bias_gate=call.gate, return_lse=True, backend=backend)
    leaves = [x for x in (*inputs, call.gate) if x is not None]
    outputs, incoming = ([out], [call.dout]) if call.dlse is None else ([out, lse], [call.dout, call.dlse])
    return Results(out, lse, *torch.autograd.grad(outputs, leaves, incoming))


@torch.no_grad()
def assert_matches_oracle(call: Call, got: Results) -> None:
    """Asserts that all results of `got` obey the tolerance rule."""
    inputs = (call.q, call.k, call.v, call.bias)
    options = {name: x for name, x in call.options.items() if name not in ("deterministic", "dropout_p")}
    options["bias_gate"] = call.gate
    if "dropout_p" in call.options:
        torch.manual_seed(DROPOUT_SEED)
        shape = (*call.q.shape[:3], call.k.shape[2])
        options["factors"] = dropout_factors(call.options["dropout_p"], shape)
    keywords = {**options, "dout": call.dout, "dlse": call.dlse}
    ref64, same = oracle(*inputs, **keywords), oracle(*inputs, **keywords, dtype=call.q.dtype)
    real = torch.promote_types(call.q.dtype, torch.float32)
    if real != call.q.dtype:  # the log-sum-exp is float32 for half inputs, and as accurate
        same.lse = oracle(*inputs, **options, dtype=real).lse
    assert got.out.dtype == call.q.dtype
    assert got.lse.dtype == real
    for name in GATED_NAMES:
        truth = getattr(ref64, name)
        if truth is None:
            continue
        value = getattr(got, name)
        eps = torch.finfo(value.dtype).eps
        eps = max(eps, torch.finfo(call.q.dtype).eps) if name in ("dbias", "dgate") else eps
        # The float64 truth rounds as float64 results do. It cannot tell plain PyTorch's error.
        eps = 8 * eps if call.q.dtype == torch.float64 else eps
        summed = {"dbias": ref64.summed, "dgate": ref64.summed_gate}.get(name)
        assert_accurate(name, value, truth, getattr(same, name), eps, summed)
