"""The backward pass by blocks of keys; its mathematics are in `backward`:

dK = scale dS^T Q      dV = (Z * P)^T dO
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.blocks import all_blocks, block_ranges, counted_from, sequence_rows
from triton_offset_bias.backends.triton.scores import (
    dropout_factors,
    far_bias,
    kept_keys,
    load_rows,
    position_rows,
    probabilities,
    score_tile,
    score_unit,
    shift_in_strip,
    slope_weights,
    strip_of_head,
)
from triton_offset_bias.backends.triton.tiles import load_tile, product, store_tile, tile_ptrs, waited_for


@triton.jit
def _sweep_queries(
    dk, dv, k, v, keep, rows, q_ptrs, dout_ptrs, stride_qm, stride_gm, lse_bits_ptr, log_sum_ptr, delta_ptr,
    query_positions_ptr, strip_ptr, begin, end, start_n, len_q, bias, scale_log2,
    band_lo, band_hi, near_lo, near_hi, seed, head, largest_dropped, kept_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, DROPOUT_ROUNDS: tl.constexpr,
    IS_NEAR: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys from the queries [begin, end); scores are transposed, (keys, queries)."""
    columns = tl.arange(0, BLOCK_M).to(tl.int64)
    unit = score_unit(scale_log2, HAS_BIAS, BIAS_IN_ACC, IS_NEAR)
    for start_m in range(begin, end, BLOCK_M):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        step = start_m.to(tl.int64)
        q = load_tile(q_ptrs + step * stride_qm, offs_m, len_q, EVEN_M, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        dout = load_tile(dout_ptrs + step * stride_gm, offs_m, len_q, EVEN_M, HEAD_DIM_V, BLOCK_DV)
        lse, log_sum, delta = load_rows(lse_bits_ptr, log_sum_ptr, delta_ptr, offs_m, len_q, EVEN_M, SPLIT_LSE)
        if HAS_POSITIONS:
            columns = position_rows(query_positions_ptr, 0, 0, offs_m, len_q, HAS_POSITIONS)
        shift = start_m - start_n
        if HAS_BIAS and not EVEN_M:
            shift = shift_in_strip(shift, near_lo, near_hi)
        s = score_tile(
            k, q.T, strip_ptr, shift, rows, columns, keep[:, None], scale_log2,
            band_lo, band_hi, near_lo, near_hi,
            HAS_BIAS, BIAS_IN_ACC, IS_NEAR, HAS_MASK, HAS_POSITIONS, USE_ASM, PRECISION, WAIT,
        )  # (BLOCK_N, BLOCK_M)  # fmt: skip
        p = probabilities(s, unit, bias, lse[None, :], log_sum[None, :], IS_NEAR, HAS_BIAS, SPLIT_LSE)
        z = 1.0
        if DROPOUT_ROUNDS > 0:
            m, n = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
            z = dropout_factors(seed, head, start_m, start_n, m, n, largest_dropped, kept_scale, DROPOUT_ROUNDS)
        dv = product((p * z).to(dout.dtype), dout, dv, PRECISION)
        dp = product(v, dout.T, None, PRECISION) * z
        ds = p * (dp * slope_weights(lse, log_sum, SPLIT_LSE)[None, :] - delta[None, :])
        dk = waited_for(product(ds.to(q.dtype), q, dk, PRECISION), WAIT)
    return dk, dv


@triton.jit(do_not_specialize=["largest_dropped"])
def dkey_dvalue_kernel(
    q_ptr, k_ptr, v_ptr, strip_ptr, key_mask_ptr, query_positions_ptr, key_positions_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seed_ptr, dout_ptr, lse_bits_ptr, log_sum_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_sb, stride_sh, stride_pqb, stride_pkb,
    num_heads, group, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi, scale, scale_log2, largest_dropped, kept_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_M: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_PACKED: tl.constexpr,
    DROPOUT_ROUNDS: tl.constexpr, FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key head, against every query head that shares it: dK and dV."""
    num_blocks = tl.cdiv(len_k, BLOCK_N)
    start_n = tl.program_id(0) % num_blocks * BLOCK_N
    head_kv = tl.program_id(0) // num_blocks
    num_kv_heads = num_heads // group
    b = (head_kv // num_kv_heads).to(tl.int64)
    h_kv = (head_kv % num_kv_heads).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    first_row = b * num_heads * rows_q
    first_q, len_q = sequence_rows(cu_seqlens_q_ptr, b, len_q, rows_q, IS_PACKED)
    first_k, len_k = sequence_rows(cu_seqlens_k_ptr, b, len_k, rows_k, IS_PACKED)
    if IS_PACKED:
        zero, band_lo, band_hi, near_lo, near_hi = counted_from(len_k - len_q, zero, band_lo, band_hi, near_lo, near_hi)
        first_row = first_q
        len_q = tl.where(start_n < len_k, len_q, 0)
    k_ptr += b * stride_kb + h_kv * stride_kh + first_k * stride_kn
    v_ptr += b * stride_vb + h_kv * stride_vh + first_k * stride_vn
    q_ptr += b * stride_qb + first_q * stride_qm
    dout_ptr += b * stride_gb + first_q * stride_gm
    k_ptrs = tile_ptrs(k_ptr, offs_n, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, offs_n, stride_vn, stride_vd, BLOCK_DV)
    k = load_tile(k_ptrs, offs_n, len_k, False, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v = load_tile(v_ptrs, offs_n, len_k, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
    key_mask_ptr += b * len_k if HAS_MASK else 0
    keep = kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK)
    query_positions_ptr += b * stride_pqb if HAS_POSITIONS else 0
    rows = -tl.arange(0, BLOCK_N).to(tl.int64)
    if HAS_POSITIONS:
        rows = -position_rows(key_positions_ptr, b, stride_pkb, offs_n, len_k, HAS_POSITIONS)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT_ROUNDS > 0 else 0

    if HAS_POSITIONS:
        edges = all_blocks(len_q, BLOCK_M)
    else:
        edges = block_ranges(start_n, len_q, -band_hi, -band_lo, -near_hi, -near_lo, BLOCK_N, BLOCK_M)
    for g in range(0, group):
        h = h_kv * group + g
        q_ptrs = tile_ptrs(q_ptr + h * stride_qh, offs_m, stride_qm, stride_qd, BLOCK_D)
        dout_ptrs = tile_ptrs(dout_ptr + h * stride_gh, offs_m, stride_gm, stride_gd, BLOCK_DV)
        row = first_row + h * rows_q
        head_strip_ptr = strip_of_head(strip_ptr, b, h, stride_sb, stride_sh, zero, HAS_BIAS)
        head = (b * num_heads + h).to(tl.int32)
        for part in tl.static_range(4):  # queries go up, so their offsets do: far right of the query comes first
            if (FAR_RIGHT, NEAR, FAR_LEFT, not EVEN_M)[part]:
                bias = 0.0
                if part % 2 == 0:
                    far_end = (near_lo, 0, near_hi)[part]
                    bias = far_bias(head_strip_ptr + far_end, scale_log2, HAS_BIAS, BIAS_IN_ACC)
                dk, dv = _sweep_queries(
                    dk, dv, k, v, keep, rows, q_ptrs, dout_ptrs, stride_qm, stride_gm, lse_bits_ptr + row,
                    log_sum_ptr + row, delta_ptr + row, query_positions_ptr, head_strip_ptr,
                    edges[part], edges[part + 1], start_n, len_q, bias, scale_log2,
                    band_lo, band_hi, near_lo, near_hi, seed, head, largest_dropped, kept_scale,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, part < 3, HAS_BIAS, BIAS_IN_ACC,
                    HAS_MASK, HAS_POSITIONS, DROPOUT_ROUNDS, part % 2 == 1, USE_ASM, PRECISION, WAIT, SPLIT_LSE,
                )  # fmt: skip

    if HAS_DK:
        dk_ptr += b * stride_dkb + h_kv * stride_dkh + first_k * stride_dkn
        dk_ptrs = tile_ptrs(dk_ptr, offs_n, stride_dkn, stride_dkd, BLOCK_D)
        store_tile(dk_ptrs, dk * scale, offs_n, len_k, HEAD_DIM, BLOCK_D)
    if HAS_DV:
        dv_ptr += b * stride_dvb + h_kv * stride_dvh + first_k * stride_dvn
        dv_ptrs = tile_ptrs(dv_ptr, offs_n, stride_dvn, stride_dvd, BLOCK_DV)
        store_tile(dv_ptrs, dv, offs_n, len_k, HEAD_DIM_V, BLOCK_DV)
