"""The launches of a forward and of a backward pass, and the memory that they allocate."""

import torch
import triton.language as tl
from torch import Tensor

from triton_offset_bias.backends.triton import configs, hopper
from triton_offset_bias.backends.triton.call import Call
from triton_offset_bias.backends.triton.dbias_sum import DbiasSum, fold_offsets, fold_strip
from triton_offset_bias.backends.triton.kernels.arguments import (
    Outputs,
    Parts,
    QueryGradients,
    Rows,
    Sums,
    TableRows,
    Wanted,
    constants,
)
from triton_offset_bias.backends.triton.kernels.backward_bias import dbias_kernel
from triton_offset_bias.backends.triton.kernels.backward_keys import dkey_dvalue_kernel
from triton_offset_bias.backends.triton.kernels.backward_queries import dquery_kernel
from triton_offset_bias.backends.triton.kernels.decode import combine_kernel, decode_kernel
from triton_offset_bias.backends.triton.kernels.forward import forward_kernel
from triton_offset_bias.backends.triton.launch import Launch, TunedLaunch, blocked_launch, with_rest
from triton_offset_bias.backends.triton.plan import Plan, padded, plan_of
from triton_offset_bias.backends.triton.prologue import add_constants, prepare_backward, prepare_forward
from triton_offset_bias.backends.triton.strip import counted_reach
from triton_offset_bias.backends.triton.target import multiprocessors
from triton_offset_bias.problem import Problem


def forward(
    problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor, *, is_part: bool = False
) -> None:
    """Writes the output, the log-sum-exp in nats, the rows' maximum in bits, and the rows' sum.

    A part's output is float32, and its rows count from 0.
    """
    call = Call(problem, out, lse, row_max, row_sum, plan=plan_of(problem, is_part=is_part))
    plan, outputs = call.plan, Outputs(out, row_max, row_sum, lse)
    prepare_forward(call, outputs)
    is_plain = problem.seed is None and not problem.is_causal_by_index
    if is_plain and configs.is_decode(plan.group * plan.len_q, plan.len_k):
        _launch_decode(call, outputs)
    elif hopper.is_chosen(call, out):
        hopper.launch_forward(call, outputs)
    else:
        launch = plan.launch((forward_kernel, out.stride()), lambda: _forward_launch(plan, out))
        launch(call.is_aligned, call.inputs, outputs)
    add_constants(call, lse)


def backward(
    problem: Problem,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dgate: Tensor | None = None,
    *,
    needs_dbias: bool,
    is_part: bool = False,
) -> Tensor | None:
    """Writes the gradients that are not None, and returns the table's gradient if it is needed.

    A part's gradients are float32. So is `dgate`, which is contiguous.
    """
    dlse = None if dlse is None else dlse.float().contiguous()
    plan = plan_of(problem, is_part=is_part)
    call = Call(problem, out, row_max, row_sum, dout, dlse, dquery, dkey, dvalue, dgate, plan=plan)
    needs_dbias = needs_dbias and problem.bias is not None
    is_by_tiles = needs_dbias and problem.deterministic and problem.query_positions is None
    added = DbiasSum(call) if needs_dbias and not is_by_tiles else None
    has_keys = dkey is not None or dvalue is not None
    is_whole = dquery is not None and has_keys and _is_one_kernel(call, added)
    dq_sum = torch.empty_like(dquery, dtype=torch.float32) if dquery is not None and is_whole else None
    dout, rows = prepare_backward(call, out, row_max, row_sum, dout, dlse, added, dq_sum)
    if added is not None:
        added.find_unit(row_sum, dout, dlse)
    if not is_whole and any(x is not None for x in (dquery, added, dgate)):
        _launch_dquery(call, dout, rows, dquery, dgate, added)
    if has_keys:
        sums = Sums(dq_sum, added.sums if added is not None and is_whole else None)
        _launch_dkey_dvalue(call, dout, rows, dkey, dvalue, sums)
    if dquery is not None and dq_sum is not None:
        torch.mul(dq_sum, call.plan.factors.scale * call.plan.query_factor, out=dquery)
    if is_by_tiles:
        return fold_offsets(call, _launch_dbias(call, dout, rows), problem.reachable_offsets[0])
    return None if added is None else fold_strip(call, added.total())


def _forward_launch(plan: Plan, out: Tensor) -> Launch | TunedLaunch:
    config = configs.forward_config(plan.target, plan.dtype, plan.block_d, plan.has_positions)
    numbers = (plan.layout(out=out), *plan.integers, plan.factors, plan.dropout)
    blocks = (plan.batch * plan.num_heads, plan.len_q, "BLOCK_M")
    return blocked_launch(forward_kernel, config, blocks, "len_k", numbers, {"FORM": plan.form, "LOOPS": plan.loops})


def _launch_decode(call: Call, outputs: Outputs) -> None:
    """Launches the forward pass of few queries, with the keys split among programs."""
    plan, out = call.plan, outputs.out
    key_heads = plan.batch * plan.key_heads
    splits = configs.num_splits(key_heads, plan.len_k, multiprocessors(out.device))
    rows = (splits, plan.batch, plan.num_heads, plan.len_q)
    shapes = Parts(acc=(*rows, out.shape[3]), max=rows, sum=rows)
    parts = Parts(*(outputs.lse.new_empty(shape, dtype=torch.float32) for shape in shapes))
    launch = plan.launch(decode_kernel, lambda: _decode_launch(plan, splits))
    launch(call.is_aligned, call.inputs, parts)
    launch = plan.launch((combine_kernel, out.stride()), lambda: _combine_launch(plan, out, splits))
    launch(call.is_aligned, parts, call.inputs.cu_seqlens_q, outputs)


def _decode_launch(plan: Plan, splits: int) -> Launch | TunedLaunch:
    config = configs.decode_config(plan.target, plan.dtype, plan.block_d, plan.group * plan.len_q)
    numbers = (plan.layout(), *plan.integers, plan.factors, plan.batch, splits)
    blocks = (plan.batch * plan.key_heads * splits, 1, "BLOCK_M")
    return blocked_launch(decode_kernel, config, blocks, "len_k", numbers, {"FORM": plan.form, "LOOPS": plan.loops})


def _combine_launch(plan: Plan, out: Tensor, splits: int) -> Launch:
    block_s, block_dv = configs.combine_block(splits), padded(out)
    numbers = (plan.strides(out), plan.num_heads, plan.len_q, out.shape[2], plan.batch, splits)
    named = {
        **{"HEAD_DIM_V": out.shape[3], "BLOCK_DV": block_dv, "IS_PACKED": plan.is_packed, "BLOCK_S": block_s},
        **{"num_warps": configs.combine_warps(block_s, block_dv), "enable_fp_fusion": True},
    }
    return Launch(combine_kernel, plan.batch * plan.num_heads * plan.len_q, numbers, named)


def _launch_dquery(
    call: Call, dout: Tensor, rows: Rows, dquery: Tensor | None, dgate: Tensor | None, added: DbiasSum | None
) -> None:
    """Launches `dquery_kernel`, which writes dQ and dgate and adds to the strip's gradient, each where it is not None.

    If there is a gate, the kernel writes dgate, whoever needs it.
    """
    plan = call.plan
    if call.inputs.gate is not None and dgate is None:
        dgate = torch.empty_like(call.inputs.gate)
    unit, sums, how, copy_stride = None, None, "none", 0
    if added is not None:
        unit, sums, how, copy_stride = added.unit, added.sums, added.how, added.copy_stride
    key = (dquery_kernel, dout.stride(), how, None if dquery is None else dquery.stride())
    launch = plan.launch(key, lambda: _dquery_launch(plan, dout, dquery, how, copy_stride))
    launch(call.is_aligned, call.inputs, dout, rows, unit, QueryGradients(dquery, dgate), sums)
    if dquery is not None and plan.query_factor != 1.0:
        dquery.mul_(plan.query_factor)


def _dquery_launch(plan: Plan, dout: Tensor, dquery: Tensor | None, how: str, copy_stride: int) -> Launch | TunedLaunch:
    config = configs.dquery_config(plan.target, plan.dtype, plan.block_d)
    layout = plan.layout(dout=dout, dq=dquery)
    numbers = (layout, *plan.integers, plan.factors, plan.dropout, copy_stride)
    named = {"FORM": plan.form, "LOOPS": plan.loops, "HAS_DQ": dquery is not None, "DBIAS": how}
    blocks = (plan.batch * plan.num_heads, plan.len_q, "BLOCK")
    return blocked_launch(dquery_kernel, config, blocks, "len_k", numbers, named, added_to="dstrip_ptr")


def _is_one_kernel(call: Call, added: DbiasSum | None) -> bool:
    """Whether one kernel is to compute all gradients. Its sums depend on the order of programs."""
    plan, problem = call.plan, call.problem
    if (
        problem.deterministic
        or plan.has_positions
        or problem.bias_gate is not None
        or (added is not None and added.how != "diagonals")
    ):
        return False
    return configs.backward_config(plan.target, plan.dtype, plan.block_d) is not None


def _launch_dkey_dvalue(
    call: Call, dout: Tensor, rows: Rows, dkey: Tensor | None, dvalue: Tensor | None, sums: Sums
) -> None:
    """Launches `dkey_dvalue_kernel`, which writes dK and dV and adds to `sums`, each where it is not None.

    Few key heads have their query heads split among programs, whose float32 parts are added up in one order.
    """
    plan = call.plan
    splits = _key_splits(plan, sums, multiprocessors(dout.device))
    dkeys, dvalues = _parts_of(dkey, splits), _parts_of(dvalue, splits)
    strides = (None if x is None else x.stride() for x in (dkeys, dvalues, sums.dq))
    launch = plan.launch(
        (dkey_dvalue_kernel, splits, dout.stride(), sums.dstrip is None, *strides),
        lambda: _dkey_dvalue_launch(plan, dout, dkeys, dvalues, sums, splits),
    )
    launch(call.is_aligned, call.inputs, dout, rows, dkeys, dvalues, sums)
    for gradient, parts in ((dkey, dkeys), (dvalue, dvalues)):
        if gradient is not None and parts is not None and splits > 1:
            gradient.copy_(parts.unflatten(1, (-1, splits)).sum(2))


def _parts_of(gradient: Tensor | None, splits: int) -> Tensor | None:
    """Memory for the parts of a gradient; with one split it is the gradient's own."""
    if gradient is None or splits == 1:
        return gradient
    batch, heads, *shape = gradient.shape
    return gradient.new_empty(batch, heads * splits, *shape, dtype=torch.float32)


def _key_splits(plan: Plan, sums: Sums, multiprocessors: int) -> int:
    block = _keys_config(plan, sums).block_n
    return configs.num_parts(plan.batch * plan.key_heads * -(-plan.len_k // block), plan.group, multiprocessors)


def _keys_config(plan: Plan, sums: Sums) -> configs.Config:
    whole = None if sums.dq is None else configs.backward_config(plan.target, plan.dtype, plan.block_d)
    return whole or configs.dkey_dvalue_config(plan.target, plan.dtype, plan.block_d)


def _dkey_dvalue_launch(
    plan: Plan, dout: Tensor, dkey: Tensor | None, dvalue: Tensor | None, sums: Sums, splits: int
) -> Launch | TunedLaunch:
    form = plan.form
    if sums.dq is not None:
        form = form._replace(WAIT=tl.constexpr(configs.needs_wait(plan.target, plan.dtype, is_whole=True)))
    wanted = Wanted(*constants(x is not None for x in (sums.dq, dkey, dvalue, sums.dstrip)))
    layout = plan.layout(dout=dout, dq=sums.dq, dk=dkey, dv=dvalue)
    numbers = (layout, *plan.integers, plan.factors, plan.dropout, splits)
    named = {"FORM": form, "LOOPS": plan.loops, "WANTED": wanted}
    blocks = (plan.batch * plan.key_heads * splits, plan.len_k, "BLOCK_N")
    config = _keys_config(plan, sums)
    return blocked_launch(dkey_dvalue_kernel, config, blocks, "len_q", numbers, named, added_to="sums")


def _launch_dbias(call: Call, dout: Tensor, rows: Rows) -> Tensor:
    """The gradient of every offset, (1 or B, 1 or H, offsets), with all sums in a fixed order."""
    assert call.strip is not None
    plan = call.plan
    config = configs.dquery_config(plan.target, plan.dtype, plan.block_d)
    bias_batch, bias_heads = plan.strip.shape[:2]
    block = config.block_m
    lowest, highest = counted_reach(call.problem)
    first_distance = lowest // block
    distances = -(-highest // block) - first_distance + 1
    programs = bias_batch * bias_heads * distances
    tiles = plan.num_heads // bias_heads * -(-min(plan.len_q, plan.len_k) // block)  # the most of one sequence
    splits = configs.num_parts(programs, tiles, multiprocessors(dout.device))
    parts = call.strip.new_empty(splits, bias_batch, bias_heads, distances, 2, block)

    def make() -> Launch:
        diagonals = (plan.batch, TableRows(bias_batch, bias_heads), first_distance, distances, splits)
        numbers = (plan.layout(dout=dout), *plan.integers, plan.factors, plan.dropout, *diagonals)
        known = {"FORM": plan.form, "LOOPS": plan.loops, "BLOCK": block, "len_q": plan.len_q, "len_k": plan.len_k}
        loops = with_rest(known, "len_k")
        named = {"FORM": plan.form, "LOOPS": loops, "BLOCK": block, **config.options}
        return Launch(dbias_kernel, programs * splits, numbers, named)

    launch = plan.launch((dbias_kernel, splits, dout.stride()), make)
    launch(call.is_aligned, call.inputs, dout, rows, parts)
    parts = parts[0] if splits == 1 else parts.sum(0)
    doffsets = parts.new_zeros(bias_batch, bias_heads, distances + 1, block)
    doffsets[:, :, :-1] += parts[:, :, :, 0]
    doffsets[:, :, 1:] += parts[:, :, :, 1]
    first = lowest - (first_distance - 1) * block
    return doffsets.flatten(2)[..., first : first + highest - lowest + 1]
