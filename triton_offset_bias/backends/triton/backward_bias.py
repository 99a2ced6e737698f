"""The table's gradient without atomic adds: one program owns a diagonal of tiles and adds them in a fixed order.

dbias[offset] = sum of dS along the offset's diagonal, over batch and over the heads that share the table
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.blocks import sequence_rows
from triton_offset_bias.backends.triton.scores import (
    dropout_factors,
    kept_keys,
    load_rows,
    probabilities,
    score_tile,
    score_unit,
    shift_in_strip,
    slope_weights,
    strip_of_head,
)
from triton_offset_bias.backends.triton.tiles import load_tile, product, sum_diagonals, tile_ptrs


@triton.jit(do_not_specialize=["largest_dropped"])
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, strip_ptr, key_mask_ptr, query_positions_ptr, key_positions_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, seed_ptr, dout_ptr, lse_bits_ptr, log_sum_ptr, delta_ptr,
    parts_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_sb, stride_sh, stride_pqb, stride_pkb,
    num_heads, group, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi, scale_log2, largest_dropped, kept_scale,
    batch, bias_batch, bias_heads, first_distance, num_distances,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    IS_PACKED: tl.constexpr, DROPOUT_ROUNDS: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr, SPLIT_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One diagonal of tiles of one row of the table: the sums along its diagonals, in a fixed order.

    The tiles lie `distance` blocks from the strip's offset 0, from first_distance on. So that this is the same diagonal
    in all packed sequences, their tiles begin up to BLOCK - 1 rows above the first query. parts (bias_batch,
    bias_heads, num_distances, 2, BLOCK): the offsets from there minus BLOCK, and those from there on.
    """
    distance = first_distance + tl.program_id(0) % num_distances
    bias_row = tl.program_id(0) // num_distances
    first_b = bias_row // bias_heads  # 0 if all sequences share the table; so with heads
    first_h = bias_row % bias_heads
    num_h = num_heads // bias_heads
    rows = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    strip_ptr = strip_of_head(
        strip_ptr, first_b.to(tl.int64), first_h.to(tl.int64), stride_sb, stride_sh, zero, HAS_BIAS
    )
    unit = score_unit(scale_log2, HAS_BIAS, BIAS_IN_ACC, True)
    seed = tl.load(seed_ptr) if DROPOUT_ROUNDS > 0 else 0
    for index in range(0, batch // bias_batch):
        b = (first_b + index).to(tl.int64)
        first_q, seq_q = sequence_rows(cu_seqlens_q_ptr, b, len_q, rows_q, IS_PACKED)
        first_k, seq_k = sequence_rows(cu_seqlens_k_ptr, b, len_k, rows_k, IS_PACKED)
        first = 0  # position of the first query
        first_row = b * num_heads * rows_q
        if IS_PACKED:
            first = seq_k - seq_q
            first_row = first_q
        above = (first % BLOCK + BLOCK) % BLOCK  # rows that the first tile begins above the first query
        blocks = distance - (first - above) // BLOCK  # that the tiles lie from the sequence's first one
        shift = blocks * BLOCK - above
        first_m = tl.maximum(blocks, 0)
        tiles = tl.minimum(tl.cdiv(seq_q + above, BLOCK) - first_m, tl.cdiv(seq_k, BLOCK) - (first_m - blocks))
        if (shift + first + BLOCK - 1 < band_lo) | (shift + first - BLOCK + 1 > band_hi):
            tiles = 0
        tiles = tl.maximum(tiles, 0)
        for i in range(0, num_h * tiles):
            h = (first_h + i // tiles).to(tl.int64)
            start_m = (first_m + i % tiles) * BLOCK - above
            offs_n = start_m - shift + rows
            offs_m = tl.where(start_m + rows < 0, seq_q, start_m + rows)  # those above do not exist either
            q_head = q_ptr + b * stride_qb + h * stride_qh + first_q * stride_qm
            k_head = k_ptr + b * stride_kb + h // group * stride_kh + first_k * stride_kn
            v_head = v_ptr + b * stride_vb + h // group * stride_vh + first_k * stride_vn
            dout_head = dout_ptr + b * stride_gb + h * stride_gh + first_q * stride_gm
            q_ptrs = tile_ptrs(q_head, offs_m, stride_qm, stride_qd, BLOCK_D)
            k_ptrs = tile_ptrs(k_head, offs_n, stride_kn, stride_kd, BLOCK_D)
            v_ptrs = tile_ptrs(v_head, offs_n, stride_vn, stride_vd, BLOCK_DV)
            dout_ptrs = tile_ptrs(dout_head, offs_m, stride_gm, stride_gd, BLOCK_DV)
            q = load_tile(q_ptrs, offs_m, seq_q, False, HEAD_DIM, BLOCK_D)  # (BLOCK, BLOCK_D)
            k = load_tile(k_ptrs, offs_n, seq_k, False, HEAD_DIM, BLOCK_D)
            v = load_tile(v_ptrs, offs_n, seq_k, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK, BLOCK_DV)
            dout = load_tile(dout_ptrs, offs_m, seq_q, False, HEAD_DIM_V, BLOCK_DV)
            row = first_row + h * rows_q
            lse, log_sum, delta = load_rows(
                lse_bits_ptr + row, log_sum_ptr + row, delta_ptr + row, offs_m, seq_q, False, SPLIT_LSE
            )
            keep = kept_keys(key_mask_ptr + (b * len_k if HAS_MASK else 0), offs_n, seq_k, HAS_MASK)[None, :]
            strip_shift = shift_in_strip(shift + first, near_lo, near_hi)
            s = score_tile(
                q, k.T, strip_ptr, strip_shift, rows.to(tl.int64), -rows.to(tl.int64), keep, scale_log2,
                band_lo, band_hi, near_lo, near_hi,
                HAS_BIAS, BIAS_IN_ACC, True, True, False, USE_ASM, PRECISION, WAIT,
            )  # (BLOCK, BLOCK)  # fmt: skip
            p = probabilities(s, unit, 0.0, lse[:, None], log_sum[:, None], True, HAS_BIAS, SPLIT_LSE)
            dp = product(dout, v.T, None, PRECISION)
            if DROPOUT_ROUNDS > 0:
                head = (b * num_heads + h).to(tl.int32)
                m, n = offs_m[:, None], offs_n[None, :]
                dp *= dropout_factors(seed, head, 0, 0, m, n, largest_dropped, kept_scale, DROPOUT_ROUNDS)
            total += p * (dp * slope_weights(lse, log_sum, SPLIT_LSE)[:, None] - delta[:, None])
    none = tl.zeros([BLOCK, BLOCK], tl.float32)
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * BLOCK)
    tl.store(parts_ptr + rows, sum_diagonals(total, none, BLOCK))
    tl.store(parts_ptr + BLOCK + rows, sum_diagonals(none, total, BLOCK))
