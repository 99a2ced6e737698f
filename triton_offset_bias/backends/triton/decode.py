"""Few queries against many keys: the keys are split among programs, whose results are combined by a second kernel.

    O = sum over splits of exp(m_s - m) O_s / sum over splits of exp(m_s - m) l_s      m = max m_s

where m_s, l_s and O_s are a split's running maximum, sum and unnormalised output (flash-decoding). All query heads that
share a key head are rows of one block, so that keys and values are read once.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.blocks import all_blocks, block_ranges, counted_from, sequence_rows
from triton_offset_bias.backends.triton.forward import attend
from triton_offset_bias.backends.triton.scores import LN_2, NO_SCORE, far_bias, position_rows, strip_of_head
from triton_offset_bias.backends.triton.tiles import load_tile, store_tile, tile_ptrs


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, strip_ptr, key_mask_ptr, query_positions_ptr, key_positions_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    part_acc_ptr, part_max_ptr, part_sum_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_sb, stride_sh, stride_pqb, stride_pkb,
    num_heads, group, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi, scale_log2, batch, num_splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, IS_PACKED: tl.constexpr,
    FAR_LEFT: tl.constexpr, NEAR: tl.constexpr, FAR_RIGHT: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All queries of one key head against one split of its keys. Tensors as in forward_kernel.

    part_acc (splits, B, H, len_q, DV), part_max and part_sum (splits, B, H, len_q), of the longest sequence's length.
    """
    split = tl.program_id(0) % num_splits
    head_kv = tl.program_id(0) // num_splits
    num_kv_heads = num_heads // group
    b = (head_kv // num_kv_heads).to(tl.int64)
    h_kv = (head_kv % num_kv_heads).to(tl.int64)
    g = tl.arange(0, BLOCK_M) // len_q
    offs_m = tl.arange(0, BLOCK_M) % len_q
    h = h_kv * group + tl.minimum(g, group - 1)
    part_rows = ((split * batch + b) * num_heads + h) * len_q + offs_m
    first_q, seq_q = sequence_rows(cu_seqlens_q_ptr, b, len_q, rows_q, IS_PACKED)
    first_k, seq_k = sequence_rows(cu_seqlens_k_ptr, b, len_k, rows_k, IS_PACKED)
    if IS_PACKED:
        zero, band_lo, band_hi, near_lo, near_hi = counted_from(seq_k - seq_q, zero, band_lo, band_hi, near_lo, near_hi)
    offs_n = tl.arange(0, BLOCK_N)
    k_ptr += b * stride_kb + h_kv * stride_kh + first_k * stride_kn
    v_ptr += b * stride_vb + h_kv * stride_vh + first_k * stride_vn
    k_ptrs = tile_ptrs(k_ptr, offs_n, stride_kn, stride_kd, BLOCK_D)
    v_ptrs = tile_ptrs(v_ptr, offs_n, stride_vn, stride_vd, BLOCK_DV)
    strip_ptrs = strip_of_head(strip_ptr, b, h, stride_sb, stride_sh, zero, HAS_BIAS)  # (BLOCK_M,)
    key_mask_ptr += b * len_k if HAS_MASK else 0
    key_positions_ptr += b * stride_pkb if HAS_POSITIONS else 0
    rows = offs_m.to(tl.int64)
    if HAS_POSITIONS:
        rows = position_rows(query_positions_ptr, b, stride_pqb, offs_m, len_q, HAS_POSITIONS)
    q_ptr += b * stride_qb + first_q * stride_qm
    q_ptrs = tile_ptrs(q_ptr, h * stride_qh + offs_m.to(tl.int64) * stride_qm, 1, stride_qd, BLOCK_D)
    exists = (g < group) & (offs_m < seq_q)
    q = load_tile(q_ptrs, tl.where(exists, 0, 1), 1, False, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    m_i = tl.full([BLOCK_M], NO_SCORE, tl.float32)  # bits
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    if HAS_POSITIONS:
        edges = all_blocks(seq_k, BLOCK_N)
    else:
        edges = block_ranges(0, seq_k, band_lo, band_hi, near_lo, near_hi, BLOCK_M, BLOCK_N)
    keys = tl.cdiv((edges[4] - edges[0]) // BLOCK_N, num_splits) * BLOCK_N  # a split
    first = edges[0] + split * keys
    for part in tl.static_range(4):
        if (FAR_LEFT, NEAR, FAR_RIGHT, not EVEN_N)[part]:
            bias = 0.0
            if part % 2 == 0:
                bias = far_bias(strip_ptrs + (near_hi, 0, near_lo)[part], scale_log2, HAS_BIAS, BIAS_IN_ACC)
            begin = tl.minimum(tl.maximum(edges[part], first), first + keys)
            end = tl.minimum(tl.maximum(edges[part + 1], first), first + keys)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, rows, k_ptrs, v_ptrs, stride_kn, stride_vn, key_mask_ptr, key_positions_ptr,
                strip_ptrs, begin, end, 0, seq_k, bias, scale_log2, band_lo, band_hi, near_lo, near_hi, 0, 0, 0,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, part < 3, HAS_BIAS, BIAS_IN_ACC,
                HAS_MASK, HAS_POSITIONS, 0, part % 2 == 1, USE_ASM, PRECISION, WAIT,
            )  # fmt: skip

    exists = g < group
    part_ptrs = tile_ptrs(part_acc_ptr, part_rows, HEAD_DIM_V, 1, BLOCK_DV)
    store_tile(part_ptrs, acc, tl.where(exists, 0, 1), 1, HEAD_DIM_V, BLOCK_DV)
    tl.store(part_max_ptr + part_rows, m_i, mask=exists)
    tl.store(part_sum_ptr + part_rows, l_i, mask=exists)


@triton.jit
def combine_kernel(
    part_acc_ptr, part_max_ptr, part_sum_ptr, cu_seqlens_q_ptr,
    out_ptr, row_max_ptr, row_sum_ptr, lse_ptr,
    stride_ob, stride_oh, stride_om, stride_od,
    num_heads, len_q, rows_q, batch, num_splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, IS_PACKED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One query of one head: its splits' results as one. Tensors as in the kernels before."""
    i = tl.program_id(0) % len_q
    head = tl.program_id(0) // len_q
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    first_q, seq_q = sequence_rows(cu_seqlens_q_ptr, b, len_q, rows_q, IS_PACKED)
    offs_s = tl.arange(0, BLOCK_S)
    part_rows = ((offs_s.to(tl.int64) * batch + b) * num_heads + h) * len_q + i
    exists = offs_s < num_splits
    part_max = tl.load(part_max_ptr + part_rows, mask=exists, other=NO_SCORE)
    part_sum = tl.load(part_sum_ptr + part_rows, mask=exists, other=0.0)
    part_ptrs = tile_ptrs(part_acc_ptr, part_rows, HEAD_DIM_V, 1, BLOCK_DV)
    part_acc = load_tile(part_ptrs, offs_s, num_splits, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK_S, BLOCK_DV)
    m = tl.max(part_max, 0)
    alpha = tl.math.exp2(part_max - m)
    row_sum = tl.sum(part_sum * alpha, 0)
    is_empty = row_sum == 0.0
    acc = tl.where(is_empty, 0.0, tl.sum(part_acc * alpha[:, None], 0) / tl.where(is_empty, 1.0, row_sum))
    lse = tl.where(is_empty, float("-inf"), (m + tl.math.log2(tl.where(is_empty, 1.0, row_sum))) * LN_2)
    offs_m = i + tl.arange(0, 1)
    mask_m = offs_m < seq_q
    row = (b * num_heads + h) * rows_q
    if IS_PACKED:
        row = h * rows_q + first_q
    out_ptr += b * stride_ob + h * stride_oh + first_q * stride_om
    out_ptrs = tile_ptrs(out_ptr, offs_m, stride_om, stride_od, BLOCK_DV)
    store_tile(out_ptrs, acc[None, :], offs_m, seq_q, HEAD_DIM_V, BLOCK_DV)
    tl.store(row_max_ptr + row + offs_m, m, mask=mask_m)
    tl.store(row_sum_ptr + row + offs_m, row_sum, mask=mask_m)
    tl.store(lse_ptr + row + offs_m, lse, mask=mask_m)
