"""The kernel that runs before all others of a pass: it fills the strip, and computes the numbers of every row.

delta = <dO, O> - dlse
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS, Columns
from triton_offset_bias.backends.triton.kernels.blocks import head_of
from triton_offset_bias.backends.triton.kernels.scores import row_stride
from triton_offset_bias.backends.triton.kernels.strip import fill_strip
from triton_offset_bias.backends.triton.kernels.tiles import first_element, load_tile, store_tile, tile_ptrs

# The weights of a row with one key sum to 1 within these tolerances: a score times its unit is rounded in one place,
# and fused with a subtraction in another. The second tolerance is for each bit of the row's maximum.
ONE_KEY = tl.constexpr(2.0**-15)
ONE_KEY_PER_BIT = tl.constexpr(2.0**-22)


@triton.jit(do_not_specialize=INTEGERS)
def prepare_kernel(
    table, results, rows, strides,
    stride_b, stride_h, stride_n, num_columns, width, first, begin, end, sums_width,
    bias_heads, num_heads, rows_q, rows_cleaned, rows_zeroed, strip_programs, unit, limit,
    FORM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each of the first `strip_programs` programs fills a block of the strip, each other one prepares a block of rows.

    Both directions launch it with the same constants, so that it is compiled once. In the forward pass no program has
    rows, and pointers to what the backward pass has are dummies.
    """
    if tl.program_id(0) < strip_programs:
        if FORM.HAS_BIAS:
            columns = Columns(stride_b, stride_h, stride_n, num_columns, width, first, begin, end, sums_width)
            fill_strip(table, tl.program_id(0), strip_programs, bias_heads, columns, unit, limit, FORM, BLOCK)
    else:
        index = tl.program_id(0) - strip_programs
        prepare_rows(results, rows, index, strides, num_heads, rows_q, rows_cleaned, rows_zeroed, FORM, BLOCK_M)


@triton.jit
def prepare_rows(
    results, rows, index, strides, num_heads, rows_q, rows_cleaned, rows_zeroed,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes `Rows` for block `index` of the rows.

    A row that attends to nothing gets the log-sum-exp +inf: its P and dS are 0.
    A row has one key if all its weight but ONE_KEY lies on that key. Then dS = P dlse: delta leaves <dO, O> out, and a
    mark tells the sweeps to leave dP out (`scores.slope_weights`). The keys that this ignores weigh less than the
    rounding of 16-bit numbers.
    SPLIT_LSE: rows.lse holds the maximum alone, and log_sum the rest. Their float32 sum would lose digits.
    The first `rows_cleaned` rows of results.clean_dout, all or none, become dO with 0 in rows that attend to nothing,
    where a loss may have no finite slope. The first `rows_zeroed` rows of results.dq_sum, all or none, become 0.
    """
    num_blocks = tl.cdiv(rows_q, BLOCK_M)
    head = head_of(index // num_blocks, num_heads)
    offs_m = index % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows_q
    out_ptr = results.out + first_element(strides.out, head.b, head.h, 0)
    dout_ptr = results.dout + first_element(strides.dout, head.b, head.h, 0)
    out_ptrs = tile_ptrs(out_ptr, offs_m, strides.out.row, strides.out.d, FORM.BLOCK_DV)
    dout_ptrs = tile_ptrs(dout_ptr, offs_m, strides.dout.row, strides.dout.d, FORM.BLOCK_DV)
    out = load_tile(out_ptrs, offs_m, rows_q, False, FORM.HEAD_DIM_V, FORM.BLOCK_DV).to(tl.float32)
    dout = load_tile(dout_ptrs, offs_m, rows_q, False, FORM.HEAD_DIM_V, FORM.BLOCK_DV).to(tl.float32)
    row = head.index.to(tl.int64) * rows_q + offs_m
    to_row = head.index.to(tl.int64) * row_stride(rows_q) + offs_m
    row_sum = tl.load(results.row_sum + row, mask=mask_m, other=0.0)
    is_empty = row_sum == 0.0
    dout = tl.where(is_empty[:, None], 0.0, dout)
    log_sum = tl.math.log2(tl.where(is_empty, 1.0, row_sum))
    lse_bits = tl.load(results.row_max + row, mask=mask_m, other=0.0)
    if FORM.SPLIT_LSE:
        has_one_key = log_sum == 0.0
        tl.store(rows.log_sum + to_row, log_sum, mask=mask_m)
    else:
        has_one_key = tl.abs(row_sum - 1.0) <= tl.abs(lse_bits) * ONE_KEY_PER_BIT + ONE_KEY
        bits = (lse_bits + log_sum).to(tl.int32, bitcast=True)
        lse_bits = tl.where(has_one_key, bits & -2, bits | 1).to(tl.float32, bitcast=True)
    delta = tl.where(has_one_key, 0.0, tl.sum(out * dout, 1))
    if FORM.HAS_DLSE:
        delta -= tl.load(results.dlse + row, mask=mask_m, other=0.0)
    tl.store(rows.lse + to_row, tl.where(is_empty, float("inf"), lse_bits), mask=mask_m)
    tl.store(rows.delta + to_row, tl.where(is_empty, 0.0, delta), mask=mask_m)
    if rows_zeroed > 0:
        dq_ptr = results.dq_sum + first_element(strides.dq_sum, head.b, head.h, 0)
        dq_ptrs = tile_ptrs(dq_ptr, offs_m, strides.dq_sum.row, strides.dq_sum.d, FORM.BLOCK_D)
        zeros = tl.zeros([BLOCK_M, FORM.BLOCK_D], tl.float32)
        store_tile(dq_ptrs, zeros, offs_m, rows_zeroed, FORM.HEAD_DIM, FORM.BLOCK_D)
    if rows_cleaned > 0:
        clean_ptr = results.clean_dout + first_element(strides.clean_dout, head.b, head.h, 0)
        clean_ptrs = tile_ptrs(clean_ptr, offs_m, strides.clean_dout.row, strides.clean_dout.d, FORM.BLOCK_DV)
        store_tile(clean_ptrs, dout, offs_m, rows_cleaned, FORM.HEAD_DIM_V, FORM.BLOCK_DV)
