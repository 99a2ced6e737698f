"""The GPU backend: reasons not to serve, allocation and launches. The kernels are in `forward` and `backward`.

CPU tensors are served where Triton can run on them: in its interpreter (`TRITON_INTERPRET=1`), or by a driver whose
device is the CPU.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from triton_offset_bias.backends.limits import exceeded_limits
from triton_offset_bias.problem import Problem

try:
    import triton

    from triton_offset_bias.backends.triton import configs, strip
    from triton_offset_bias.backends.triton.backward import dquery_kernel, prepare_kernel
    from triton_offset_bias.backends.triton.backward_bias import dbias_kernel
    from triton_offset_bias.backends.triton.backward_keys import dkey_dvalue_kernel
    from triton_offset_bias.backends.triton.call import Call, or_dummy, padded
    from triton_offset_bias.backends.triton.dbias_sum import DbiasSum
    from triton_offset_bias.backends.triton.decode import combine_kernel, decode_kernel
    from triton_offset_bias.backends.triton.forward import forward_kernel
    from triton_offset_bias.backends.triton.launch import run_kernel
    from triton_offset_bias.backends.triton.target import device_types, multiprocessors, shared_memory, target

    _WHY_NOT = ""
except ImportError as error:  # there is no Triton for this platform
    _WHY_NOT = f"Triton could not be imported: {error}"

PROPERTIES = {
    "serves": "CUDA and ROCm tensors; float16, bfloat16, float32; head dims 1 to 256",
    "options and packed sequences": "all",
    "runs on": "NVIDIA and AMD GPUs (compiled for both; no device has run it yet, see Limits)",
    "memory": "O(Lq + Lk)",
    "few queries against a long key cache": "keys split among programs",
    "same bits in repeated runs": "with `deterministic`",
    "`torch.compile(fullgraph=True)`, `torch.export`, autocast, checkpointing": "yes",
    "second derivatives, forward mode, `torch.func`": "no (a clear error)",
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PREPARE_ROWS = 64


def build_description() -> str:
    """What this backend is built for here, for people."""
    if _WHY_NOT:
        return "not built"
    return f"Triton {triton.__version__}, {target() or 'no device'}"


def unavailable_reasons() -> list[str]:
    """Why this backend cannot serve any call here."""
    if _WHY_NOT:
        return [_WHY_NOT]
    return [] if target() else ["Triton finds no GPU and its interpreter is off (TRITON_INTERPRET=1 turns it on)"]


def _problem_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot serve `problem` on any machine."""
    dtype = problem.query.dtype
    wrong = [] if dtype in _DTYPES else [f"serves float16, bfloat16 and float32, got {dtype}"]
    return wrong + exceeded_limits(problem)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot serve `problem` here."""
    reasons = unavailable_reasons()
    query = problem.query
    if not reasons and query.device.type not in device_types():
        reasons.append(f"serves {' and '.join(device_types())} tensors here, got {query.device.type}")
    elif not reasons and query.dtype == torch.float32 and max(query.shape[3], problem.value.shape[3]) > 128:
        needed, there = configs.least_shared_memory(torch.float32, 256), shared_memory()
        if needed > there:
            reasons.append(
                f"head dims above 128 in float32 need {needed} bytes of shared memory, this device has {there}"
            )
    return reasons + _problem_reasons(problem)


def forward(problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Writes the output, the log-sum-exp in nats, and the rows' maximum in bits and sum, which backward wants again.

    The last two are of the table less `strip.constants_of`.
    """
    with _device_of(out):
        call = Call(problem)
        if problem.seed is None and configs.is_decode(call.group * call.len_q, call.len_k):
            _decode(call, out, lse, row_max, row_sum)
        else:
            _forward(call, out, lse, row_max, row_sum)
    if call.constants_of_rows is not None:
        strip.add_constants(problem, call.constants_of_rows, lse)


def _forward(call: Call, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    problem = call.problem
    has_positions = problem.query_positions is not None
    config = configs.forward_config(call.target, problem.query.dtype, call.block_d, has_positions)
    arguments = (
        *call.inputs,
        out, row_max, row_sum, lse,
        *call.input_strides, *call.strides(out), *call.shared_strides,
        *call.sizes, *call.bounds, call.scale_log2, *call.dropout,
    )  # fmt: skip
    blocks = (call.batch * call.num_heads, call.len_q, "BLOCK_M")
    run_kernel(forward_kernel, config, blocks, arguments, {**call.constants, **call.loops})


def _decode(call: Call, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """The same of few queries, with the keys split among programs."""
    config = configs.decode_config(call.target, out.dtype, call.block_d, call.group * call.len_q)
    key_heads = call.batch * call.num_heads // call.group
    splits = configs.num_splits(key_heads, call.len_k, multiprocessors(out.device))
    rows, counts = (splits, call.batch, call.num_heads, call.len_q), (call.batch, splits)
    parts = [lse.new_empty(shape, dtype=torch.float32) for shape in ((*rows, out.shape[3]), rows, rows)]
    arguments = (
        *call.inputs[:-1],
        *parts,
        *call.input_strides, *call.shared_strides,
        *call.sizes, *call.bounds, call.scale_log2, *counts,
    )  # fmt: skip
    constants = {name: x for name, x in call.constants.items() if name != "DROPOUT_ROUNDS"}
    block_s = triton.next_power_of_2(splits)
    run_kernel(decode_kernel, config, (key_heads * splits, 1, "BLOCK_M"), arguments, {**constants, **call.loops})
    combine_kernel[(call.batch * call.num_heads * call.len_q,)](
        *parts, call.inputs[7],
        out, row_max, row_sum, lse,
        *call.strides(out),
        call.num_heads, call.len_q, out.shape[2], *counts,
        HEAD_DIM_V=out.shape[3], BLOCK_DV=padded(out), IS_PACKED=call.is_packed, BLOCK_S=block_s,
        num_warps=configs.combine_warps(block_s, padded(out)), enable_fp_fusion=True,
    )  # fmt: skip


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
    needs_dbias: bool,
) -> Tensor | None:
    """Writes the gradients that are not None, and returns that of the table if it is needed."""
    with _device_of(out):
        call = Call(problem)
        needs_dbias = needs_dbias and call.strip is not None
        is_by_tiles = needs_dbias and problem.deterministic and problem.query_positions is None
        dout, *rows = _prepare(call, out, row_max, row_sum, dout, dlse)
        added = DbiasSum(call, row_sum, dout, dlse) if needs_dbias and not is_by_tiles else None
        if dquery is not None or added is not None:
            _sweep_keys(call, dout, rows, dquery, added)
        if dkey is not None or dvalue is not None:
            _sweep_queries(call, dout, rows, dkey, dvalue)
        if is_by_tiles:
            doffsets = _sum_diagonals_of_tiles(call, dout, rows)
            return strip.fold_offsets(problem, doffsets, problem.reachable_offsets[0])
        return None if added is None else strip.fold_strip(problem, call.bounds, added.total())


def _prepare(
    call: Call, out: Tensor, row_max: Tensor, row_sum: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dO as the sweeps want it, and three of (B, H, M) float32: the log-sum-exp in bits, the log of the sum, delta."""
    lse_bits, log_sum, delta = (torch.empty_like(row_max) for _ in range(3))
    is_cleaned = strip.may_leave_rows_empty(call.problem, call.bounds)
    clean_dout = torch.empty_like(dout) if is_cleaned else dout
    dlse = None if dlse is None else dlse.float().contiguous()
    batch, heads, length = row_max.shape
    prepare_kernel[(batch * heads * -(-length // _PREPARE_ROWS),)](
        out, dout, or_dummy(dlse, out), row_max, row_sum,
        lse_bits, log_sum, delta, clean_dout,
        *call.strides(out), *call.strides(dout), *call.strides(clean_dout),
        heads, length,
        HEAD_DIM_V=out.shape[3], BLOCK_DV=padded(out), HAS_DLSE=dlse is not None,
        CLEAN_DOUT=is_cleaned, SPLIT_LSE=call.split_lse, BLOCK_M=_PREPARE_ROWS, enable_fp_fusion=True,
    )  # fmt: skip
    return clean_dout, lse_bits, log_sum, delta


def _sweep_keys(call: Call, dout: Tensor, rows: list[Tensor], dquery: Tensor | None, added: DbiasSum | None) -> None:
    """dQ, and what is added to the strip's gradient; each where it is not None."""
    config = configs.dquery_config(call.target, dout.dtype, call.block_d)
    written = or_dummy(dquery, dout)
    arguments = (
        *call.inputs, dout, *rows, *((dout, written, dout) if added is None else (added.unit, written, added.sums)),
        *call.input_strides, *call.strides(dout), *call.strides(written), *call.shared_strides,
        *call.sizes, *call.bounds, call.scale, call.scale_log2, *call.dropout,
    )  # fmt: skip
    outputs = {"HAS_DQ": dquery is not None, "DBIAS": "none" if added is None else added.how}
    constants = {**call.constants, **call.loops, **outputs, "SPLIT_LSE": call.split_lse}
    run_kernel(dquery_kernel, config, (call.batch * call.num_heads, call.len_q, "BLOCK"), arguments, constants)
    if dquery is not None and call.query is not call.problem.query:
        dquery.mul_(call.query_factor)


def _sweep_queries(call: Call, dout: Tensor, rows: list[Tensor], dkey: Tensor | None, dvalue: Tensor | None) -> None:
    """dK and dV, each where it is not None."""
    config = configs.dkey_dvalue_config(call.target, dout.dtype, call.block_d)
    written = or_dummy(dkey, dout), or_dummy(dvalue, dout)
    arguments = (
        *call.inputs, dout, *rows,
        *written,
        *call.input_strides, *call.strides(dout), *call.strides(written[0]), *call.strides(written[1]),
        *call.shared_strides, *call.sizes, *call.bounds, call.scale, call.scale_log2, *call.dropout,
    )  # fmt: skip
    outputs = {"HAS_DK": dkey is not None, "HAS_DV": dvalue is not None}
    constants = {**call.constants, **call.loops, **outputs, "SPLIT_LSE": call.split_lse}
    blocks = (call.batch * call.problem.key.shape[1], call.len_k, "BLOCK_N")
    run_kernel(dkey_dvalue_kernel, config, blocks, arguments, constants)


def _sum_diagonals_of_tiles(call: Call, dout: Tensor, rows: list[Tensor]) -> Tensor:
    """The gradient of every offset in one order of sums: (1 or B, 1 or H, offsets)."""
    assert call.strip is not None
    config = configs.dquery_config(call.target, dout.dtype, call.block_d)
    bias_batch, bias_heads = call.strip.shape[:2]
    block = config.block_m
    lowest, highest = strip.counted_reach(call.problem)
    first_distance = lowest // block
    distances = -(-highest // block) - first_distance + 1
    parts = call.strip.new_empty(bias_batch, bias_heads, distances, 2, block)
    dbias_kernel[(bias_batch * bias_heads * distances,)](
        *call.inputs, dout, *rows,
        parts,
        *call.input_strides, *call.strides(dout), *call.shared_strides,
        *call.sizes, *call.bounds, call.scale_log2, *call.dropout,
        call.batch, bias_batch, bias_heads, first_distance, distances,
        SPLIT_LSE=call.split_lse, **call.constants, BLOCK=block, **config.options,
    )  # fmt: skip
    doffsets = parts.new_zeros(bias_batch, bias_heads, distances + 1, block)
    doffsets[:, :, :-1] += parts[:, :, :, 0]
    doffsets[:, :, 1:] += parts[:, :, :, 1]
    first = lowest - (first_distance - 1) * block
    return doffsets.flatten(2)[..., first : first + highest - lowest + 1]


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one: Triton launches there."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
