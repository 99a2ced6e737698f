"""The launches of a forward and of a backward pass, and the memory that they allocate."""

import torch
import triton
from torch import Tensor

from triton_offset_bias.backends.triton import configs, strip
from triton_offset_bias.backends.triton.call import Call, padded
from triton_offset_bias.backends.triton.dbias_sum import DbiasSum
from triton_offset_bias.backends.triton.kernels.arguments import Outputs, Parts, Rows, Strides
from triton_offset_bias.backends.triton.kernels.backward_bias import dbias_kernel
from triton_offset_bias.backends.triton.kernels.backward_keys import dkey_dvalue_kernel
from triton_offset_bias.backends.triton.kernels.backward_queries import dquery_kernel
from triton_offset_bias.backends.triton.kernels.decode import combine_kernel, decode_kernel
from triton_offset_bias.backends.triton.kernels.forward import forward_kernel
from triton_offset_bias.backends.triton.kernels.prepare import prepare_kernel
from triton_offset_bias.backends.triton.launch import run_kernel
from triton_offset_bias.backends.triton.target import multiprocessors
from triton_offset_bias.problem import Problem

_PREPARE_ROWS = 64
_NO_STRIDES = Strides(0, 0, 0, 0)  # of tensors that are not written


def forward(problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Writes the output, the log-sum-exp in nats, the rows' maximum in bits, and the rows' sum."""
    call = Call(problem)
    call.start()
    outputs = Outputs(out, row_max, row_sum, lse)
    if problem.seed is None and configs.is_decode(call.group * call.len_q, call.len_k):
        _launch_decode(call, outputs)
    else:
        _launch_forward(call, outputs)
    call.strip.add_constants(lse)


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
    *,
    needs_dbias: bool,
) -> Tensor | None:
    """Writes the gradients that are not None, and returns the table's gradient if it is needed."""
    call = Call(problem)
    call.start()
    needs_dbias = needs_dbias and problem.bias is not None
    is_by_tiles = needs_dbias and problem.deterministic and problem.query_positions is None
    dout, rows = _launch_prepare(call, out, row_max, row_sum, dout, dlse)
    added = DbiasSum(call, row_sum, dout, dlse) if needs_dbias and not is_by_tiles else None
    if dquery is not None or added is not None:
        _launch_dquery(call, dout, rows, dquery, added)
    if dkey is not None or dvalue is not None:
        _launch_dkey_dvalue(call, dout, rows, dkey, dvalue)
    if is_by_tiles:
        return strip.fold_offsets(problem, _launch_dbias(call, dout, rows), problem.reachable_offsets[0])
    return None if added is None else call.strip.fold(added.total())


def _launch_forward(call: Call, outputs: Outputs) -> None:
    has_positions = call.problem.query_positions is not None
    config = configs.forward_config(call.target, call.problem.query.dtype, call.block_d, has_positions)
    arguments = (
        call.inputs, outputs,
        *call.input_strides, call.strides(outputs.out), call.shared_strides,
        call.sizes, call.strip.bounds, call.scale_log2, call.largest_dropped, call.kept_scale,
    )  # fmt: skip
    blocks = (call.batch * call.num_heads, call.len_q, "BLOCK_M")
    run_kernel(forward_kernel, config, blocks, "len_k", arguments, {"FORM": call.form, "LOOPS": call.loops})


def _launch_decode(call: Call, outputs: Outputs) -> None:
    """Launches the forward pass of few queries, with the keys split among programs."""
    out = outputs.out
    config = configs.decode_config(call.target, out.dtype, call.block_d, call.group * call.len_q)
    key_heads = call.batch * call.num_heads // call.group
    splits = configs.num_splits(key_heads, call.len_k, multiprocessors(out.device))
    rows, counts = (splits, call.batch, call.num_heads, call.len_q), (call.batch, splits)
    shapes = Parts(acc=(*rows, out.shape[3]), max=rows, sum=rows)
    parts = Parts(*(outputs.lse.new_empty(shape, dtype=torch.float32) for shape in shapes))
    arguments = (
        call.inputs, parts,
        *call.input_strides, call.shared_strides,
        call.sizes, call.strip.bounds, call.scale_log2, *counts,
    )  # fmt: skip
    constants = {"FORM": call.form, "LOOPS": call.loops}
    run_kernel(decode_kernel, config, (key_heads * splits, 1, "BLOCK_M"), "len_k", arguments, constants)
    block_s = triton.next_power_of_2(splits)
    combine_kernel[(call.batch * call.num_heads * call.len_q,)](
        parts, call.inputs.cu_seqlens_q, outputs, call.strides(out),
        call.num_heads, call.len_q, out.shape[2], *counts,
        HEAD_DIM_V=out.shape[3], BLOCK_DV=padded(out), IS_PACKED=call.is_packed, BLOCK_S=block_s,
        num_warps=configs.combine_warps(block_s, padded(out)), enable_fp_fusion=True,
    )  # fmt: skip


def _launch_prepare(
    call: Call, out: Tensor, row_max: Tensor, row_sum: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Rows]:
    """Launches `prepare_kernel`, and returns dO as the sweeps take it and the `Rows`."""
    rows = Rows(*(torch.empty_like(row_max) for _ in Rows._fields))
    clean_dout = torch.empty_like(dout) if call.strip.may_leave_rows_empty() else None
    dlse = None if dlse is None else dlse.float().contiguous()
    batch, heads, length = row_max.shape
    prepare_kernel[(batch * heads * -(-length // _PREPARE_ROWS),)](
        out, dout, dlse, row_max, row_sum,
        rows, clean_dout,
        call.strides(out), call.strides(dout), _NO_STRIDES if clean_dout is None else call.strides(clean_dout),
        heads, length,
        HEAD_DIM_V=out.shape[3], BLOCK_DV=padded(out), HAS_DLSE=dlse is not None,
        CLEAN_DOUT=clean_dout is not None, SPLIT_LSE=call.form.SPLIT_LSE, BLOCK_M=_PREPARE_ROWS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return dout if clean_dout is None else clean_dout, rows


def _launch_dquery(call: Call, dout: Tensor, rows: Rows, dquery: Tensor | None, added: DbiasSum | None) -> None:
    """Launches `dquery_kernel`, which writes dQ and adds to the strip's gradient, each where it is not None."""
    config = configs.dquery_config(call.target, dout.dtype, call.block_d)
    unit, sums = (None, None) if added is None else (added.unit, added.sums)
    arguments = (
        call.inputs, dout, rows, unit, dquery, sums,
        *call.input_strides, call.strides(dout), _NO_STRIDES if dquery is None else call.strides(dquery),
        call.shared_strides,
        call.sizes, call.strip.bounds, call.scale, call.scale_log2, call.largest_dropped, call.kept_scale,
    )  # fmt: skip
    outputs = {"HAS_DQ": dquery is not None, "DBIAS": "none" if added is None else added.how}
    constants = {"FORM": call.form, "LOOPS": call.loops, **outputs}
    blocks = (call.batch * call.num_heads, call.len_q, "BLOCK")
    run_kernel(dquery_kernel, config, blocks, "len_k", arguments, constants, added_to="dstrip_ptr")
    if dquery is not None and call.query_factor != 1.0:
        dquery.mul_(call.query_factor)


def _launch_dkey_dvalue(call: Call, dout: Tensor, rows: Rows, dkey: Tensor | None, dvalue: Tensor | None) -> None:
    """Launches `dkey_dvalue_kernel`, which writes dK and dV, each where it is not None."""
    config = configs.dkey_dvalue_config(call.target, dout.dtype, call.block_d)
    arguments = (
        call.inputs, dout, rows, dkey, dvalue,
        *call.input_strides, call.strides(dout),
        *(_NO_STRIDES if x is None else call.strides(x) for x in (dkey, dvalue)),
        call.shared_strides,
        call.sizes, call.strip.bounds, call.scale, call.scale_log2, call.largest_dropped, call.kept_scale,
    )  # fmt: skip
    outputs = {"HAS_DK": dkey is not None, "HAS_DV": dvalue is not None}
    constants = {"FORM": call.form, "LOOPS": call.loops, **outputs}
    blocks = (call.batch * call.problem.key.shape[1], call.len_k, "BLOCK_N")
    run_kernel(dkey_dvalue_kernel, config, blocks, "len_q", arguments, constants)


def _launch_dbias(call: Call, dout: Tensor, rows: Rows) -> Tensor:
    """The gradient of every offset, (1 or B, 1 or H, offsets), with all sums in a fixed order."""
    assert call.strip.values is not None
    config = configs.dquery_config(call.target, dout.dtype, call.block_d)
    bias_batch, bias_heads = call.strip.values.shape[:2]
    block = config.block_m
    lowest, highest = strip.counted_reach(call.problem)
    first_distance = lowest // block
    distances = -(-highest // block) - first_distance + 1
    parts = call.strip.values.new_empty(bias_batch, bias_heads, distances, 2, block)
    dbias_kernel[(bias_batch * bias_heads * distances,)](
        call.inputs, dout, rows, parts,
        *call.input_strides, call.strides(dout), call.shared_strides,
        call.sizes, call.strip.bounds, call.scale_log2, call.largest_dropped, call.kept_scale,
        call.batch, bias_batch, bias_heads, first_distance, distances,
        FORM=call.form, BLOCK=block, **config.options,
    )  # fmt: skip
    doffsets = parts.new_zeros(bias_batch, bias_heads, distances + 1, block)
    doffsets[:, :, :-1] += parts[:, :, :, 0]
    doffsets[:, :, 1:] += parts[:, :, :, 1]
    first = lowest - (first_distance - 1) * block
    return doffsets.flatten(2)[..., first : first + highest - lowest + 1]
