"""The backward pass by blocks of keys; its mathematics are in `backward`:

dK = scale dS^T Q      dV = P^T dO
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.tiles import (
    block_ranges,
    far_bias,
    kept_keys,
    load_rows,
    load_tile,
    offset_0,
    probabilities,
    product,
    score_tile,
    score_unit,
    store_tile,
    tile_ptrs,
)


@triton.jit
def _sweep_queries(
    dk, dv, k, v, keep, q_ptrs, dout_ptrs, stride_qm, stride_gm, lse_bits_ptr, log_sum_ptr, delta_ptr, strip_ptr,
    begin, end, start_n, len_q, bias, scale_log2, band_lo, band_hi,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_NEAR: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys from the queries [begin, end); scores are transposed, (keys, queries)."""
    rows = -tl.arange(0, BLOCK_N).to(tl.int64)
    columns = tl.arange(0, BLOCK_M).to(tl.int64)
    unit = score_unit(scale_log2, HAS_BIAS, BIAS_IN_ACC, IS_NEAR)
    for start_m in range(begin, end, BLOCK_M):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        step = start_m.to(tl.int64)
        q = load_tile(q_ptrs + step * stride_qm, offs_m, len_q, EVEN_M, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        dout = load_tile(dout_ptrs + step * stride_gm, offs_m, len_q, EVEN_M, HEAD_DIM_V, BLOCK_DV)
        lse, log_sum, delta = load_rows(lse_bits_ptr, log_sum_ptr, delta_ptr, offs_m, len_q, EVEN_M, SPLIT_LSE)
        s = score_tile(
            k, q.T, strip_ptr, start_m - start_n, rows, columns, keep[:, None], scale_log2, band_lo, band_hi,
            HAS_BIAS, BIAS_IN_ACC, IS_NEAR, HAS_MASK, USE_ASM, PRECISION,
        )  # (BLOCK_N, BLOCK_M)  # fmt: skip
        p = probabilities(s * unit, (lse if IS_NEAR else lse - bias)[None, :], log_sum[None, :], SPLIT_LSE)
        dv = product(p.to(dout.dtype), dout, dv, PRECISION)
        dp = product(v, dout.T, None, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = product(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def dkey_dvalue_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, strip_ptr, key_mask_ptr, lse_bits_ptr, log_sum_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_sb, stride_sh,
    num_heads, group, len_q, len_k,
    band_lo, band_hi, near_lo, near_hi, scale, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_M: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr, HAS_MASK: tl.constexpr, FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key head, against every query head that shares it: dK and dV."""
    num_blocks = tl.cdiv(len_k, BLOCK_N)
    start_n = tl.program_id(0) % num_blocks * BLOCK_N
    head = tl.program_id(0) // num_blocks
    num_kv_heads = num_heads // group
    b = (head // num_kv_heads).to(tl.int64)
    h_kv = (head % num_kv_heads).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    k_ptrs = tile_ptrs(k_ptr + b * stride_kb + h_kv * stride_kh, offs_n, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr + b * stride_vb + h_kv * stride_vh, offs_n, stride_vn, stride_vd, BLOCK_DV)
    k = load_tile(k_ptrs, offs_n, len_k, False, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v = load_tile(v_ptrs, offs_n, len_k, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
    if HAS_MASK:
        key_mask_ptr += b * len_k
    keep = kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    edges = block_ranges(start_n, len_q, -band_hi, -band_lo, -near_hi, -near_lo, BLOCK_N, BLOCK_M)
    for g in range(0, group):
        h = h_kv * group + g
        q_ptrs = tile_ptrs(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, stride_qd, BLOCK_D)
        dout_ptrs = tile_ptrs(dout_ptr + b * stride_gb + h * stride_gh, offs_m, stride_gm, stride_gd, BLOCK_DV)
        row = (b * num_heads + h) * len_q
        head_strip_ptr = strip_ptr
        if HAS_BIAS:
            head_strip_ptr = offset_0(strip_ptr, b, h, stride_sb, stride_sh, len_k)
        for part in tl.static_range(4):  # queries go up, so their offsets do: far right of the query comes first
            if (FAR_RIGHT, NEAR, FAR_LEFT, not EVEN_M)[part]:
                bias = 0.0
                if part % 2 == 0:
                    far_end = (near_lo, 0, near_hi)[part]
                    bias = far_bias(head_strip_ptr, far_end, scale_log2, HAS_BIAS, BIAS_IN_ACC)
                dk, dv = _sweep_queries(
                    dk, dv, k, v, keep, q_ptrs, dout_ptrs, stride_qm, stride_gm, lse_bits_ptr + row, log_sum_ptr + row,
                    delta_ptr + row,
                    head_strip_ptr, edges[part], edges[part + 1],
                    start_n, len_q, bias, scale_log2, band_lo, band_hi,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, part < 3, HAS_BIAS, BIAS_IN_ACC,
                    HAS_MASK, part % 2 == 1, USE_ASM, PRECISION, SPLIT_LSE,
                )  # fmt: skip

    if HAS_DK:
        dk_ptrs = tile_ptrs(dk_ptr + b * stride_dkb + h_kv * stride_dkh, offs_n, stride_dkn, stride_dkd, BLOCK_D)
        store_tile(dk_ptrs, dk * scale, offs_n, len_k, HEAD_DIM, BLOCK_D)
    if HAS_DV:
        dv_ptrs = tile_ptrs(dv_ptr + b * stride_dvb + h_kv * stride_dvh, offs_n, stride_dvn, stride_dvd, BLOCK_DV)
        store_tile(dv_ptrs, dv, offs_n, len_k, HEAD_DIM_V, BLOCK_DV)
