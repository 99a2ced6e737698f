"""The forward pass on Hopper, with loads and arithmetic in warps of their own (FlashAttention-3, arXiv:2407.08608).

One group of four warps asks the tensor memory accelerator (TMA) for tiles of keys and values. Two other groups wait for
the tiles; each of them has half of the queries, and loads its bias by itself. The mathematics and the results are those
of `kernels.forward`.

Three things are written for Triton's warp specialisation (3.6 to 3.9), which splits the queries in two halves:

* All loops are one specialised region where only values of `separated` pass from loop to loop.
* Nothing but a descriptor's coordinate may meet `start_m` as a tensor: the compiler moves the second half's coordinate
  by half a block, and with it tensors made of the same number. Rows are therefore compared with differences.
* Each loop has buffers of its own. So both kinds of far tiles share a loop, and the last tile has one stage.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS, Bounds
from triton_offset_bias.backends.triton.kernels.blocks import FAR_LEFT, FAR_RIGHT, edges_of, far_offset, head_of
from triton_offset_bias.backends.triton.kernels.forward import normalised, store_statistics, weights
from triton_offset_bias.backends.triton.kernels.scores import (
    NO_SCORE,
    far_bias,
    score_tile,
    score_unit,
    scoring_of,
    shift_in_strip,
)
from triton_offset_bias.backends.triton.kernels.tiles import first_element, identity, product


@triton.jit(do_not_specialize=INTEGERS)
def hopper_forward_kernel(
    inputs, outputs,
    strides,
    num_heads, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi,
    factors, dropout,
    FORM: tl.constexpr, LOOPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `forward_kernel` computes, from the same arguments, for tensors that descriptors can describe."""
    bounds = Bounds(zero, band_lo, band_hi, near_lo, near_hi)
    scale_log2 = factors.scale_log2
    num_blocks = tl.cdiv(len_q, BLOCK_M)
    head = head_of(tl.program_id(0) // num_blocks, num_heads)
    start_m = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    left_m = len_q - start_m  # queries that are left for this block
    h_kv = head.h // FORM.GROUP
    queries = rows_of(inputs.q, strides.q, head.b, head.h, len_q, BLOCK_M, FORM)
    keys = rows_of(inputs.k, strides.k, head.b, h_kv, len_k, BLOCK_N, FORM)
    values = rows_of(inputs.v, strides.v, head.b, h_kv, len_k, BLOCK_N, FORM)
    out = rows_of(outputs.out, strides.out, head.b, head.h, len_q, BLOCK_M, FORM)
    scoring = scoring_of(inputs, head.b, head.h, strides.strip, bounds, scale_log2, 0.0, FORM)
    q = queries.load([start_m, 0])  # (BLOCK_M, BLOCK_D)
    m_i = tl.full([BLOCK_M], NO_SCORE, tl.float32)  # bits
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, FORM.BLOCK_DV], tl.float32)
    begin, near, far, even, end = edges_of(start_m, len_k, bounds, BLOCK_M, BLOCK_N, FORM)
    if LOOPS.FAR_LEFT or LOOPS.FAR_RIGHT:
        left = far_bias(scoring, far_offset(bounds, FAR_LEFT), FORM, False)  # bits
        right = far_bias(scoring, far_offset(bounds, FAR_RIGHT), FORM, False)
        for start in tl.range(begin, near + even - far, BLOCK_N, warp_specialize=True):
            is_left = start < near
            start_n = start + tl.where(is_left, 0, far - near)
            s = product(q, keys.load([start_n, 0]).T, None, FORM.PRECISION)  # (BLOCK_M, BLOCK_N)
            bias = tl.where(is_left, left, right)
            acc, l_i, m_i = add_tile(acc, l_i, m_i, s, values, start_n, scale_log2, bias, FORM, False)
        acc, l_i, m_i = separated(acc, l_i, m_i, FORM.USE_ASM)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.arange(0, BLOCK_N).to(tl.int64) * -1  # Triton 3.6 takes 0 minus a range for multiples of its length
    unit = score_unit(scale_log2, FORM, True)
    if LOOPS.NEAR:
        for start_n in tl.range(near, far, BLOCK_N, warp_specialize=True):
            shift = start_m - start_n
            k = keys.load([start_n, 0])
            s = score_tile(q, k.T, scoring, 0.0, shift, rows, columns, None, FORM, True, False)  # (BLOCK_M, BLOCK_N)
            acc, l_i, m_i = add_tile(acc, l_i, m_i, s, values, start_n, unit, 0.0, FORM, True)
        acc, l_i, m_i = separated(acc, l_i, m_i, FORM.USE_ASM)
    if LOOPS.REST:
        for start_n in tl.range(even, end, BLOCK_N, num_stages=1, warp_specialize=True):
            shift = start_m - start_n
            if FORM.HAS_BIAS:
                shift = shift_in_strip(shift, bounds)
            keep = (tl.arange(0, BLOCK_N) < len_k - start_n)[None, :]
            k = keys.load([start_n, 0])
            s = score_tile(q, k.T, scoring, 0.0, shift, rows, columns, keep, FORM, True, True)  # (BLOCK_M, BLOCK_N)
            acc, l_i, m_i = add_tile(acc, l_i, m_i, s, values, start_n, unit, 0.0, FORM, True)
    out.store([start_m, 0], normalised(acc, l_i).to(out.dtype))
    first = head.index.to(tl.int64) * rows_q + start_m
    offs_m = tl.arange(0, BLOCK_M)
    store_statistics(outputs, first, offs_m, offs_m < left_m, m_i, l_i)


@triton.jit
def rows_of(ptr, strides, b, h, length, BLOCK: tl.constexpr, FORM: tl.constexpr):
    """The descriptor of a head's rows. Blocks read 0 past the `length` rows, and write nothing there."""
    ptr += first_element(strides, b, h, 0)
    return tl.make_tensor_descriptor(ptr, [length, FORM.HEAD_DIM], [strides.row, 1], [BLOCK, FORM.BLOCK_D])


@triton.jit
def add_tile(acc, l_i, m_i, s, values, start_n, unit, bias, FORM: tl.constexpr, IS_NEAR: tl.constexpr):
    """Adds the tile of scores `s` and the values from `start_n` on to the running softmax."""
    p, m_new = weights(s, m_i, unit, bias, FORM, IS_NEAR)
    alpha = tl.math.exp2(m_i - m_new)
    v = values.load([start_n, 0])  # (BLOCK_N, BLOCK_DV)
    return product(p.to(v.dtype), v, acc * alpha[:, None], FORM.PRECISION), l_i * alpha + tl.sum(p, 1), m_new


@triton.jit
def separated(acc, l_i, m_i, USE_ASM: tl.constexpr):
    """The running softmax, unchanged, as values that no loop returns. They take no instruction.

    A loop that begins with another loop's result stops Triton's warp specialisation with an error.
    """
    if USE_ASM:
        return identity(acc), identity(l_i), identity(m_i)
    else:
        return acc, l_i, m_i
