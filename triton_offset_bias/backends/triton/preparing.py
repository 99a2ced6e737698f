"""What runs before the sweeps of a pass: strips from tables, zeros for their sums, the numbers of every row."""

import torch
from torch import Tensor

from triton_offset_bias.backends.triton.call import Call
from triton_offset_bias.backends.triton.dbias_sum import DbiasSum
from triton_offset_bias.backends.triton.kernels.arguments import Outputs, Rows, Table
from triton_offset_bias.backends.triton.kernels.prepare import prepare_kernel
from triton_offset_bias.backends.triton.kernels.strip import BLOCK, constants_kernel
from triton_offset_bias.backends.triton.launch import Launch
from triton_offset_bias.backends.triton.plan import Plan, padded

_PREPARE_ROWS = 64


def prepare_forward(call: Call, outputs: Outputs) -> None:
    """Has the strip filled, if there is a table."""
    if call.strip is not None:
        rows = Rows(outputs.row_max, outputs.row_max, outputs.row_max)  # dummies, as are the outputs
        pointers = (outputs.out, outputs.out, None, outputs.row_max, outputs.row_sum, rows, outputs.out)
        _launch(call, call.strip, *pointers, sums_width=0, row_programs=0, rows_cleaned=0)


def prepare_backward(
    call: Call,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    added: DbiasSum | None,
) -> tuple[Tensor, Rows]:
    """Has the strip filled, its sums zeroed, the rows prepared; returns dO as the sweeps take it, and the `Rows`."""
    strip = call.plan.strip
    batch, heads, length = row_max.shape
    lse, delta = (row_max.new_empty(batch, heads, -(-length // 16) * 16) for _ in range(2))
    rows = Rows(lse, torch.empty_like(lse) if call.plan.form.SPLIT_LSE.value else lse, delta)
    clean = torch.empty_like(dout) if strip.may_leave_rows_empty else dout
    _launch(
        call, call.strip if added is None else added.sums, out, dout, dlse, row_max, row_sum, rows, clean,
        sums_width=0 if added is None else strip.shape[-1],
        row_programs=batch * heads * -(-length // _PREPARE_ROWS),
        rows_cleaned=length if strip.may_leave_rows_empty else 0,
    )  # fmt: skip
    return clean, rows


def _launch(
    call: Call, sums: Tensor | None, out: Tensor, dout: Tensor, dlse: Tensor | None, row_max: Tensor, row_sum: Tensor,
    rows: Rows, clean: Tensor,
    *, sums_width: int, row_programs: int, rows_cleaned: int,
) -> None:  # fmt: skip
    """Launches `prepare_kernel`, and before it the kernel that finds the constants of a float32 table's rows."""
    plan = call.plan
    if call.constants is not None:
        launch = plan.launch(constants_kernel, lambda: _constants_launch(plan))
        launch(call.is_aligned, call.problem.bias, call.constants)
    tensors, numbers = (out, dout, clean), (sums_width, row_programs, rows_cleaned)
    key = (prepare_kernel, dlse is None, numbers, *(x.stride() for x in tensors))
    launch = plan.launch(key, lambda: _prepare_launch(plan, tensors, *numbers, has_dlse=dlse is not None))
    table = Table(call.problem.bias, call.strip if call.constants is None else call.constants, call.strip, sums)
    launch(call.is_aligned, table, out, dout, dlse, row_max, row_sum, rows, clean)


def _prepare_launch(
    plan: Plan, tensors: tuple[Tensor, ...], sums_width: int, row_programs: int, rows_cleaned: int, *, has_dlse: bool
) -> Launch:
    strip, out = plan.strip, tensors[0]
    numbers = (
        *map(plan.strides, tensors),
        *strip.table_strides, *strip.columns, sums_width, strip.programs,
        strip.unit, strip.limit, plan.num_heads, out.shape[2], rows_cleaned,
    )  # fmt: skip
    constants = {
        **{
            "HAS_BIAS": plan.form.HAS_BIAS,
            "HAS_CONSTANTS": strip.has_constants,
            "IS_ZERO_BEYOND": strip.is_zero_beyond,
        },
        **{"HEAD_DIM_V": out.shape[3], "BLOCK_DV": padded(out), "HAS_DLSE": has_dlse, "SPLIT_LSE": plan.form.SPLIT_LSE},
        **{"BLOCK": BLOCK, "BLOCK_M": _PREPARE_ROWS, "enable_fp_fusion": True},
    }
    return Launch(prepare_kernel, strip.programs + row_programs, numbers, constants)


def _constants_launch(plan: Plan) -> Launch:
    batch, heads, _ = plan.strip.shape
    return Launch(constants_kernel, batch * heads, plan.strip.table_strides, {"BLOCK": BLOCK, "enable_fp_fusion": True})


def add_constants(call: Call, lse: Tensor) -> None:
    """Adds to a (B, H, M) log-sum-exp the constants that the table was counted from."""
    bounds_q, constants = call.problem.cu_seqlens_q, call.constants
    if constants is None:
        return
    if bounds_q is not None and len(constants) > 1:  # of each token's sequence
        tokens = torch.arange(lse.shape[2], dtype=bounds_q.dtype, device=lse.device)
        constants = constants[torch.searchsorted(bounds_q[1:-1].contiguous(), tokens, right=True), :, 0].mT
    lse += constants
