"""The kernel that runs before all others of a pass: it fills the strip, and computes the numbers of every row.

delta = <dO, O> - dlse
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS
from triton_offset_bias.backends.triton.kernels.blocks import head_of
from triton_offset_bias.backends.triton.kernels.scores import row_stride
from triton_offset_bias.backends.triton.kernels.strip import fill_strip
from triton_offset_bias.backends.triton.kernels.tiles import load_tile, store_tile, tile_ptrs

# The weights of a row with one key sum to 1 within these tolerances: a score times its unit is rounded in one place,
# and fused with a subtraction in another. The second tolerance is for each bit of the row's maximum.
ONE_KEY = tl.constexpr(2.0**-15)
ONE_KEY_PER_BIT = tl.constexpr(2.0**-22)


@triton.jit(do_not_specialize=INTEGERS)
def prepare_kernel(
    table, out_ptr, dout_ptr, dlse_ptr, row_max_ptr, row_sum_ptr,
    rows, clean_dout_ptr,
    out_strides, dout_strides, clean_strides,
    stride_b, stride_h, stride_n, bias_heads, num_columns, width, first, begin, end, sums_width, strip_programs,
    unit, limit, num_heads, rows_q, rows_cleaned,
    HAS_BIAS: tl.constexpr, HAS_CONSTANTS: tl.constexpr, IS_ZERO_BEYOND: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr,
    SPLIT_LSE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each of the first `strip_programs` programs fills a block of the strip, each other one prepares a block of rows.

    Both directions launch it with the same constants, so that it is compiled once. In the forward pass no program has
    rows, and pointers to what the backward pass has are dummies.
    """
    if tl.program_id(0) < strip_programs:
        if HAS_BIAS:
            fill_strip(
                table, tl.program_id(0), stride_b, stride_h, stride_n, bias_heads, num_columns, width, first, begin,
                end, sums_width, unit, limit, HAS_CONSTANTS, IS_ZERO_BEYOND, BLOCK,
            )  # fmt: skip
    else:
        prepare_rows(
            tl.program_id(0) - strip_programs, out_ptr, dout_ptr, dlse_ptr, row_max_ptr, row_sum_ptr,
            rows, clean_dout_ptr, out_strides, dout_strides, clean_strides, num_heads, rows_q, rows_cleaned,
            HEAD_DIM_V, BLOCK_DV, HAS_DLSE, SPLIT_LSE, BLOCK_M,
        )  # fmt: skip


@triton.jit
def prepare_rows(
    index, out_ptr, dout_ptr, dlse_ptr, row_max_ptr, row_sum_ptr,
    rows, clean_dout_ptr, out_strides, dout_strides, clean_strides, num_heads, rows_q, rows_cleaned,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes `Rows` for a block of rows. A row that attends to nothing gets the log-sum-exp +inf: its P and dS are 0.

    A row has one key if all its weight but ONE_KEY lies on that key. Then dS = P dlse: delta leaves <dO, O> out, and a
    mark tells the sweeps to leave dP out (`scores.slope_weights`). The keys that this ignores weigh less than the
    rounding of 16-bit numbers.
    SPLIT_LSE: rows.lse holds the maximum alone, and log_sum the rest. Their float32 sum would lose digits.
    The first `rows_cleaned` rows of clean_dout, all or none, become dO with 0 in rows that attend to nothing, where a
    loss may have no finite slope.
    """
    num_blocks = tl.cdiv(rows_q, BLOCK_M)
    head = head_of(index // num_blocks, num_heads)
    offs_m = index % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows_q
    out_ptr += head.b * out_strides.b + head.h * out_strides.h
    dout_ptr += head.b * dout_strides.b + head.h * dout_strides.h
    out_ptrs = tile_ptrs(out_ptr, offs_m, out_strides.row, out_strides.d, BLOCK_DV)
    dout_ptrs = tile_ptrs(dout_ptr, offs_m, dout_strides.row, dout_strides.d, BLOCK_DV)
    out = load_tile(out_ptrs, offs_m, rows_q, False, HEAD_DIM_V, BLOCK_DV).to(tl.float32)  # (BLOCK_M, BLOCK_DV)
    dout = load_tile(dout_ptrs, offs_m, rows_q, False, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    row = head.index.to(tl.int64) * rows_q + offs_m
    to_row = head.index.to(tl.int64) * row_stride(rows_q) + offs_m
    row_sum = tl.load(row_sum_ptr + row, mask=mask_m, other=0.0)
    is_empty = row_sum == 0.0
    dout = tl.where(is_empty[:, None], 0.0, dout)
    log_sum = tl.math.log2(tl.where(is_empty, 1.0, row_sum))
    lse_bits = tl.load(row_max_ptr + row, mask=mask_m, other=0.0)
    if SPLIT_LSE:
        has_one_key = log_sum == 0.0
        tl.store(rows.log_sum + to_row, log_sum, mask=mask_m)
    else:
        has_one_key = tl.abs(row_sum - 1.0) <= tl.abs(lse_bits) * ONE_KEY_PER_BIT + ONE_KEY
        bits = (lse_bits + log_sum).to(tl.int32, bitcast=True)
        lse_bits = tl.where(has_one_key, bits & -2, bits | 1).to(tl.float32, bitcast=True)
    delta = tl.where(has_one_key, 0.0, tl.sum(out * dout, 1))
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
    tl.store(rows.lse + to_row, tl.where(is_empty, float("inf"), lse_bits), mask=mask_m)
    tl.store(rows.delta + to_row, tl.where(is_empty, 0.0, delta), mask=mask_m)
    if rows_cleaned > 0:
        clean_dout_ptr += head.b * clean_strides.b + head.h * clean_strides.h
        clean_ptrs = tile_ptrs(clean_dout_ptr, offs_m, clean_strides.row, clean_strides.d, BLOCK_DV)
        store_tile(clean_ptrs, dout, offs_m, rows_cleaned, HEAD_DIM_V, BLOCK_DV)
