"""The specification: dense attention in plain PyTorch, differentiated by torch's own autograd.

    S = scale * Q K^T + b[offset]        O = softmax(S) V        lse = log sum exp S

It stores every score. It works on any device, in any float dtype up to float64; half precision is computed in float32.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from triton_offset_bias import dropout, table
from triton_offset_bias.autocast import has_autocast
from triton_offset_bias.backends.merging import add_part
from triton_offset_bias.checks.data import check_data, query_starts, sequences
from triton_offset_bias.problem import DIFFERENTIABLE, Problem

PROPERTIES = {
    "serves": "tensors on any device; float16, bfloat16, float32, float64; any head dim",
    "options and packed sequences": "all",
    "runs on": "anything torch runs on",
    "memory": "O(Lq Lk)",
    "few queries against a long key cache": "like any other call",
    "same bits in repeated runs": "where torch's operators give them",
    "`torch.compile(fullgraph=True)`, `torch.export`, autocast, checkpointing": "yes",
    "second derivatives, forward mode, `torch.func`": "yes",
}


def build_description() -> str:
    """Says, for people, what this backend is built for here."""
    return "plain PyTorch, wherever torch runs"


def unavailable_reasons() -> list[str]:
    """An empty list, because this backend serves calls on every machine."""
    return []


def unsupported_reasons(problem: Problem) -> list[str]:
    """An empty list, because this backend serves every problem."""
    return []


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Computes output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq), differentiable as often as torch's operators are."""
    check_data(problem)
    out, lse = _any_attention(problem)
    return out.to(problem.query.dtype), lse


def forward_part(problem: Problem, acc: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Adds the keys of `problem` to the softmax of rows that may have attended to other keys."""
    with torch.no_grad():
        out, lse = _any_attention(problem)
        has_keys = lse != float("-inf")
        add_part(acc, row_max, row_sum, out, lse / math.log(2), has_keys.to(lse.dtype))


def backward_part(
    problem: Problem,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dbias: Tensor | None,
    dgate: Tensor | None,
) -> None:
    """Adds a part's gradients to the last five tensors.

    The whole's output is the sum of the parts' outputs with the weights exp(lse of the part - lse of the whole).
    """
    leaves = {name: x.detach().requires_grad_() for name in DIFFERENTIABLE if (x := getattr(problem, name)) is not None}
    with torch.enable_grad():
        part_out, part_lse = _any_attention(problem._replace(**leaves))
    is_empty = (row_sum == 0) | (part_lse == float("-inf"))
    weight = torch.exp(part_lse.detach() - math.log(2) * (row_max + row_sum.log2())).masked_fill(is_empty, 0.0)
    dpart_lse = ((part_out.detach() - out) * dout).sum(-1) + (0.0 if dlse is None else dlse)
    upstream = (weight.unsqueeze(-1) * dout, (weight * dpart_lse).masked_fill(is_empty, 0.0))
    found = torch.autograd.grad((part_out, part_lse), list(leaves.values()), upstream)
    for total, gradient in zip((dquery, dkey, dvalue, dbias, dgate), found, strict=False):
        if total is not None:
            total.add_(gradient)


def _any_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the dtype of the arithmetic."""
    device_type = problem.query.device.type
    with torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext():
        return _attention(problem) if problem.cu_seqlens_q is None else _packed_attention(problem)


def _packed_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of packed sequences, computed one sequence at a time."""
    bias, gate, results = problem.bias, problem.bias_gate, []
    placed = zip(sequences(problem), query_starts(problem), strict=True)
    for index, ((first_q, first_k, len_q, len_k), start) in enumerate(placed):
        sequence = problem._replace(
            query=problem.query.narrow(2, first_q, len_q),
            key=problem.key.narrow(2, first_k, len_k),
            value=problem.value.narrow(2, first_k, len_k),
            bias=bias[index : index + 1] if bias is not None and problem.has_table_per_sequence else bias,
            bias_gate=None if gate is None else gate.narrow(2, first_q, len_q),
            query_start=start,
        )
        results.append(_attention(sequence, index))
    if not results:
        heads, dim_v = problem.query.shape[1], problem.value.shape[3]
        compute = torch.promote_types(problem.query.dtype, torch.float32)
        return problem.query.new_zeros(1, heads, 0, dim_v), problem.query.new_zeros(1, heads, 0, dtype=compute)
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _attention(problem: Problem, sequence: int = 0) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one batch of sequences; dropout counts them from `sequence` on."""
    compute = torch.promote_types(problem.query.dtype, torch.float32)
    batch, heads, len_q, _ = problem.query.shape
    groups = heads // max(problem.key.shape[1], 1)
    query = problem.query.to(compute)  # (B, Hq, Lq, D)
    key = problem.key.to(compute).repeat_interleave(groups, dim=1)  # (B, Hq, Lk, D)
    value = problem.value.to(compute).repeat_interleave(groups, dim=1)  # (B, Hq, Lk, Dv)
    if problem.key_lengths is not None:  # keys and values beyond may hold any numbers, NaN included
        beyond = ~_existing(problem)[:, None, :, None]
        key, value = key.masked_fill(beyond, 0.0), value.masked_fill(beyond, 0.0)

    offsets = _offsets(problem)  # (Lq, Lk) or (B, Lq, Lk)
    attended = _attended(problem, offsets)  # broadcasts to (B, Hq, Lq, Lk)
    scores = problem.scale * (query @ key.mT)  # (B, Hq, Lq, Lk)
    if problem.bias is not None:
        scores = scores + _dense_bias(problem, offsets, compute)
    scores = scores.masked_fill(~attended, float("-inf"))

    # A row with nothing to attend to has maximum -inf and sum 0: its output is 0, its lse -inf, its gradients 0,
    # whatever the values and the incoming gradients are.
    row_max = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    row_max = row_max.masked_fill(row_max == float("-inf"), 0.0)
    exps = torch.exp(scores - row_max)
    row_sum = exps.sum(-1, keepdim=True)
    is_empty = row_sum == 0
    row_sum = row_sum.masked_fill(is_empty, 1.0)
    lse = (row_sum.log() + row_max).masked_fill(is_empty, float("-inf")).squeeze(-1)
    probs = exps / row_sum
    if problem.seed is not None:
        place = None if problem.dropout_place is None else dropout.Place(*problem.dropout_place)
        kept = dropout.kept(problem.seed, problem.dropout_p, sequence, batch, heads, len_q, key.shape[2], place)
        probs = probs * kept * dropout.kept_scale(problem.dropout_p)
    return (probs @ value).masked_fill(is_empty, 0.0), lse


def _dense_bias(problem: Problem, offsets: Tensor, compute: torch.dtype) -> Tensor:
    """The bias of every pair; broadcasts to (B, Hq, Lq, Lk)."""
    bias, gate = problem.bias, problem.bias_gate
    assert bias is not None
    bias = bias.to(compute)
    while bias.dim() < (3 if gate is None else 4):
        bias = bias.unsqueeze(0)
    if gate is None:
        return table.dense_bias(bias, offsets, problem.bias_origin, problem.beyond)
    return table.dense_gated_bias(bias, gate.to(compute), offsets, problem.bias_origin, problem.beyond)


def _offsets(problem: Problem) -> Tensor:
    device = problem.query.device
    if problem.query_positions is not None and problem.key_positions is not None:
        return table.dense_offsets(problem.query_positions.long(), problem.key_positions.long())
    query_positions = torch.arange(problem.query.shape[2], device=device) + problem.query_start
    if problem.key_lengths is not None:
        missing = problem.key.shape[2] - _existing(problem).sum(-1, keepdim=True)
        query_positions = query_positions - missing  # (B, Lq)
    return table.dense_offsets(query_positions, torch.arange(problem.key.shape[2], device=device))


def _existing(problem: Problem) -> Tensor:
    """True for each sequence's first `key_lengths` keys, (B, Lk)."""
    assert problem.key_lengths is not None
    return torch.arange(problem.key.shape[2], device=problem.key.device) < problem.key_lengths.unsqueeze(-1)


def _attended(problem: Problem, offsets: Tensor) -> Tensor:
    attended = (offsets >= problem.min_offset) & (offsets <= problem.max_offset)
    attended = (attended if attended.dim() == 3 else attended.unsqueeze(0)).unsqueeze(1)  # (1 or B, 1, Lq, Lk)
    if problem.is_causal_by_index:
        last_keys = torch.arange(problem.query.shape[2], device=offsets.device) + problem.query_start
        attended = attended & (torch.arange(problem.key.shape[2], device=offsets.device) <= last_keys.unsqueeze(-1))
    if problem.key_padding_mask is not None:
        attended = attended & problem.key_padding_mask[:, None, None, :]
    if problem.key_lengths is not None:
        attended = attended & _existing(problem)[:, None, None, :]
    return attended
