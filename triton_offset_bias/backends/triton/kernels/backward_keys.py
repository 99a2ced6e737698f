"""The backward pass by blocks of keys; its mathematics are in `backward_queries`:

    dK = scale dS^T Q      dV = (Z * P)^T dO

Where `configs.backward_config` says so, the kernel computes all gradients: five products a tile instead of the seven of
two kernels. Programs then share dQ as well as dbias, and add their parts atomically to float32 sums.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import (
    INTEGERS,
    KeyBlock,
    QueryTiles,
)
from triton_offset_bias.backends.triton.kernels.blocks import (
    FAR_LEFT,
    FAR_RIGHT,
    NEAR,
    REST,
    counted,
    edges_of,
    far_offset,
    head_of,
    mirrored,
    sequence_of,
)
from triton_offset_bias.backends.triton.kernels.scores import (
    dropout_factors,
    dropping_of,
    far_bias,
    gate_of_head,
    gate_rows,
    kept_keys,
    key_positions,
    load_rows,
    of_sequence,
    position_rows,
    probabilities,
    query_positions,
    row_stride,
    rows_of_head,
    score_tile,
    score_unit,
    scoring_of,
    shift_in_strip,
    slope_weights,
    strip_of_head,
    with_causality_by_index,
)
from triton_offset_bias.backends.triton.kernels.tiles import (
    add_tile,
    first_element,
    load_tile,
    next_diagonals,
    no_diagonals,
    product,
    store_tile,
    swept_ptrs,
    thread_totals,
    tile_ptrs,
    waited_for,
)


@triton.jit
def sweep_queries(
    dk, dv, block, queries, scoring, dstrip_ptr, begin, end, dropping,
    FORM: tl.constexpr, WANTED: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds the queries [begin, end) to dK and dV of a block of keys; scores are transposed, (keys, queries).

    dQ and dbias, if they are `WANTED`, are added to the sums that all programs share. dstrip_ptr points to offset 0.
    """
    IS_NEAR: tl.constexpr = PART != FAR_LEFT and PART != FAR_RIGHT
    EVEN_M: tl.constexpr = PART != REST
    columns = tl.arange(0, BLOCK_M).to(tl.int64)
    unit = score_unit(scoring.scale_log2, FORM, IS_NEAR)
    end_bias = far_bias(scoring, far_offset(scoring.bounds, PART), FORM, IS_NEAR)  # bits
    PAIRS: tl.constexpr = 4 if FORM.STACKED or BLOCK_M < 32 else 16  # one warp's or four's
    far_sum = tl.zeros([BLOCK_N // 16, 8, PAIRS], tl.float32)
    before, carried = no_diagonals(BLOCK_N, BLOCK_M, FORM)
    for start_m in range(begin, end, BLOCK_M):
        start_m = tl.multiple_of(start_m, BLOCK_M)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        step = start_m.to(tl.int64)
        q_ptrs = queries.q_ptrs + step * queries.stride_q
        q = load_tile(q_ptrs, offs_m, queries.length, EVEN_M, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK_M, BLOCK_D)
        dout_ptrs = queries.dout_ptrs + step * queries.stride_dout
        dout = load_tile(dout_ptrs, offs_m, queries.length, EVEN_M, FORM.HEAD_DIM_V, FORM.BLOCK_DV)
        stats = load_rows(queries.row_ptrs, offs_m, queries.length, EVEN_M, FORM)
        if FORM.HAS_POSITIONS:
            columns = position_rows(queries.positions_ptr, offs_m, queries.length)
        shift = start_m - block.start
        if FORM.HAS_BIAS and not EVEN_M:
            shift = shift_in_strip(shift, scoring.bounds)
        keys = block.start + tl.arange(0, BLOCK_N)[:, None]
        keep = with_causality_by_index(block.keep[:, None], block.query_start + offs_m[None, :], keys, FORM)
        gate = gate_rows(queries.gate_ptr, offs_m, queries.length, FORM)
        bias = end_bias
        if FORM.HAS_GATE:
            gate = gate[None, :]
            bias = end_bias * gate
        s = score_tile(
            block.k, q.T, scoring, gate, shift, block.rows, columns, keep, FORM, IS_NEAR, HAS_KEEP
        )  # (BLOCK_N, BLOCK_M)
        dp = product(block.v, dout.T, None, FORM.PRECISION)  # before P, so that dO^T leaves its registers
        p = probabilities(s, unit, bias, stats.lse[None, :], stats.log_sum[None, :], FORM, IS_NEAR)
        z = 1.0
        if FORM.DROPOUT_ROUNDS > 0:
            m, n = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
            z = dropout_factors(dropping, start_m, block.start, m, n, FORM)
        dv = product((p * z).to(dout.dtype), dout, dv, FORM.PRECISION)
        ds = p * (dp * z * slope_weights(stats, FORM)[None, :] - stats.delta[None, :])
        if WANTED.DBIAS and not IS_NEAR:
            far_sum += thread_totals(ds, BLOCK_N, BLOCK_M, PAIRS)
        elif WANTED.DBIAS:
            diagonals, before, carried = next_diagonals(before, carried, ds, BLOCK_N, BLOCK_M, FORM)
        ds = ds.to(q.dtype)
        dk = product(ds, q, dk, FORM.PRECISION)
        if WANTED.DBIAS and IS_NEAR:  # after dK, whose operands load no later than an atomic add
            tl.atomic_add(dstrip_ptr + shift - tl.arange(0, BLOCK_N), diagonals, sem="relaxed")
        if WANTED.DQ:
            dq = product(ds.T, block.k, None, FORM.PRECISION)
            dq_ptrs = queries.dq_ptrs + step * queries.stride_dq
            add_tile(dq_ptrs, dq, offs_m, queries.length, EVEN_M, FORM.HEAD_DIM, FORM.USE_ASM)
        dk = waited_for(dk, FORM.WAIT)
    if WANTED.DBIAS and IS_NEAR:
        none = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        diagonals, _, _ = next_diagonals(before, carried, none, BLOCK_N, BLOCK_M, FORM)
        shift = shift_in_strip(end - BLOCK_M - block.start, scoring.bounds) + BLOCK_M
        tl.atomic_add(dstrip_ptr + shift - tl.arange(0, BLOCK_N), diagonals, sem="relaxed")
    elif WANTED.DBIAS:
        total = tl.sum(tl.sum(tl.sum(far_sum, 2), 1), 0)
        tl.atomic_add(dstrip_ptr + far_offset(scoring.bounds, PART), total, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=INTEGERS)
def dkey_dvalue_kernel(
    inputs, dout_ptr, row_ptrs, dk_ptr, dv_ptr, sums, strides,
    num_heads, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi,
    factors, dropout, num_parts,
    FORM: tl.constexpr, LOOPS: tl.constexpr, WANTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes dK and dV of a block of keys of one key head, from one part of the query heads that share it.

    With several parts dK and dV have num_parts heads for each key head: parts, whose sum they are.

    It adds the block's parts of dQ and dbias to `sums`, if they are WANTED. For dbias BLOCK_N must be a multiple of
    BLOCK_M, see `next_diagonals`. What keys beyond the last would add must be masked; without a rest there are none.
    """
    HAS_KEEP: tl.constexpr = FORM.HAS_MASK or FORM.IS_CAUSAL_BY_INDEX or (LOOPS.REST and (WANTED.DQ or WANTED.DBIAS))
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    BLOCK_DV: tl.constexpr = FORM.BLOCK_DV
    sizes, bounds = counted(
        num_heads, len_q, len_k, rows_q, rows_k, zero, band_lo, band_hi, near_lo, near_hi, FORM, LOOPS
    )
    num_blocks = tl.cdiv(sizes.len_k, BLOCK_N)
    start_n = tl.program_id(0) % num_blocks * BLOCK_N
    part = tl.program_id(0) // num_blocks % num_parts
    head_kv = head_of(tl.program_id(0) // num_blocks // num_parts, sizes.num_heads // sizes.group)
    share = tl.cdiv(sizes.group, num_parts)
    first_g, end_g = 0, 1
    if FORM.GROUP > 1:
        first_g, end_g = part * share, tl.minimum((part + 1) * share, sizes.group)
    b = head_kv.b
    offs_n = start_n + tl.arange(0, BLOCK_N)
    first_row = b * sizes.num_heads * row_stride(sizes.rows_q)
    sequence = sequence_of(inputs, b, sizes, bounds, FORM)
    len_q, len_k = sequence.len_q, sequence.len_k
    if FORM.IS_PACKED:
        first_row = sequence.first_q
    if FORM.IS_PACKED or FORM.HAS_LENGTHS:
        len_q = tl.where(start_n < len_k, len_q, 0)
    k_ptr = inputs.k + first_element(strides.k, b, head_kv.h, sequence.first_k)
    v_ptr = inputs.v + first_element(strides.v, b, head_kv.h, sequence.first_k)
    q_ptr = inputs.q + first_element(strides.q, b, 0, sequence.first_q)
    dout_ptr += first_element(strides.dout, b, 0, sequence.first_q)
    k_ptrs = tile_ptrs(k_ptr, offs_n, strides.k.row, strides.k.d, FORM.BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, offs_n, strides.v.row, strides.v.d, FORM.BLOCK_DV)
    k = load_tile(k_ptrs, offs_n, len_k, False, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v = load_tile(v_ptrs, offs_n, len_k, False, FORM.HEAD_DIM_V, FORM.BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
    keep = kept_keys(of_sequence(inputs.key_mask, b * sizes.len_k, FORM.HAS_MASK), offs_n, len_k, FORM.HAS_MASK)
    positions_ptr = query_positions(inputs, b, sizes, FORM)
    rows = -tl.arange(0, BLOCK_N).to(tl.int64)
    if FORM.HAS_POSITIONS:
        rows = -position_rows(key_positions(inputs, b, sizes, FORM), offs_n, len_k)
    block = KeyBlock(k, v, keep, rows, start_n, sizes.len_k - sizes.len_q)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    edges = edges_of(start_n, len_q, mirrored(sequence.bounds), BLOCK_N, BLOCK_M, FORM)
    for g in range(first_g, end_g):
        h = head_kv.h * sizes.group + g
        q_ptrs = swept_ptrs(q_ptr + h * strides.q.h, strides.q.row, strides.q.d, BLOCK_M, FORM.BLOCK_D)
        dout_ptrs = swept_ptrs(dout_ptr + h * strides.dout.h, strides.dout.row, strides.dout.d, BLOCK_M, FORM.BLOCK_DV)
        rows_of_queries = rows_of_head(row_ptrs, first_row + h * row_stride(sizes.rows_q))
        gate_ptr = gate_of_head(inputs, b, h, sizes, sequence.first_q, FORM)
        dq_ptrs, dq_row = 0, 0
        if WANTED.DQ:
            dq_ptr = sums.dq + first_element(strides.dq, b, h, sequence.first_q)
            dq_ptrs = swept_ptrs(dq_ptr, strides.dq.row, strides.dq.d, BLOCK_M, FORM.BLOCK_D)
            dq_row = strides.dq.row
        queries = QueryTiles(
            q_ptrs, dout_ptrs, dq_ptrs, strides.q.row, strides.dout.row, dq_row,
            rows_of_queries, gate_ptr, positions_ptr, len_q,
        )  # fmt: skip
        dstrip_ptr = strip_of_head(sums.dstrip, b, h, strides.strip, sequence.bounds.zero, WANTED.DBIAS)
        scoring = scoring_of(inputs, b, h, strides.strip, sequence.bounds, factors.scale_log2, 0.0, FORM)
        dropping = dropping_of(inputs, b, h, sizes.num_heads, dropout, dropout.kept_scale, FORM)
        for index in tl.static_range(4):  # queries go up, so their offsets do: far right of the query comes first
            if LOOPS[(FAR_RIGHT, NEAR, FAR_LEFT, REST)[index]]:
                dk, dv = sweep_queries(
                    dk, dv, block, queries, scoring, dstrip_ptr, edges[index], edges[index + 1], dropping,
                    FORM, WANTED, HAS_KEEP, BLOCK_M, BLOCK_N, (FAR_RIGHT, NEAR, FAR_LEFT, REST)[index],
                )  # fmt: skip

    if FORM.HAS_LENGTHS:  # what lies beyond has the gradient 0
        exists = (offs_n < len_k)[:, None]
        dk, dv = tl.where(exists, dk, 0.0), tl.where(exists, dv, 0.0)
        len_k = sizes.len_k
    h_out = head_kv.h * num_parts + part
    if WANTED.DK:
        dk_ptr += first_element(strides.dk, b, h_out, sequence.first_k)
        dk_ptrs = tile_ptrs(dk_ptr, offs_n, strides.dk.row, strides.dk.d, FORM.BLOCK_D)
        store_tile(dk_ptrs, dk * factors.scale, offs_n, len_k, FORM.HEAD_DIM, FORM.BLOCK_D)
    if WANTED.DV:
        dv_ptr += first_element(strides.dv, b, h_out, sequence.first_k)
        dv_ptrs = tile_ptrs(dv_ptr, offs_n, strides.dv.row, strides.dv.d, FORM.BLOCK_DV)
        store_tile(dv_ptrs, dv, offs_n, len_k, FORM.HEAD_DIM_V, FORM.BLOCK_DV)
