"""The table's gradient without atomic adds: one program owns a diagonal of tiles and adds them in a fixed order.

dbias[offset] = sum of dS along the offset's diagonal, over batch and over the heads that share the table
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS
from triton_offset_bias.backends.triton.kernels.blocks import counted, first_position, sequence_keys, sequence_rows
from triton_offset_bias.backends.triton.kernels.scores import (
    dropout_factors,
    dropping_of,
    gate_of_head,
    gate_rows,
    kept_keys,
    load_rows,
    of_sequence,
    probabilities,
    row_stride,
    rows_of_head,
    score_tile,
    score_unit,
    scoring_of,
    shift_in_strip,
    slope_weights,
)
from triton_offset_bias.backends.triton.kernels.tiles import (
    first_element,
    load_tile,
    product,
    split_diagonals,
    tile_ptrs,
)


@triton.jit(do_not_specialize=INTEGERS)
def dbias_kernel(
    inputs, dout_ptr, row_ptrs, parts_ptr,
    strides,
    num_heads, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi,
    factors, dropout,
    batch, table_rows, first_distance, num_distances, num_parts,
    FORM: tl.constexpr, LOOPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the sums along the diagonals of one part of a diagonal of tiles, for one row of the table, in one order.

    The tiles lie `distance` blocks from the strip's offset 0; distances count from first_distance. Where sequences
    have lengths of their own, tiles begin up to BLOCK - 1 rows above the first query, so that one distance is one
    diagonal in all of them.
    parts, (num_parts, *table_rows, num_distances, 2, BLOCK): first the sums of the BLOCK offsets before the
    diagonal's, then the sums of the BLOCK offsets from the diagonal's on. A part has a share of each sequence's tiles.
    Of LOOPS only REST counts: without it lengths are multiples of 16.
    """
    sizes, bounds = counted(
        num_heads, len_q, len_k, rows_q, rows_k, zero, band_lo, band_hi, near_lo, near_hi, FORM, LOOPS
    )
    distance = first_distance + tl.program_id(0) % num_distances
    bias_row = tl.program_id(0) // num_distances % (table_rows.b * table_rows.h)
    part = tl.program_id(0) // num_distances // (table_rows.b * table_rows.h)
    first_b = bias_row // table_rows.h  # 0 if all sequences share the table; so with heads
    first_h = bias_row % table_rows.h
    num_h = sizes.num_heads // table_rows.h
    rows = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    scale_log2 = factors.scale_log2
    scoring = scoring_of(
        inputs, first_b.to(tl.int64), first_h.to(tl.int64), strides.strip, bounds, scale_log2, 0.0, FORM
    )
    unit = score_unit(scale_log2, FORM, True)
    for index in range(0, batch // table_rows.b):
        b = (first_b + index).to(tl.int64)
        first_q, seq_q = sequence_rows(inputs.cu_seqlens_q, b, sizes.len_q, sizes.rows_q, FORM.IS_PACKED)
        first_k, seq_k = sequence_keys(inputs, b, sizes, FORM)
        first_row = b * sizes.num_heads * row_stride(sizes.rows_q)
        if FORM.IS_PACKED:
            first_row = first_q
        first = first_position(inputs, b, seq_q, seq_k, sizes, FORM)
        above = (first % BLOCK + BLOCK) % BLOCK  # rows that the first tile begins above the first query
        blocks = distance - (first - above) // BLOCK  # that the tiles lie from the sequence's first one
        shift = blocks * BLOCK - above
        first_m = tl.maximum(blocks, 0)
        tiles = tl.minimum(tl.cdiv(seq_q + above, BLOCK) - first_m, tl.cdiv(seq_k, BLOCK) - (first_m - blocks))
        if (shift + first + BLOCK - 1 < bounds.band_lo) | (shift + first - BLOCK + 1 > bounds.band_hi):
            tiles = 0
        tiles = tl.maximum(tiles, 0)
        share = tl.cdiv(num_h * tiles, num_parts)
        for i in range(part * share, tl.minimum((part + 1) * share, num_h * tiles)):
            h = (first_h + i // tiles).to(tl.int64)
            h_kv = h // sizes.group
            start_m = (first_m + i % tiles) * BLOCK - above
            offs_n = start_m - shift + rows
            offs_m = tl.where(start_m + rows < 0, seq_q, start_m + rows)  # those above do not exist either
            q_head = inputs.q + first_element(strides.q, b, h, first_q)
            k_head = inputs.k + first_element(strides.k, b, h_kv, first_k)
            v_head = inputs.v + first_element(strides.v, b, h_kv, first_k)
            dout_head = dout_ptr + first_element(strides.dout, b, h, first_q)
            q_ptrs = tile_ptrs(q_head, offs_m, strides.q.row, strides.q.d, FORM.BLOCK_D)
            k_ptrs = tile_ptrs(k_head, offs_n, strides.k.row, strides.k.d, FORM.BLOCK_D)
            v_ptrs = tile_ptrs(v_head, offs_n, strides.v.row, strides.v.d, FORM.BLOCK_DV)
            dout_ptrs = tile_ptrs(dout_head, offs_m, strides.dout.row, strides.dout.d, FORM.BLOCK_DV)
            q = load_tile(q_ptrs, offs_m, seq_q, False, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK, BLOCK_D)
            k = load_tile(k_ptrs, offs_n, seq_k, False, FORM.HEAD_DIM, FORM.BLOCK_D)
            v = load_tile(v_ptrs, offs_n, seq_k, False, FORM.HEAD_DIM_V, FORM.BLOCK_DV)  # (BLOCK, BLOCK_DV)
            dout = load_tile(dout_ptrs, offs_m, seq_q, False, FORM.HEAD_DIM_V, FORM.BLOCK_DV)
            stats = load_rows(
                rows_of_head(row_ptrs, first_row + h * row_stride(sizes.rows_q)), offs_m, seq_q, False, FORM
            )
            mask_ptr = of_sequence(inputs.key_mask, b * sizes.len_k, FORM.HAS_MASK)
            keep = kept_keys(mask_ptr, offs_n, seq_k, FORM.HAS_MASK)[None, :]
            strip_shift = shift_in_strip(shift + first, bounds)
            offsets = rows.to(tl.int64)
            gate = 1.0
            if FORM.HAS_GATE:
                gate = gate_rows(gate_of_head(inputs, b, h, sizes, first_q, FORM), offs_m, seq_q, FORM)[:, None]
            s = score_tile(
                q, k.T, scoring, gate, strip_shift, offsets, -offsets, keep, FORM, True, True
            )  # (BLOCK, BLOCK)
            p = probabilities(s, unit, 0.0, stats.lse[:, None], stats.log_sum[:, None], FORM, True)
            dp = product(dout, v.T, None, FORM.PRECISION)
            if FORM.DROPOUT_ROUNDS > 0:
                dropping = dropping_of(inputs, b, h, sizes.num_heads, dropout, dropout.kept_scale, FORM)
                dp *= dropout_factors(dropping, 0, 0, offs_m[:, None], offs_n[None, :], FORM)
            ds = p * (dp * slope_weights(stats, FORM)[:, None] - stats.delta[:, None])
            total += ds * gate if FORM.HAS_GATE else ds
    ending, going_on = split_diagonals(total, False, BLOCK, BLOCK)
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * BLOCK)
    tl.store(parts_ptr + rows, going_on)
    tl.store(parts_ptr + BLOCK + rows, ending)
