"""The forward pass: for each block of queries, one sweep over the keys with a running softmax.

    S = scale Q K^T + bias      m = max S      l = sum exp(S - m)      O = exp(S - m) V / l      lse = m + log l

Dropout multiplies exp(S - m) by Z on its way to V. FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with
exponentials of base 2.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS
from triton_offset_bias.backends.triton.kernels.blocks import (
    FAR_LEFT,
    FAR_RIGHT,
    REST,
    counted,
    edges_of,
    far_offset,
    head_of,
    sequence_of,
)
from triton_offset_bias.backends.triton.kernels.scores import (
    LN_2,
    NO_SCORE,
    dropout_factors,
    dropping_of,
    far_bias,
    gate_of_head,
    gate_rows,
    kept_keys,
    key_tiles,
    position_rows,
    query_positions,
    rounded_scores,
    score_tile,
    score_unit,
    scoring_of,
    shift_in_strip,
    with_causality_by_index,
)
from triton_offset_bias.backends.triton.kernels.tiles import (
    first_element,
    load_tile,
    product,
    store_tile,
    tile_ptrs,
    waited_for,
)


@triton.jit
def attend(
    acc, l_i, m_i, q, rows, keys, scoring, begin, end, start_m, dropping,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) of one part to the running softmax.

    rows: (BLOCK_M,) int64, the queries' positions, or their distances from the query at start_m. `acc` does not yet
    have dropout's factor on kept weights.
    """
    IS_NEAR: tl.constexpr = PART != FAR_LEFT and PART != FAR_RIGHT
    EVEN_N: tl.constexpr = PART != REST
    HAS_KEEP: tl.constexpr = FORM.HAS_MASK or FORM.IS_CAUSAL_BY_INDEX or not EVEN_N
    columns = -tl.arange(0, BLOCK_N).to(tl.int64)
    unit = score_unit(scoring.scale_log2, FORM, IS_NEAR)
    bias = far_bias(scoring, far_offset(scoring.bounds, PART), FORM, IS_NEAR)  # bits
    gate = 0.0
    if FORM.HAS_GATE:
        gate = scoring.gate[:, None]
        bias *= scoring.gate
    for start_n in range(begin, end, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        step = start_n.to(tl.int64)
        k_ptrs = keys.k_ptrs + step * keys.stride_k
        k = load_tile(k_ptrs, offs_n, keys.length, EVEN_N, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK_N, BLOCK_D)
        keep = kept_keys(keys.mask_ptr, offs_n, keys.length, FORM.HAS_MASK)[None, :]
        last_keys = keys.query_start + start_m + tl.arange(0, BLOCK_M)[:, None]
        keep = with_causality_by_index(keep, last_keys, offs_n[None, :], FORM)
        if FORM.HAS_POSITIONS:
            columns = -position_rows(keys.positions_ptr, offs_n, keys.length)
        shift = start_m - start_n
        if FORM.HAS_BIAS and not EVEN_N:
            shift = shift_in_strip(shift, scoring.bounds)
        s = score_tile(q, k.T, scoring, gate, shift, rows, columns, keep, FORM, IS_NEAR, HAS_KEEP)  # (BLOCK_M, BLOCK_N)
        p, m_new = weights(s, m_i, unit, bias, FORM, IS_NEAR)
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if FORM.DROPOUT_ROUNDS > 0:
            m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
            p *= dropout_factors(dropping, start_m, start_n, m, n, FORM)
        v_ptrs = keys.v_ptrs + step * keys.stride_v
        v = load_tile(v_ptrs, offs_n, keys.length, EVEN_N, FORM.HEAD_DIM_V, FORM.BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
        acc = waited_for(product(p.to(v.dtype), v, acc, FORM.PRECISION), FORM.WAIT)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def weights(s, m_i, unit, bias, FORM: tl.constexpr, IS_NEAR: tl.constexpr):
    """exp(S - m) of `score_tile`'s scores, (BLOCK_M, BLOCK_N), and the maximum m, which they may raise above m_i."""
    if FORM.SPLIT_LSE:
        s = rounded_scores(s, unit, (tl.zeros_like(m_i) + bias)[:, None], FORM, IS_NEAR)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.math.exp2(s - m_new[:, None])
    else:
        row_max = tl.max(s, 1) * unit
        m_new = tl.maximum(m_i, row_max if IS_NEAR else row_max + bias)
        p = tl.math.exp2(s * unit - (m_new if IS_NEAR else m_new - bias)[:, None])
    return p, m_new


@triton.jit
def normalised(acc, l_i):
    """The output: exp(S - m) V over the sum of the weights, and 0 where there are none."""
    is_empty = l_i == 0.0
    return tl.where(is_empty[:, None], 0.0, acc / tl.where(is_empty, 1.0, l_i)[:, None])


@triton.jit
def store_statistics(outputs, row, offs, mask, m_i, l_i):
    """Writes the maximum, the sum and the log-sum-exp of the rows row + offs."""
    tl.store(outputs.row_max + row + offs, m_i, mask=mask)
    tl.store(outputs.row_sum + row + offs, l_i, mask=mask)
    is_empty = l_i == 0.0
    lse = (m_i + tl.math.log2(tl.where(is_empty, 1.0, l_i))) * LN_2
    tl.store(outputs.lse + row + offs, tl.where(is_empty, float("-inf"), lse), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    inputs, outputs,
    strides,
    num_heads, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi,
    factors, dropout,
    FORM: tl.constexpr, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes output and row statistics of a block of queries of one head.

    B is 1 for packed tensors; their rows hold sequences of up to len_q queries and len_k keys. With causal attention
    the queries with the most keys start first.
    """
    BLOCK_DV: tl.constexpr = FORM.BLOCK_DV
    sizes, bounds = counted(
        num_heads, len_q, len_k, rows_q, rows_k, zero, band_lo, band_hi, near_lo, near_hi, FORM, LOOPS
    )
    num_blocks = tl.cdiv(sizes.len_q, BLOCK_M)
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = head_of(tl.program_id(0) // num_blocks, sizes.num_heads)
    start_m = block * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = head.index.to(tl.int64) * sizes.rows_q
    sequence = sequence_of(inputs, head.b, sizes, bounds, FORM)
    len_k = sequence.len_k
    if FORM.IS_PACKED:
        row = head.h * sizes.rows_q + sequence.first_q
        len_k = tl.where(start_m < sequence.len_q, len_k, 0)
    q_ptr = inputs.q + first_element(strides.q, head.b, head.h, sequence.first_q)
    keys = key_tiles(inputs, sizes, sequence, len_k, head.b, head.h // sizes.group, strides, FORM, BLOCK_N)
    gate = gate_rows(gate_of_head(inputs, head.b, head.h, sizes, sequence.first_q, FORM), offs_m, sequence.len_q, FORM)
    scoring = scoring_of(inputs, head.b, head.h, strides.strip, sequence.bounds, factors.scale_log2, gate, FORM)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    if FORM.HAS_POSITIONS:
        rows = position_rows(query_positions(inputs, head.b, sizes, FORM), offs_m, sequence.len_q)
    q_ptrs = tile_ptrs(q_ptr, offs_m, strides.q.row, strides.q.d, FORM.BLOCK_D)
    q = load_tile(q_ptrs, offs_m, sequence.len_q, False, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK_M, BLOCK_D)
    m_i = tl.full([BLOCK_M], NO_SCORE, tl.float32)  # bits
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    dropping = dropping_of(inputs, head.b, head.h, sizes.num_heads, dropout, 1.0, FORM)
    edges = edges_of(start_m, len_k, sequence.bounds, BLOCK_M, BLOCK_N, FORM)
    for part in tl.static_range(4):
        if LOOPS[part]:
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, rows, keys, scoring, edges[part], edges[part + 1], start_m, dropping,
                FORM, BLOCK_M, BLOCK_N, part,
            )  # fmt: skip

    acc = normalised(acc, l_i)
    if FORM.DROPOUT_ROUNDS > 0:
        acc *= dropout.kept_scale
    out_ptr = outputs.out + first_element(strides.out, head.b, head.h, sequence.first_q)
    out_ptrs = tile_ptrs(out_ptr, offs_m, strides.out.row, strides.out.d, FORM.BLOCK_DV)
    store_tile(out_ptrs, acc, offs_m, sequence.len_q, FORM.HEAD_DIM_V, FORM.BLOCK_DV)
    store_statistics(outputs, row, offs_m, offs_m < sequence.len_q, m_i, l_i)
