"""Calls that are spread over ranks, and their comparison with one process."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import DROPOUT_SEED, Call, Case, assert_matches_oracle, build
from oracle import GATED_NAMES, Results, oracle
from philox import dropout_factors
from torch import Tensor

from triton_offset_bias import distributed

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def _case(reason: str, **others: Any) -> Case:
    """A small call in float64. Twelve heads divide among 1 to 4 ranks."""
    made = {"lengths": (96, 96), "dims": (8, 12), "heads": (12, 12), "dtype": F64, "bias_dtype": F64} | others
    return Case(reason, through_lse=True, **made)


CAUSAL = {"is_causal": True}
CASES = [
    _case("full"),
    _case("causal", options=CAUSAL),
    _case("causal window", options={**CAUSAL, "window_size": (20, -1)}),
    _case("window on both sides", options={"window_size": (7, 5)}),
    _case("window to the right", options={"window_size": (3, 70)}),
    _case("grouped heads", heads=(12, 4), options=CAUSAL),
    _case("one key head", heads=(12, 1)),
    _case("padding", mask="holes"),
    _case("padding, a sequence without keys, causal", mask="one sequence has no key", options=CAUSAL),
    _case("clamped table", columns=41),
    _case("zeros beyond the table", columns=41, options={"beyond": "zero"}),
    _case("zeros, origin", columns=17, options={**CAUSAL, "beyond": "zero", "bias_origin": 3}),
    _case("every offset is in the table", options={**CAUSAL, "beyond": "error"}),
    _case("no table", bias=None, options=CAUSAL),
    _case("one table for all heads", bias="N"),
    _case("a table for each sequence", bias="BHN", options=CAUSAL),
    _case("one for all heads of a sequence", bias="B1N"),
    _case("lengths that ranks do not divide", lengths=(97, 97), options=CAUSAL),
    _case("cross", lengths=(50, 83), columns=201),
    _case("cross, more queries, a window", lengths=(83, 50), options={**CAUSAL, "window_size": (11, -1)}),
    _case("queries begin before keys", lengths=(64, 96), columns=301, options={**CAUSAL, "query_start": -20}),
    _case("few tokens", lengths=(5, 5), options=CAUSAL),
    _case("ranks without tokens", lengths=(1, 3)),
    _case("numbers that forbid", forbidden=tuple(range(95, 110)), options=CAUSAL),
    _case("negative scale", options={"scale": -0.3}),
    _case("memory as (B, L, H, D)", layout="transposed BLHD", options=CAUSAL),
    _case("positions in another order", options={**CAUSAL, "query_positions": torch.arange(96).flip(0),
                                                 "key_positions": torch.arange(96).flip(0)}),
    _case("positions of each sequence", lengths=(40, 61),
          options={"query_positions": torch.arange(80).view(2, 40) % 53,
                   "key_positions": torch.arange(122).view(2, 61) % 47, "window_size": (30, 25)}),
    _case("dropout", lengths=(61, 83), heads=(12, 4), options={"dropout_p": 0.3, **CAUSAL}),
    _case("a gate, causal", rank=0, columns=150, options=CAUSAL),
    _case("a gate of rank 3, a window", lengths=(97, 97), rank=3, columns=41, options={"window_size": (20, 9)}),
    _case("a gate, one table for all heads, dropout", lengths=(61, 83), heads=(12, 4), bias="N", rank=2,
          options={"dropout_p": 0.3}),
    _case("a gate, a table for each sequence", bias="BHN", rank=2, options={"beyond": "zero"}, columns=31),
    _case("a gate and positions", rank=3, columns=61, options={"query_positions": torch.arange(96).flip(0),
                                                               "key_positions": torch.arange(96) * 5 % 61}),
    *(_case(f"{name} {str(dtype)[6:]}", dtype=dtype, bias_dtype=F32, **others)
      for dtype in (F32, BF16)
      for name, others in {
          "causal": {"options": CAUSAL},
          "grouped heads, padding": {"heads": (12, 4), "mask": "holes", "options": CAUSAL},
          "uneven window": {"lengths": (97, 97), "options": {"window_size": (9, 6)}},
          "gated": {"rank": 1, "heads": (12, 4), "columns": 81, "options": CAUSAL},
      }.items()),
    _case("float16", dtype=F16, bias_dtype=F32, options=CAUSAL),
    _case("bfloat16 table", dtype=BF16, bias_dtype=BF16, options=CAUSAL),
    _case("dropout float32", lengths=(33, 50), heads=(4, 2), dtype=F32, bias_dtype=F32,
          options={"dropout_p": 0.3, **CAUSAL}),
    _case("long bfloat16", lengths=(400, 400), heads=(4, 4), dtype=BF16, bias_dtype=F32, batch=1),
]  # fmt: skip
# These cases run on the reference backend too.
ON_REFERENCE = {
    "causal",
    "window on both sides",
    "padding, a sequence without keys, causal",
    "dropout",
    "causal bfloat16",
    "a gate of rank 3, a window",
}


ON_TRITON = {
    "causal float32",
    "gated float32",
    "grouped heads, padding float32",
    "uneven window bfloat16",
    "dropout float32",
}


def spread_results(call: Call, attend: Callable, group: Any, layout: str, **others: Any) -> Results:
    """The whole's results, from all ranks' parts. The shares of the table's gradient are added up."""
    lengths = call.q.shape[2], call.k.shape[2]
    options = dict(call.options)
    for name in ("key_padding_mask", "query_positions", "key_positions"):
        if options.get(name) is not None:
            options[name] = distributed.shard(options[name], -1, group, layout)

    def cut(x: Tensor) -> Tensor:
        return distributed.shard(x.detach(), 2, group, layout).requires_grad_()

    leaves = [cut(x) for x in (call.q, call.k, call.v)]
    bias = None if call.bias is None else call.bias.detach().clone().requires_grad_()
    gate = None if call.gate is None else cut(call.gate)
    if gate is not None:
        options["bias_gate"] = gate
    torch.manual_seed(DROPOUT_SEED + dist.get_rank())  # rank 0 has the seed of one process
    options |= {"group": group, "layout": layout, "lengths": lengths, "return_lse": True, **others}
    out, lse = attend(*leaves, bias, **options)
    wanted = [x for x in (*leaves, bias, gate) if x is not None]
    gradients = torch.autograd.grad((out, lse), wanted, (cut(call.dout).detach(), cut(call.dlse).detach()))
    sizes = dict(zip(("out", "lse", "dq", "dk", "dv"), (*lengths[:1] * 3, lengths[1], lengths[1]), strict=True))
    got = dict(zip(sizes, (out, lse, *gradients[:3]), strict=True))
    whole = {name: distributed.unshard(x, 2, sizes[name], group, layout) for name, x in got.items()}
    if gate is not None:
        assert gradients[4].dtype == gate.dtype
        whole["dgate"] = distributed.unshard(gradients[4], 2, lengths[0], group, layout)
    if bias is not None:
        assert gradients[3].dtype == bias.dtype
        whole["dbias"] = gradients[3].double()  # shares add up in the dtype of the user's choice
        dist.all_reduce(whole["dbias"])
    return Results(**whole)


def assert_right(call: Call, got: Results) -> None:
    """The rule of `tolerance`; in float64 an error of 1e-12 of the largest number."""
    if got.out.dtype != F64:
        got.dbias = None if call.bias is None else got.dbias.to(call.bias.dtype)
        assert_matches_oracle(call, got)
        return
    options = {name: x for name, x in call.options.items() if name != "dropout_p"}
    if "dropout_p" in call.options:
        torch.manual_seed(DROPOUT_SEED)
        shape = (*call.q.shape[:3], call.k.shape[2])
        options["factors"] = dropout_factors(call.options["dropout_p"], shape)
    options["beyond"] = {"error": "clamp"}.get(options.get("beyond", "clamp"), options.get("beyond", "clamp"))
    with torch.no_grad():
        inputs = (call.q, call.k, call.v, call.bias)
        truth = oracle(*inputs, bias_gate=call.gate, dout=call.dout, dlse=call.dlse, **options)
    for name in GATED_NAMES:
        expected, value = getattr(truth, name), getattr(got, name)
        if expected is None:
            continue
        assert torch.equal(value.isfinite(), expected.isfinite()), name
        assert torch.equal(
            value.nan_to_num(0, 0, 0)[~expected.isfinite()], expected.nan_to_num(0, 0, 0)[~expected.isfinite()]
        )
        error = (value - expected)[expected.isfinite()].abs()
        sums = {"dbias": truth.summed, "dgate": truth.summed_gate}
        size = sums[name] if name in sums else expected[expected.isfinite()].abs()
        largest = max([1.0, *([float(size.max())] if size.numel() else [])])
        assert not error.numel() or float(error.max()) <= 1e-12 * largest, f"{name}: {float(error.max()):.1e}"
        assert not math.isnan(float(error.sum())), name


def built(case: Case) -> Call:
    """The tensors of a case, on every rank the same."""
    return build(case)
