"""The backward pass, with the scores recomputed:

    P = exp(S - lse)      dP = dO V^T      delta = <dO, O> - dlse      dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO      dbias[offset] = sum of dS along the offset's diagonal

FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2, as one kernel a block of queries (dQ and dbias) and one a
block of keys (dK and dV), so that only dbias is shared between programs. Its sums are atomic, or, to be deterministic,
those of a third kernel with one program a diagonal of tiles.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.tiles import (
    block_ranges,
    kept_keys,
    load_tile,
    offset_0,
    probabilities,
    product,
    score_tile,
    store_tile,
    sum_diagonals,
    tile_ptrs,
)


@triton.jit
def prepare_kernel(
    out_ptr, dout_ptr, dlse_ptr, row_max_ptr, row_sum_ptr,
    lse_bits_ptr, log_sum_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_gb, stride_gh, stride_gm, stride_gd,
    num_heads, len_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta, and the log-sum-exp in bits, +inf for a row that attends to nothing: its P and dS are then 0.

    SPLIT_LSE: lse_bits holds the maximum alone, and log_sum the rest, which float32 would lose in adding them.
    """
    num_blocks = tl.cdiv(len_q, BLOCK_M)
    head = tl.program_id(0) // num_blocks
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    offs_m = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = offs_m.to(tl.int64)
    mask_m = offs_m < len_q
    out_ptr += b * stride_ob + h * stride_oh
    dout_ptr += b * stride_gb + h * stride_gh
    out_ptrs = tile_ptrs(out_ptr, rows, stride_om, stride_od, BLOCK_DV)
    dout_ptrs = tile_ptrs(dout_ptr, rows, stride_gm, stride_gd, BLOCK_DV)
    out = load_tile(out_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV).to(tl.float32)  # (BLOCK_M, BLOCK_DV)
    dout = load_tile(dout_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    row = head.to(tl.int64) * len_q + offs_m
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=mask_m, other=0.0)
    row_sum = tl.load(row_sum_ptr + row, mask=mask_m, other=0.0)
    is_empty = row_sum == 0.0
    log_sum = tl.math.log2(tl.where(is_empty, 1.0, row_sum))
    lse_bits = tl.load(row_max_ptr + row, mask=mask_m, other=0.0)
    if SPLIT_LSE:
        tl.store(log_sum_ptr + row, log_sum, mask=mask_m)
    else:
        lse_bits += log_sum
    tl.store(lse_bits_ptr + row, tl.where(is_empty, float("inf"), lse_bits), mask=mask_m)
    tl.store(delta_ptr + row, tl.where(is_empty, 0.0, delta), mask=mask_m)


@triton.jit
def _sweep_keys(
    dq, far_sum, q, dout, lse, log_sum, delta, k_ptrs, v_ptrs, stride_kn, stride_vn, key_mask_ptr,
    strip_ptr, dstrip_ptr, begin, end, start_m, len_k, scale_log2, band_lo, band_hi,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, DBIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, IS_NEAR: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries from the keys [begin, end); near, their diagonals go to dstrip, else into far_sum."""
    rows = tl.arange(0, BLOCK).to(tl.int64)
    columns = -tl.arange(0, BLOCK).to(tl.int64)
    unit = 1.0 if IS_NEAR and HAS_BIAS else scale_log2  # from what score_tile gives to bits
    previous = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start_n in range(begin, end, BLOCK):
        start_n = tl.multiple_of(start_n, BLOCK)
        offs_n = start_n + tl.arange(0, BLOCK)
        step = start_n.to(tl.int64)
        k = load_tile(k_ptrs + step * stride_kn, offs_n, len_k, EVEN_N, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
        v = load_tile(v_ptrs + step * stride_vn, offs_n, len_k, EVEN_N, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
        keep = kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK)[None, :]
        s = score_tile(
            q, k.T, strip_ptr + (start_m - start_n), rows, columns, keep, scale_log2,
            band_lo - (start_m - start_n), band_hi - (start_m - start_n),
            HAS_BIAS, IS_NEAR, HAS_MASK or not EVEN_N, USE_ASM, PRECISION,
        )  # (BLOCK, BLOCK)  # fmt: skip
        p = probabilities(s * unit, lse[:, None], log_sum[:, None], SPLIT_LSE)
        dp = product(dout, v.T, None, PRECISION)
        ds = p * (dp - delta[:, None])
        if DBIAS != "none" and not IS_NEAR:
            far_sum += ds
        elif DBIAS == "diagonals":
            diagonals = sum_diagonals(previous, ds, BLOCK)
            tl.atomic_add(dstrip_ptr + (start_m - start_n) + tl.arange(0, BLOCK), diagonals, sem="relaxed")
            previous = ds
        elif DBIAS == "elements":
            ptrs = dstrip_ptr + (start_m - start_n) + (rows[:, None] + columns[None, :])
            tl.atomic_add(ptrs, ds, sem="relaxed")
        dq = product(ds.to(k.dtype), k, dq, PRECISION)
    if DBIAS == "diagonals" and IS_NEAR:
        diagonals = sum_diagonals(previous, tl.zeros([BLOCK, BLOCK], tl.float32), BLOCK)
        tl.atomic_add(dstrip_ptr + (start_m - end) + tl.arange(0, BLOCK), diagonals, sem="relaxed")
    return dq, far_sum


@triton.jit
def dquery_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, strip_ptr, key_mask_ptr, lse_bits_ptr, log_sum_ptr, delta_ptr,
    dq_ptr, dstrip_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    stride_sb, stride_sh,
    num_heads, group, len_q, len_k,
    band_lo, band_hi, near_lo, near_hi, scale, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DQ: tl.constexpr, DBIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: dQ, and its part of dbias. Tensors as in forward_kernel, dout and dq as q.

    DBIAS: "none" | "diagonals", BLOCK atomic adds a near tile | "elements", one for every score.
    """
    num_blocks = tl.cdiv(len_q, BLOCK)
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK
    head = tl.program_id(0) // num_blocks
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, BLOCK)
    rows = offs_m.to(tl.int64)
    mask_m = offs_m < len_q
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // group * stride_kh
    v_ptr += b * stride_vb + h // group * stride_vh
    dout_ptr += b * stride_gb + h * stride_gh
    if HAS_BIAS:
        strip_ptr = offset_0(strip_ptr, b, h, stride_sb, stride_sh, len_k)
    if DBIAS != "none":
        dstrip_ptr = offset_0(dstrip_ptr, b, h, stride_sb, stride_sh, len_k)
    if HAS_MASK:
        key_mask_ptr += b * len_k
    k_ptrs = tile_ptrs(k_ptr, offs_n, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, offs_n, stride_vn, stride_vd, BLOCK_DV)
    q_ptrs = tile_ptrs(q_ptr, rows, stride_qm, stride_qd, BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr, rows, stride_gm, stride_gd, BLOCK_DV)
    q = load_tile(q_ptrs, offs_m, len_q, False, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
    dout = load_tile(dout_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
    row = head.to(tl.int64) * len_q + offs_m
    lse = tl.load(lse_bits_ptr + row, mask=mask_m, other=float("inf"))
    log_sum = tl.load(log_sum_ptr + row, mask=mask_m, other=0.0) if SPLIT_LSE else lse
    delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)

    edges = block_ranges(start_m, len_k, band_lo, band_hi, near_lo, near_hi, BLOCK, BLOCK)
    for part in tl.static_range(3):
        if (FAR_LEFT, NEAR, FAR_RIGHT)[part]:
            far_end = (near_hi, near_hi, near_lo)[part]
            far_sum = tl.zeros([BLOCK, BLOCK], tl.float32)  # a sum for every element: no exchange between threads
            shifted = lse
            if HAS_BIAS and part != 1:
                shifted = lse - tl.load(strip_ptr + far_end)
            dq, far_sum = _sweep_keys(
                dq, far_sum, q, dout, shifted, log_sum, delta, k_ptrs, v_ptrs, stride_kn, stride_vn, key_mask_ptr,
                strip_ptr, dstrip_ptr, edges[part], edges[part + 1], start_m, len_k, scale_log2, band_lo, band_hi,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK, EVEN_N, HAS_BIAS, DBIAS, HAS_MASK, part == 1,
                USE_ASM, PRECISION, SPLIT_LSE,
            )  # fmt: skip
            if DBIAS != "none" and part != 1:
                tl.atomic_add(dstrip_ptr + far_end, tl.sum(tl.sum(far_sum, 1), 0), sem="relaxed")

    if HAS_DQ:
        dq_ptr += b * stride_dqb + h * stride_dqh
        dq_ptrs = tile_ptrs(dq_ptr, rows, stride_dqm, stride_dqd, BLOCK_D)
        store_tile(dq_ptrs, dq * scale, offs_m, len_q, HEAD_DIM, BLOCK_D)


@triton.jit
def _sweep_queries(
    dk, dv, k, v, keep, q_ptrs, dout_ptrs, stride_qm, stride_gm, lse_ptr, log_sum_ptr, delta_ptr, strip_ptr,
    begin, end, start_n, len_q, far_bias, scale_log2, band_lo, band_hi,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, EVEN_M: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    IS_NEAR: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys from the queries [begin, end); scores are transposed, (keys, queries)."""
    rows = -tl.arange(0, BLOCK).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    unit = 1.0 if IS_NEAR and HAS_BIAS else scale_log2  # from what score_tile gives to bits
    for start_m in range(begin, end, BLOCK):
        start_m = tl.multiple_of(start_m, BLOCK)
        offs_m = start_m + tl.arange(0, BLOCK)
        step = start_m.to(tl.int64)
        q = load_tile(q_ptrs + step * stride_qm, offs_m, len_q, EVEN_M, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
        dout = load_tile(dout_ptrs + step * stride_gm, offs_m, len_q, EVEN_M, HEAD_DIM_V, BLOCK_DV)
        if EVEN_M:
            lse = tl.load(lse_ptr + offs_m)
            log_sum = tl.load(log_sum_ptr + offs_m) if SPLIT_LSE else lse
            delta = tl.load(delta_ptr + offs_m)
        else:
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < len_q, other=float("inf"))
            log_sum = tl.load(log_sum_ptr + offs_m, mask=offs_m < len_q, other=0.0) if SPLIT_LSE else lse
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < len_q, other=0.0)
        s = score_tile(
            k, q.T, strip_ptr + (start_m - start_n), rows, columns, keep[:, None], scale_log2,
            band_lo - (start_m - start_n), band_hi - (start_m - start_n),
            HAS_BIAS, IS_NEAR, HAS_MASK, USE_ASM, PRECISION,
        )  # (BLOCK, BLOCK)  # fmt: skip
        p = probabilities(s * unit, (lse - far_bias)[None, :], log_sum[None, :], SPLIT_LSE)
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
    EVEN_M: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    HAS_MASK: tl.constexpr, FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key head, against every query head that shares it: dK and dV."""
    num_blocks = tl.cdiv(len_k, BLOCK)
    start_n = tl.program_id(0) % num_blocks * BLOCK
    head = tl.program_id(0) // num_blocks
    num_kv_heads = num_heads // group
    b = (head // num_kv_heads).to(tl.int64)
    h_kv = (head % num_kv_heads).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK)
    offs_m = tl.arange(0, BLOCK)
    keys = offs_n.to(tl.int64)
    k_ptrs = tile_ptrs(k_ptr + b * stride_kb + h_kv * stride_kh, keys, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr + b * stride_vb + h_kv * stride_vh, keys, stride_vn, stride_vd, BLOCK_DV)
    k = load_tile(k_ptrs, offs_n, len_k, False, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
    v = load_tile(v_ptrs, offs_n, len_k, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
    if HAS_MASK:
        key_mask_ptr += b * len_k
    keep = kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_DV], tl.float32)

    edges = block_ranges(start_n, len_q, -band_hi, -band_lo, -near_hi, -near_lo, BLOCK, BLOCK)
    for g in range(0, group):
        h = h_kv * group + g
        q_ptrs = tile_ptrs(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, stride_qd, BLOCK_D)
        dout_ptrs = tile_ptrs(dout_ptr + b * stride_gb + h * stride_gh, offs_m, stride_gm, stride_gd, BLOCK_DV)
        row = (b * num_heads + h) * len_q
        head_strip_ptr = strip_ptr
        if HAS_BIAS:
            head_strip_ptr = offset_0(strip_ptr, b, h, stride_sb, stride_sh, len_k)
        for part in tl.static_range(3):  # queries go up, so their offsets do: far right of the query comes first
            if (FAR_RIGHT, NEAR, FAR_LEFT)[part]:
                far_bias = 0.0
                if HAS_BIAS and part != 1:
                    far_bias = tl.load(head_strip_ptr + (near_lo, near_lo, near_hi)[part])
                dk, dv = _sweep_queries(
                    dk, dv, k, v, keep, q_ptrs, dout_ptrs, stride_qm, stride_gm, lse_bits_ptr + row, log_sum_ptr + row,
                    delta_ptr + row,
                    head_strip_ptr, edges[part], edges[part + 1],
                    start_n, len_q, far_bias, scale_log2, band_lo, band_hi,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK, EVEN_M, HAS_BIAS, HAS_MASK, part == 1,
                    USE_ASM, PRECISION, SPLIT_LSE,
                )  # fmt: skip

    if HAS_DK:
        dk_ptrs = tile_ptrs(dk_ptr + b * stride_dkb + h_kv * stride_dkh, keys, stride_dkn, stride_dkd, BLOCK_D)
        store_tile(dk_ptrs, dk * scale, offs_n, len_k, HEAD_DIM, BLOCK_D)
    if HAS_DV:
        dv_ptrs = tile_ptrs(dv_ptr + b * stride_dvb + h_kv * stride_dvh, keys, stride_dvn, stride_dvd, BLOCK_DV)
        store_tile(dv_ptrs, dv, offs_n, len_k, HEAD_DIM_V, BLOCK_DV)


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
    HAS_MASK: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT_LSE: tl.constexpr,
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
    strip_ptr = offset_0(strip_ptr, first_b.to(tl.int64), first_h.to(tl.int64), stride_sb, stride_sh, len_k) + shift
    for i in range(0, num_b * num_h * tiles):
        head = i // tiles
        b = (first_b + head // num_h).to(tl.int64)
        h = (first_h + head % num_h).to(tl.int64)
        offs_m = (first_m + i % tiles) * BLOCK + rows
        offs_n = offs_m - shift
        queries = offs_m.to(tl.int64)
        keys = offs_n.to(tl.int64)
        q_ptrs = tile_ptrs(q_ptr + b * stride_qb + h * stride_qh, queries, stride_qm, stride_qd, BLOCK_D)
        k_ptrs = tile_ptrs(k_ptr + b * stride_kb + h // group * stride_kh, keys, stride_kn, stride_kd, BLOCK_D)
        v_ptrs = tile_ptrs(v_ptr + b * stride_vb + h // group * stride_vh, keys, stride_vn, stride_vd, BLOCK_DV)
        dout_ptrs = tile_ptrs(dout_ptr + b * stride_gb + h * stride_gh, queries, stride_gm, stride_gd, BLOCK_DV)
        q = load_tile(q_ptrs, offs_m, len_q, False, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
        k = load_tile(k_ptrs, offs_n, len_k, False, HEAD_DIM, BLOCK_D)
        v = load_tile(v_ptrs, offs_n, len_k, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
        dout = load_tile(dout_ptrs, offs_m, len_q, False, HEAD_DIM_V, BLOCK_DV)
        row = (b * num_heads + h) * len_q + offs_m
        lse = tl.load(lse_bits_ptr + row, mask=offs_m < len_q, other=float("inf"))
        log_sum = tl.load(log_sum_ptr + row, mask=offs_m < len_q, other=0.0) if SPLIT_LSE else lse
        delta = tl.load(delta_ptr + row, mask=offs_m < len_q, other=0.0)
        keep = kept_keys(key_mask_ptr + b * len_k if HAS_MASK else key_mask_ptr, offs_n, len_k, HAS_MASK)[None, :]
        s = score_tile(
            q, k.T, strip_ptr, rows.to(tl.int64), -rows.to(tl.int64), keep, scale_log2, band_lo, band_hi,
            True, True, True, USE_ASM, PRECISION,
        )  # (BLOCK, BLOCK), bits  # fmt: skip
        p = probabilities(s, lse[:, None], log_sum[:, None], SPLIT_LSE)
        total += p * (product(dout, v.T, None, PRECISION) - delta[:, None])
    none = tl.zeros([BLOCK, BLOCK], tl.float32)
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * BLOCK)
    tl.store(parts_ptr + rows, sum_diagonals(total, none, BLOCK))
    tl.store(parts_ptr + BLOCK + rows, sum_diagonals(none, total, BLOCK))
