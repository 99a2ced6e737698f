"""The backward pass, with the scores recomputed:

    P = exp(S - lse)      dP = Z * dO V^T      delta = <dO, O> - dlse      dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dV = (Z * P)^T dO
    dbias[offset] = sum of dS along the offset's diagonal

Z is dropout's factor, 1 without it. FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2, as one kernel a block
of queries (dQ and dbias, here) and one a block of keys (dK and dV, `backward_keys`), so that only dbias is shared
between programs. Its sums are atomic, or, to be deterministic, those of a third kernel with one program a diagonal of
tiles (`backward_bias`).
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
from triton_offset_bias.backends.triton.tiles import (
    add_elements,
    load_tile,
    product,
    store_tile,
    sum_diagonals,
    tile_ptrs,
    waited_for,
)

# The weights of a row sum to 1 within so much if it has one key: a score times its unit is rounded in one place, and
# fused with a subtraction in another. The second is for each bit of the row's maximum.
ONE_KEY = tl.constexpr(2.0**-15)
ONE_KEY_PER_BIT = tl.constexpr(2.0**-22)


@triton.jit
def prepare_kernel(
    out_ptr, dout_ptr, dlse_ptr, row_max_ptr, row_sum_ptr,
    lse_bits_ptr, log_sum_ptr, delta_ptr, clean_dout_ptr,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_cb, stride_ch, stride_cm, stride_cd,
    num_heads, len_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr, CLEAN_DOUT: tl.constexpr,
    SPLIT_LSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta, and the log-sum-exp in bits, +inf for a row that attends to nothing: its P and dS are then 0.

    A row whose weight lies on one key, but for ONE_KEY, has dS = P dlse: its delta is without <dO, O>, and a mark tells
    the sweeps to leave dP out (`scores.slope_weights`). Keys that are dropped so weigh less than 16-bit numbers round.
    SPLIT_LSE: lse_bits holds the maximum alone, and log_sum the rest, which float32 would lose in adding them.
    CLEAN_DOUT: clean_dout becomes dO with 0 in those rows, where a loss may well have no finite slope.
    """
    num_blocks = tl.cdiv(len_q, BLOCK_M)
    head = tl.program_id(0) // num_blocks
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    offs_m = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < len_q
    out_ptr += b * stride_ob + h * stride_oh
    dout_ptr += b * stride_gb + h * stride_gh
    out_ptrs = tile_ptrs(out_ptr, offs_m, stride_om, stride_od, BLOCK_DV)
    dout_ptrs = tile_ptrs(dout_ptr, offs_m, stride_gm, stride_gd, BLOCK_DV)
    out = load_tile(out_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV).to(tl.float32)  # (BLOCK_M, BLOCK_DV)
    dout = load_tile(dout_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    row = head.to(tl.int64) * len_q + offs_m
    row_sum = tl.load(row_sum_ptr + row, mask=mask_m, other=0.0)
    is_empty = row_sum == 0.0
    dout = tl.where(is_empty[:, None], 0.0, dout)
    log_sum = tl.math.log2(tl.where(is_empty, 1.0, row_sum))
    lse_bits = tl.load(row_max_ptr + row, mask=mask_m, other=0.0)
    if SPLIT_LSE:
        has_one_key = log_sum == 0.0
        tl.store(log_sum_ptr + row, log_sum, mask=mask_m)
    else:
        has_one_key = tl.abs(row_sum - 1.0) <= ONE_KEY + ONE_KEY_PER_BIT * tl.abs(lse_bits)
        bits = (lse_bits + log_sum).to(tl.int32, bitcast=True)
        lse_bits = tl.where(has_one_key, bits & -2, bits | 1).to(tl.float32, bitcast=True)
    delta = tl.where(has_one_key, 0.0, tl.sum(out * dout, 1))
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
    tl.store(lse_bits_ptr + row, tl.where(is_empty, float("inf"), lse_bits), mask=mask_m)
    tl.store(delta_ptr + row, tl.where(is_empty, 0.0, delta), mask=mask_m)
    if CLEAN_DOUT:
        clean_dout_ptr += b * stride_cb + h * stride_ch
        clean_ptrs = tile_ptrs(clean_dout_ptr, offs_m, stride_cm, stride_cd, BLOCK_DV)
        store_tile(clean_ptrs, dout, offs_m, len_q, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def _sweep_keys(
    dq, far_sum, q, dout, rows, lse, log_sum, weights, delta, k_ptrs, v_ptrs, stride_kn, stride_vn, key_mask_ptr,
    key_positions_ptr, strip_ptr, dstrip_ptr, begin, end, start_m, len_k, bias, scale_log2,
    band_lo, band_hi, near_lo, near_hi, seed, head, largest_dropped, kept_scale, fixed_unit,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, DBIAS: tl.constexpr,
    BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, DROPOUT_ROUNDS: tl.constexpr,
    IS_NEAR: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries from the keys [begin, end); near, their diagonals go to dstrip, else into far_sum."""
    columns = -tl.arange(0, BLOCK).to(tl.int64)
    unit = score_unit(scale_log2, HAS_BIAS, BIAS_IN_ACC, IS_NEAR)
    previous = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start_n in range(begin, end, BLOCK):
        start_n = tl.multiple_of(start_n, BLOCK)
        offs_n = start_n + tl.arange(0, BLOCK)
        shift = start_m - start_n
        if HAS_BIAS and not EVEN_N:
            shift = shift_in_strip(shift, near_lo, near_hi)
        step = start_n.to(tl.int64)
        k = load_tile(k_ptrs + step * stride_kn, offs_n, len_k, EVEN_N, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
        v = load_tile(v_ptrs + step * stride_vn, offs_n, len_k, EVEN_N, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
        keep = kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK)[None, :]
        if HAS_POSITIONS:
            columns = -position_rows(key_positions_ptr, 0, 0, offs_n, len_k, HAS_POSITIONS)
        s = score_tile(
            q, k.T, strip_ptr, shift, rows, columns, keep, scale_log2, band_lo, band_hi, near_lo, near_hi,
            HAS_BIAS, BIAS_IN_ACC, IS_NEAR, HAS_MASK or not EVEN_N, HAS_POSITIONS, USE_ASM, PRECISION, WAIT,
        )  # (BLOCK, BLOCK)  # fmt: skip
        p = probabilities(s, unit, bias, lse[:, None], log_sum[:, None], IS_NEAR, HAS_BIAS, SPLIT_LSE)
        dp = product(dout, v.T, None, PRECISION)
        if DROPOUT_ROUNDS > 0:
            m, n = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
            dp *= dropout_factors(seed, head, start_m, start_n, m, n, largest_dropped, kept_scale, DROPOUT_ROUNDS)
        ds = p * (dp * weights[:, None] - delta[:, None])
        if DBIAS != "none" and not IS_NEAR:
            far_sum += ds
        elif DBIAS == "diagonals":
            diagonals = sum_diagonals(previous, ds, BLOCK)
            tl.atomic_add(dstrip_ptr + shift + tl.arange(0, BLOCK), diagonals, sem="relaxed")
            previous = ds
        elif DBIAS != "none":
            offset = rows[:, None] + columns[None, :]
            if HAS_POSITIONS:
                offset = tl.minimum(tl.maximum(offset, near_lo), near_hi)
            else:
                offset += shift
            add_elements(dstrip_ptr + offset, ds, fixed_unit, DBIAS)
        dq = waited_for(product(ds.to(k.dtype), k, dq, PRECISION), WAIT)
    if DBIAS == "diagonals" and IS_NEAR:
        diagonals = sum_diagonals(previous, tl.zeros([BLOCK, BLOCK], tl.float32), BLOCK)
        shift = shift_in_strip(start_m - end + BLOCK, near_lo, near_hi) - BLOCK
        tl.atomic_add(dstrip_ptr + shift + tl.arange(0, BLOCK), diagonals, sem="relaxed")
    return dq, far_sum


@triton.jit(do_not_specialize=["largest_dropped"])
def dquery_kernel(
    q_ptr, k_ptr, v_ptr, strip_ptr, key_mask_ptr, query_positions_ptr, key_positions_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seed_ptr, dout_ptr, lse_bits_ptr, log_sum_ptr, delta_ptr, fixed_unit_ptr,
    dq_ptr, dstrip_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_sb, stride_sh, stride_pqb, stride_pkb,
    num_heads, group, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi, scale, scale_log2, largest_dropped, kept_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_DQ: tl.constexpr,
    DBIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_PACKED: tl.constexpr,
    DROPOUT_ROUNDS: tl.constexpr, FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: dQ, and its part of dbias. Tensors as in forward_kernel, dout and dq as q.

    DBIAS: "none" | "diagonals", BLOCK atomic adds a near tile | "elements", one for every score | "fixed", the same in
    int64 that count 1 / fixed_unit, whose sum has no order.
    """
    num_blocks = tl.cdiv(len_q, BLOCK)
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK
    head = tl.program_id(0) // num_blocks
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, BLOCK)
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
    dout_ptr += b * stride_gb + h * stride_gh + first_q * stride_gm
    strip_ptr = strip_of_head(strip_ptr, b, h, stride_sb, stride_sh, zero, HAS_BIAS)
    dstrip_ptr = strip_of_head(dstrip_ptr, b, h, stride_sb, stride_sh, zero, DBIAS != "none")
    key_mask_ptr += b * len_k if HAS_MASK else 0
    key_positions_ptr += b * stride_pkb if HAS_POSITIONS else 0
    rows = tl.arange(0, BLOCK).to(tl.int64)
    if HAS_POSITIONS:
        rows = position_rows(query_positions_ptr, b, stride_pqb, offs_m, len_q, HAS_POSITIONS)
    k_ptrs = tile_ptrs(k_ptr, offs_n, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, offs_n, stride_vn, stride_vd, BLOCK_DV)
    q_ptrs = tile_ptrs(q_ptr, offs_m, stride_qm, stride_qd, BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr, offs_m, stride_gm, stride_gd, BLOCK_DV)
    q = load_tile(q_ptrs, offs_m, len_q, False, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
    dout = load_tile(dout_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
    lse, log_sum, delta = load_rows(
        lse_bits_ptr + row, log_sum_ptr + row, delta_ptr + row, offs_m, len_q, False, SPLIT_LSE
    )
    weights = slope_weights(lse, log_sum, SPLIT_LSE)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT_ROUNDS > 0 else 0
    fixed_unit = tl.load(fixed_unit_ptr) if DBIAS == "fixed" else 0.0

    if HAS_POSITIONS:
        edges = all_blocks(len_k, BLOCK)
    else:
        edges = block_ranges(start_m, len_k, band_lo, band_hi, near_lo, near_hi, BLOCK, BLOCK)
    for part in tl.static_range(4):
        if (FAR_LEFT, NEAR, FAR_RIGHT, not EVEN_N)[part]:
            far_end = (near_hi, 0, near_lo, 0)[part]
            far_sum = tl.zeros([BLOCK, BLOCK], tl.float32)  # a sum for every element: no exchange between threads
            bias = 0.0
            if part % 2 == 0:
                bias = far_bias(strip_ptr + far_end, scale_log2, HAS_BIAS, BIAS_IN_ACC)
            dq, far_sum = _sweep_keys(
                dq, far_sum, q, dout, rows, lse, log_sum, weights, delta, k_ptrs, v_ptrs, stride_kn, stride_vn,
                key_mask_ptr, key_positions_ptr, strip_ptr, dstrip_ptr, edges[part], edges[part + 1], start_m, len_k,
                bias, scale_log2, band_lo, band_hi, near_lo, near_hi, seed, head, largest_dropped, kept_scale,
                fixed_unit,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK, part < 3, HAS_BIAS, DBIAS, BIAS_IN_ACC,
                HAS_MASK, HAS_POSITIONS, DROPOUT_ROUNDS, part % 2 == 1, USE_ASM, PRECISION, WAIT, SPLIT_LSE,
            )  # fmt: skip
            if DBIAS != "none" and part % 2 == 0:
                tl.atomic_add(dstrip_ptr + far_end, tl.sum(tl.sum(far_sum, 1), 0), sem="relaxed")

    if HAS_DQ:
        dq_ptr += b * stride_dqb + h * stride_dqh + first_q * stride_dqm
        dq_ptrs = tile_ptrs(dq_ptr, offs_m, stride_dqm, stride_dqd, BLOCK_D)
        store_tile(dq_ptrs, dq * scale, offs_m, len_q, HEAD_DIM, BLOCK_D)
