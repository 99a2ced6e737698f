"""The forward pass: for each block of queries, one sweep over the keys with a running softmax.

    S = scale Q K^T + bias      m = max S      l = sum exp(S - m)      O = exp(S - m) V / l      lse = m + log l

Dropout multiplies exp(S - m) by Z on its way to V. FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with
exponentials of base 2.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.blocks import all_blocks, block_ranges, counted_from, sequence_rows
from triton_offset_bias.backends.triton.scores import (
    LN_2,
    NO_SCORE,
    dropout_factors,
    far_bias,
    kept_keys,
    position_rows,
    rounded_scores,
    score_tile,
    score_unit,
    shift_in_strip,
    strip_of_head,
)
from triton_offset_bias.backends.triton.tiles import load_tile, product, store_tile, tile_ptrs, waited_for


@triton.jit
def attend(
    acc, l_i, m_i, q, rows, k_ptrs, v_ptrs, stride_kn, stride_vn, key_mask_ptr, key_positions_ptr, strip_ptr,
    begin, end, start_m, len_k, bias, scale_log2, band_lo, band_hi, near_lo, near_hi,
    seed, head, largest_dropped,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, DROPOUT_ROUNDS: tl.constexpr,
    IS_NEAR: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) to the running softmax; all of them near, or all far with one bias, in bits.

    rows: (BLOCK_M,) int64, the queries' positions, or their distances from the query at start_m. `acc` is not yet
    multiplied by what dropout multiplies kept weights with.
    """
    columns = -tl.arange(0, BLOCK_N).to(tl.int64)
    unit = score_unit(scale_log2, HAS_BIAS, BIAS_IN_ACC, IS_NEAR)
    for start_n in range(begin, end, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        step = start_n.to(tl.int64)
        k = load_tile(k_ptrs + step * stride_kn, offs_n, len_k, EVEN_N, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        keep = kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK)[None, :]
        if HAS_POSITIONS:
            columns = -position_rows(key_positions_ptr, 0, 0, offs_n, len_k, HAS_POSITIONS)
        shift = start_m - start_n
        if HAS_BIAS and not EVEN_N:
            shift = shift_in_strip(shift, near_lo, near_hi)
        s = score_tile(
            q, k.T, strip_ptr, shift, rows, columns, keep, scale_log2, band_lo, band_hi, near_lo, near_hi,
            HAS_BIAS, BIAS_IN_ACC, IS_NEAR, HAS_MASK or not EVEN_N, HAS_POSITIONS, USE_ASM, PRECISION, WAIT,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        if q.dtype == tl.float32:
            s = rounded_scores(s, unit, (tl.zeros_like(m_i) + bias)[:, None], IS_NEAR, HAS_BIAS)
            m_new = tl.maximum(m_i, tl.max(s, 1))
            p = tl.math.exp2(s - m_new[:, None])
        else:
            row_max = tl.max(s, 1) * unit
            m_new = tl.maximum(m_i, row_max if IS_NEAR else row_max + bias)
            p = tl.math.exp2(s * unit - (m_new if IS_NEAR else m_new - bias)[:, None])
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if DROPOUT_ROUNDS > 0:
            m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
            p *= dropout_factors(seed, head, start_m, start_n, m, n, largest_dropped, 1.0, DROPOUT_ROUNDS)
        v = load_tile(v_ptrs + step * stride_vn, offs_n, len_k, EVEN_N, HEAD_DIM_V, BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
        acc = waited_for(product(p.to(v.dtype), v, acc, PRECISION), WAIT)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=["largest_dropped"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, strip_ptr, key_mask_ptr, query_positions_ptr, key_positions_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seed_ptr,
    out_ptr, row_max_ptr, row_sum_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_sb, stride_sh, stride_pqb, stride_pkb,
    num_heads, group, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi, scale_log2, largest_dropped, kept_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, IS_PACKED: tl.constexpr, DROPOUT_ROUNDS: tl.constexpr,
    FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head. q (B, H, M, D), k and v (B, H // group, N, D or DV), out as q; row_* (B, H, M).

    Packed, B is 1 for the tensors, whose rows_q and rows_k rows hold sequences of up to len_q and len_k. row_max is in
    bits; lse is in nats. The longest rows of causal attention start first.
    """
    num_blocks = tl.cdiv(len_q, BLOCK_M)
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    start_m = block * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    row = head.to(tl.int64) * rows_q
    first_q, len_q = sequence_rows(cu_seqlens_q_ptr, b, len_q, rows_q, IS_PACKED)
    first_k, len_k = sequence_rows(cu_seqlens_k_ptr, b, len_k, rows_k, IS_PACKED)
    if IS_PACKED:
        zero, band_lo, band_hi, near_lo, near_hi = counted_from(len_k - len_q, zero, band_lo, band_hi, near_lo, near_hi)
        row = h * rows_q + first_q
        len_k = tl.where(start_m < len_q, len_k, 0)
    q_ptr += b * stride_qb + h * stride_qh + first_q * stride_qm
    k_ptr += b * stride_kb + h // group * stride_kh + first_k * stride_kn
    v_ptr += b * stride_vb + h // group * stride_vh + first_k * stride_vn
    k_ptrs = tile_ptrs(k_ptr, offs_n, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, offs_n, stride_vn, stride_vd, BLOCK_DV)
    strip_ptr = strip_of_head(strip_ptr, b, h, stride_sb, stride_sh, zero, HAS_BIAS)
    key_mask_ptr += b * len_k if HAS_MASK else 0
    key_positions_ptr += b * stride_pkb if HAS_POSITIONS else 0
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    if HAS_POSITIONS:
        rows = position_rows(query_positions_ptr, b, stride_pqb, offs_m, len_q, HAS_POSITIONS)
    q_ptrs = tile_ptrs(q_ptr, offs_m, stride_qm, stride_qd, BLOCK_D)
    q = load_tile(q_ptrs, offs_m, len_q, False, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    m_i = tl.full([BLOCK_M], NO_SCORE, tl.float32)  # bits
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT_ROUNDS > 0 else 0

    if HAS_POSITIONS:
        edges = all_blocks(len_k, BLOCK_N)
    else:
        edges = block_ranges(start_m, len_k, band_lo, band_hi, near_lo, near_hi, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        if (FAR_LEFT, NEAR, FAR_RIGHT, not EVEN_N)[part]:
            bias = 0.0
            if part % 2 == 0:
                bias = far_bias(strip_ptr + (near_hi, 0, near_lo)[part], scale_log2, HAS_BIAS, BIAS_IN_ACC)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, rows, k_ptrs, v_ptrs, stride_kn, stride_vn, key_mask_ptr, key_positions_ptr,
                strip_ptr, edges[part], edges[part + 1], start_m, len_k, bias, scale_log2, band_lo, band_hi,
                near_lo, near_hi, seed, head, largest_dropped,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, part < 3, HAS_BIAS, BIAS_IN_ACC,
                HAS_MASK, HAS_POSITIONS, DROPOUT_ROUNDS, part % 2 == 1, USE_ASM, PRECISION, WAIT,
            )  # fmt: skip

    is_empty = l_i == 0.0
    acc = tl.where(is_empty[:, None], 0.0, acc / tl.where(is_empty, 1.0, l_i)[:, None])
    if DROPOUT_ROUNDS > 0:
        acc *= kept_scale
    out_ptr += b * stride_ob + h * stride_oh + first_q * stride_om
    out_ptrs = tile_ptrs(out_ptr, offs_m, stride_om, stride_od, BLOCK_DV)
    store_tile(out_ptrs, acc, offs_m, len_q, HEAD_DIM_V, BLOCK_DV)
    mask_m = offs_m < len_q
    tl.store(row_max_ptr + row + offs_m, m_i, mask=mask_m)
    tl.store(row_sum_ptr + row + offs_m, l_i, mask=mask_m)
    lse = (m_i + tl.math.log2(tl.where(is_empty, 1.0, l_i))) * LN_2
    tl.store(lse_ptr + row + offs_m, tl.where(is_empty, float("-inf"), lse), mask=mask_m)
