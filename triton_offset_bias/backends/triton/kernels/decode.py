"""Few queries against many keys: the keys are split among programs, whose results are combined by a second kernel.

    O = sum over splits of exp(m_s - m) O_s / sum over splits of exp(m_s - m) l_s      m = max m_s

where m_s, l_s and O_s are a split's running maximum, sum and unnormalised output (flash-decoding). All query heads that
share a key head are rows of one block, so that keys and values are read once.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS, Bounds, Dropping, Sizes
from triton_offset_bias.backends.triton.kernels.blocks import edges_of, head_of, sequence_of, sequence_rows
from triton_offset_bias.backends.triton.kernels.forward import attend
from triton_offset_bias.backends.triton.kernels.scores import (
    LN_2,
    NO_SCORE,
    gate_of_head,
    gate_rows,
    key_tiles,
    position_rows,
    query_positions,
    scoring_of,
)
from triton_offset_bias.backends.triton.kernels.tiles import first_element, load_tile, store_tile, tile_ptrs


@triton.jit(do_not_specialize=INTEGERS)
def decode_kernel(
    inputs, parts,
    strides,
    num_heads, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi,
    factors, batch, num_splits,
    FORM: tl.constexpr, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the results of all queries of one key head with one split of its keys, without dropout.

    Tensors are as in `forward_kernel`.
    """
    BLOCK_DV: tl.constexpr = FORM.BLOCK_DV
    sizes = Sizes(num_heads, FORM.GROUP, len_q, len_k, rows_q, rows_k)
    bounds = Bounds(zero, band_lo, band_hi, near_lo, near_hi)
    split = tl.program_id(0) % num_splits
    head_kv = head_of(tl.program_id(0) // num_splits, sizes.num_heads // sizes.group)
    b = head_kv.b
    g = tl.arange(0, BLOCK_M) // sizes.len_q
    offs_m = tl.arange(0, BLOCK_M) % sizes.len_q
    h = head_kv.h * sizes.group + tl.minimum(g, sizes.group - 1)
    part_rows = ((split * batch + b) * sizes.num_heads + h) * sizes.len_q + offs_m
    sequence = sequence_of(inputs, b, sizes, bounds, FORM)
    keys = key_tiles(inputs, sizes, sequence, sequence.len_k, b, head_kv.h, strides, FORM, BLOCK_N)
    gate = gate_rows(gate_of_head(inputs, b, h, sizes, sequence.first_q, FORM), offs_m, sequence.len_q, FORM)
    scoring = scoring_of(inputs, b, h, strides.strip, sequence.bounds, factors.scale_log2, gate, FORM)  # of each row
    rows = offs_m.to(tl.int64)
    if FORM.HAS_POSITIONS:
        rows = position_rows(query_positions(inputs, b, sizes, FORM), offs_m, sizes.len_q)
    q_ptr = inputs.q + first_element(strides.q, b, 0, sequence.first_q)
    q_rows = h * strides.q.h + offs_m.to(tl.int64) * strides.q.row
    q_ptrs = tile_ptrs(q_ptr, q_rows, 1, strides.q.d, FORM.BLOCK_D)
    exists = (g < sizes.group) & (offs_m < sequence.len_q)
    q = load_tile(q_ptrs, tl.where(exists, 0, 1), 1, False, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK_M, BLOCK_D)
    m_i = tl.full([BLOCK_M], NO_SCORE, tl.float32)  # bits
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    edges = edges_of(0, sequence.len_k, sequence.bounds, BLOCK_M, BLOCK_N, FORM)
    keys_per_split = tl.cdiv((edges[4] - edges[0]) // BLOCK_N, num_splits) * BLOCK_N
    first = edges[0] + split * keys_per_split
    for part in tl.static_range(4):
        if LOOPS[part]:
            begin = tl.minimum(tl.maximum(edges[part], first), first + keys_per_split)
            end = tl.minimum(tl.maximum(edges[part + 1], first), first + keys_per_split)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, rows, keys, scoring, begin, end, 0, Dropping(0, 0, 0, 1.0, 0, 0),
                FORM, BLOCK_M, BLOCK_N, part,
            )  # fmt: skip

    exists = g < sizes.group
    part_ptrs = tile_ptrs(parts.acc, part_rows, FORM.HEAD_DIM_V, 1, FORM.BLOCK_DV)
    store_tile(part_ptrs, acc, tl.where(exists, 0, 1), 1, FORM.HEAD_DIM_V, FORM.BLOCK_DV)
    tl.store(parts.max + part_rows, m_i, mask=exists)
    tl.store(parts.sum + part_rows, l_i, mask=exists)


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(
    parts, cu_seqlens_q_ptr, outputs, out_strides,
    num_heads, len_q, rows_q, batch, num_splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, IS_PACKED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Combines the splits of one query of one head, and writes its results. Tensors are as in `decode_kernel`."""
    i = tl.program_id(0) % len_q
    head = head_of(tl.program_id(0) // len_q, num_heads)
    first_q, seq_q = sequence_rows(cu_seqlens_q_ptr, head.b, len_q, rows_q, IS_PACKED)
    offs_s = tl.arange(0, BLOCK_S)
    part_rows = ((offs_s.to(tl.int64) * batch + head.b) * num_heads + head.h) * len_q + i
    exists = offs_s < num_splits
    part_max = tl.load(parts.max + part_rows, mask=exists, other=NO_SCORE)
    part_sum = tl.load(parts.sum + part_rows, mask=exists, other=0.0)
    part_ptrs = tile_ptrs(parts.acc, part_rows, HEAD_DIM_V, 1, BLOCK_DV)
    part_acc = load_tile(part_ptrs, offs_s, num_splits, False, HEAD_DIM_V, BLOCK_DV)  # (BLOCK_S, BLOCK_DV)
    m = tl.max(part_max, 0)
    alpha = tl.math.exp2(part_max - m)
    row_sum = tl.sum(part_sum * alpha, 0)
    is_empty = row_sum == 0.0
    acc = tl.where(is_empty, 0.0, tl.sum(part_acc * alpha[:, None], 0) / tl.where(is_empty, 1.0, row_sum))
    lse = tl.where(is_empty, float("-inf"), (m + tl.math.log2(tl.where(is_empty, 1.0, row_sum))) * LN_2)
    offs_m = i + tl.arange(0, 1)
    mask_m = offs_m < seq_q
    row = (head.b * num_heads + head.h) * rows_q
    if IS_PACKED:
        row = head.h * rows_q + first_q
    out_ptr = outputs.out + first_element(out_strides, head.b, head.h, first_q)
    out_ptrs = tile_ptrs(out_ptr, offs_m, out_strides.row, out_strides.d, BLOCK_DV)
    store_tile(out_ptrs, acc[None, :], offs_m, seq_q, HEAD_DIM_V, BLOCK_DV)
    tl.store(outputs.row_max + row + offs_m, m, mask=mask_m)
    tl.store(outputs.row_sum + row + offs_m, row_sum, mask=mask_m)
    tl.store(outputs.lse + row + offs_m, lse, mask=mask_m)
