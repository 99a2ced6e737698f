"""The table's gradient without atomic adds: one program owns a diagonal of tiles and adds them in a fixed order.

dbias[offset] = sum of dS along the offset's diagonal, over batch and over the heads that share the table
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.tiles import (
    kept_keys,
    load_rows,
    load_tile,
    offset_0,
    probabilities,
    product,
    score_tile,
    score_unit,
    sum_diagonals,
    tile_ptrs,
)


@triton.jit
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, strip_ptr, key_mask_ptr, lse_bits_ptr, log_sum_ptr, delta_ptr,
    parts_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_sb, stride_sh,
    batch, num_heads, group, len_q, len_k, bias_batch, bias_heads,
    band_lo, band_hi, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr, USE_ASM: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One diagonal of tiles of one row of the table: the sums along its diagonals, in a fixed order.

    The tiles lie (diagonal - num_n + 1) * BLOCK from the main diagonal. parts (bias_batch, bias_heads, num_m + num_n
    - 1, 2, BLOCK): the offsets from there minus BLOCK, and those from there on.
    """
    num_m = tl.cdiv(len_q, BLOCK)
    num_n = tl.cdiv(len_k, BLOCK)
    num_diagonals = num_m + num_n - 1
    diagonal = tl.program_id(0) % num_diagonals
    bias_row = tl.program_id(0) // num_diagonals
    distance = diagonal - (num_n - 1)
    shift = distance * BLOCK
    first_b = bias_row // bias_heads  # 0 if all sequences share the table; so with heads
    first_h = bias_row % bias_heads
    num_b = batch // bias_batch
    num_h = num_heads // bias_heads
    first_m = tl.maximum(distance, 0)
    tiles = tl.minimum(num_m - first_m, num_n - (first_m - distance))
    if (shift + BLOCK - 1 < band_lo) | (shift - BLOCK + 1 > band_hi):
        tiles = 0
    rows = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    strip_ptr = offset_0(strip_ptr, first_b.to(tl.int64), first_h.to(tl.int64), stride_sb, stride_sh, len_k)
    unit = score_unit(scale_log2, HAS_BIAS, BIAS_IN_ACC, True)
    for i in range(0, num_b * num_h * tiles):
        head = i // tiles
        b = (first_b + head // num_h).to(tl.int64)
        h = (first_h + head % num_h).to(tl.int64)
        offs_m = (first_m + i % tiles) * BLOCK + rows
        offs_n = offs_m - shift
        q_ptrs = tile_ptrs(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, stride_qd, BLOCK_D)
        k_ptrs = tile_ptrs(k_ptr + b * stride_kb + h // group * stride_kh, offs_n, stride_kn, stride_kd, BLOCK_D)
        v_ptrs = tile_ptrs(v_ptr + b * stride_vb + h // group * stride_vh, offs_n, stride_vn, stride_vd, BLOCK_DV)
        dout_ptrs = tile_ptrs(dout_ptr + b * stride_gb + h * stride_gh, offs_m, stride_gm, stride_gd, BLOCK_DV)
        q = load_tile(q_ptrs, offs_m, len_q, False, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
        k = load_tile(k_ptrs, offs_n, len_k, False, HEAD_DIM, BLOCK_D)
        v = load_tile(v_ptrs, offs_n, len_k, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
        dout = load_tile(dout_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV)
        row = (b * num_heads + h) * len_q
        lse, log_sum, delta = load_rows(
            lse_bits_ptr + row, log_sum_ptr + row, delta_ptr + row, offs_m, len_q, False, SPLIT_LSE
        )
        keep = kept_keys(key_mask_ptr + b * len_k if HAS_MASK else key_mask_ptr, offs_n, len_k, HAS_MASK)[None, :]
        s = score_tile(
            q, k.T, strip_ptr, shift, rows.to(tl.int64), -rows.to(tl.int64), keep, scale_log2, band_lo, band_hi,
            HAS_BIAS, BIAS_IN_ACC, True, True, USE_ASM, PRECISION,
        )  # (BLOCK, BLOCK)  # fmt: skip
        p = probabilities(s * unit, lse[:, None], log_sum[:, None], SPLIT_LSE)
        total += p * (product(dout, v.T, None, PRECISION) - delta[:, None])
    none = tl.zeros([BLOCK, BLOCK], tl.float32)
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * BLOCK)
    tl.store(parts_ptr + rows, sum_diagonals(total, none, BLOCK))
    tl.store(parts_ptr + BLOCK + rows, sum_diagonals(none, total, BLOCK))
