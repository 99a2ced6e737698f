"""What runs before the sweeps of a pass: strips from tables, zeros for their sums, the numbers of every row."""

import torch
from torch import Tensor

from triton_offset_bias.backends.triton.call import Call
from triton_offset_bias.backends.triton.dbias_sum import DbiasSum
from triton_offset_bias.backends.triton.kernels.arguments import (
    Outputs,
    PrepareForm,
    Results,
    ResultStrides,
    Rows,
    Table,
    constants,
)
from triton_offset_bias.backends.triton.kernels.prepare import prepare_kernel
from triton_offset_bias.backends.triton.kernels.strip import BLOCK, constants_kernel
from triton_offset_bias.backends.triton.launch import Launch
from triton_offset_bias.backends.triton.plan import Plan, padded

_PREPARE_ROWS = 64


def prepare_forward(call: Call, outputs: Outputs) -> None:
    """Has the strip filled, if there is a table."""
    if call.strip is not None:
        # No program has rows, so all tensors but the strip are dummies.
        rows = Rows(outputs.row_max, outputs.row_max, outputs.row_max)
        results = Results(
            *(outputs.out, outputs.out, outputs.row_max, outputs.row_sum, None, outputs.out), dq_sum=outputs.row_max
        )
        _launch(call, call.strip, results, rows, sums_width=0, row_programs=0, rows_cleaned=0, rows_zeroed=0)


def prepare_backward(
    call: Call,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    added: DbiasSum | None,
    dq_sum: Tensor | None,
) -> tuple[Tensor, Rows]:
    """Has the strip filled, sums zeroed, the rows prepared; returns dO as the sweeps take it, and the `Rows`."""
    strip = call.plan.strip
    batch, heads, length = row_max.shape
    lse, delta = (row_max.new_empty(batch, heads, -(-length // 16) * 16) for _ in range(2))
    rows = Rows(lse, torch.empty_like(lse) if call.plan.form.SPLIT_LSE.value else lse, delta)
    clean = torch.empty_like(dout) if strip.may_leave_rows_empty else dout
    _launch(
        call,
        call.strip if added is None else added.sums,
        Results(out, dout, row_max, row_sum, dlse, clean, row_max if dq_sum is None else dq_sum),
        rows,
        sums_width=0 if added is None else strip.shape[-1],
        row_programs=batch * heads * -(-length // _PREPARE_ROWS),
        rows_cleaned=length if strip.may_leave_rows_empty else 0,
        rows_zeroed=0 if dq_sum is None else length,
    )
    return clean, rows


def _launch(
    call: Call,
    sums: Tensor | None,
    results: Results,
    rows: Rows,
    *,
    sums_width: int,
    row_programs: int,
    rows_cleaned: int,
    rows_zeroed: int,
) -> None:
    """Launches `prepare_kernel`, and before it the kernel that finds the constants of a float32 table's rows."""
    plan = call.plan
    if call.constants is not None:
        launch = plan.launch(constants_kernel, lambda: _constants_launch(plan))
        launch(call.is_aligned, call.problem.bias, call.constants)
    # A tensor that the kernel does not touch has the strides of one that it does: it costs no kernel of its own.
    touched = results if rows_zeroed > 0 else results._replace(dq_sum=results.out)
    numbers = (sums_width, row_programs, rows_cleaned, rows_zeroed)
    launch = plan.launch(
        (prepare_kernel, results.dlse is None, numbers, *(getattr(touched, x).stride() for x in ResultStrides._fields)),
        lambda: _prepare_launch(plan, touched, *numbers),
    )
    table = Table(call.problem.bias, call.strips if call.constants is None else call.constants, call.strips, sums)
    launch(call.is_aligned, table, results, rows)


def _prepare_launch(
    plan: Plan, results: Results, sums_width: int, row_programs: int, rows_cleaned: int, rows_zeroed: int
) -> Launch:
    strip, out = plan.strip, results.out
    strides = ResultStrides(*(plan.strides(getattr(results, name)) for name in ResultStrides._fields))
    numbers = (
        strides, *strip.table_strides, strip.num_columns, *strip.columns, sums_width,
        strip.shape[1], plan.num_heads, out.shape[2], rows_cleaned, rows_zeroed,
        strip.programs, strip.unit, strip.limit,
    )  # fmt: skip
    form = PrepareForm(
        HAS_BIAS=plan.form.HAS_BIAS.value,
        HAS_GATE=plan.form.HAS_GATE.value,
        IS_CUT=strip.is_cut,
        HAS_CONSTANTS=strip.has_constants,
        IS_ZERO_BEYOND=strip.is_zero_beyond,
        HEAD_DIM=plan.form.HEAD_DIM.value,
        HEAD_DIM_V=out.shape[3],
        BLOCK_D=plan.form.BLOCK_D.value,
        BLOCK_DV=padded(out),
        HAS_DLSE=results.dlse is not None,
        SPLIT_LSE=plan.form.SPLIT_LSE.value,
    )
    sizes = {"BLOCK": BLOCK, "BLOCK_M": _PREPARE_ROWS}
    named = {"FORM": PrepareForm(*constants(form)), **sizes, "enable_fp_fusion": True}
    return Launch(prepare_kernel, strip.programs + row_programs, numbers, named)


def _constants_launch(plan: Plan) -> Launch:
    batch, heads, _ = plan.strip.shape
    numbers = (*plan.strip.table_strides, heads, plan.strip.num_columns)
    return Launch(constants_kernel, batch * heads, numbers, {"BLOCK": BLOCK, "enable_fp_fusion": True})


def add_constants(call: Call, lse: Tensor) -> None:
    """Adds to a (B, H, M) log-sum-exp the constants that the table was counted from."""
    bounds_q, constants = call.problem.cu_seqlens_q, call.constants
    if constants is None:
        return
    if bounds_q is not None and len(constants) > 1:  # of each token's sequence
        tokens = torch.arange(lse.shape[2], dtype=bounds_q.dtype, device=lse.device)
        constants = constants[torch.searchsorted(bounds_q[1:-1].contiguous(), tokens, right=True), :, 0].mT
    lse += constants
