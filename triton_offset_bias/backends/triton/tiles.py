"""What forward and backward share: block ranges, tiles of rows, of scores and of bias, and the sum along diagonals.

Kernels count offsets from the first query and key: ``offset = i - j``, without `query_start`. They read the bias from a
*strip*: one fp32 number for every such offset of a head, -inf where causality or the window forbids the offset, padded
by STRIP_PAD so that tiles may overhang the score matrix on every side. Clamp, causal mask and window therefore cost no
instruction.

Scores meet the strip in one of two units. BIAS_IN_ACC: the strip counts products (bias / scale) and is what the matrix
product starts from, which costs nothing more. Else the strip is in bits (bias times log2 e) and is added afterwards.

The keys that a block of queries attends to fall into four ranges: far left | near | far right | rest. Near tiles look
up the strip; far tiles lie wholly beyond the end of the table, see one bias, and are plain attention. The rest is the
last tile if the keys do not fill it: a near one, and the only one to ask which keys exist.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
STRIP_PAD = tl.constexpr(256)  # twice the largest block
# A running maximum before any score: finite, so that -inf - it is -inf, and no more than any finite score.
NO_SCORE = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def block_ranges(start, length, band_lo, band_hi, near_lo, near_hi, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr):
    """Where the blocks of `length` others begin, turn near, turn far again, lose their evenness, and end.

    All are multiples of BLOCK_OTHER; from the fourth on, at most one block is left, which `length` cuts short. For the
    block of queries at `start` the others are keys. For a block of keys they are queries: there the offset counts
    backwards, so the bounds are passed negated and swapped.
    """
    begin = tl.maximum(start - band_hi, 0) // BLOCK_OTHER * BLOCK_OTHER
    end = tl.minimum(start + BLOCK - band_lo, length)
    end = tl.maximum(tl.cdiv(end, BLOCK_OTHER) * BLOCK_OTHER, begin)
    even = tl.maximum(tl.minimum(length // BLOCK_OTHER * BLOCK_OTHER, end), begin)
    near = tl.maximum(start + 1 - near_hi, 0) // BLOCK_OTHER * BLOCK_OTHER
    near = tl.minimum(tl.maximum(near, begin), even)
    far = tl.cdiv(tl.maximum(start + BLOCK - 1 - near_lo, 0), BLOCK_OTHER) * BLOCK_OTHER
    far = tl.minimum(tl.maximum(far, near), even)
    return begin, near, far, even, end


@triton.jit
def offset_0(strip_ptr, b, h, stride_sb, stride_sh, len_k):
    """Pointer to offset 0 in the strip of a head."""
    return strip_ptr + b * stride_sb + h * stride_sh + (STRIP_PAD + len_k - 1)


@triton.jit
def tile_ptrs(ptr, offs, stride, stride_d, BLOCK_D: tl.constexpr):
    """Pointers to the rows `offs`: (BLOCK, BLOCK_D). A tensor may have more than 2^31 elements, a tile span as many."""
    return ptr + offs.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D).to(tl.int64)[None, :] * stride_d


@triton.jit
def load_tile(ptrs, offs, length, IS_EVEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `offs` of a matrix, 0 past its `length` rows and its HEAD_DIM columns."""
    offs_d = tl.arange(0, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        if IS_EVEN:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=offs[:, None] < length, other=0.0)
    elif IS_EVEN:
        return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs, mask=(offs[:, None] < length) & (offs_d[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_tile(ptrs, tile, offs, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the rows and columns that exist."""
    mask = (offs[:, None] < length) & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def bias_tile(strip_ptr, rows, columns, USE_ASM: tl.constexpr):
    """strip[rows + columns], (R, C), of int64 rows and columns: element by element in the layout of the scores.

    With the address split into a row's and a column's part, LLVM sees which elements share a diagonal and loads each
    value once; through inline assembly because `tl.load` would be converted to another layout first.
    """
    ptrs = (strip_ptr + rows)[:, None] + columns[None, :]
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptrs], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptrs)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32; "upcast" is for Triton's interpreter, whose dot takes bfloat16 for integers."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def score_tile(
    a, b, strip_ptr, shift, rows, columns, keep, scale_log2, band_lo, band_hi,
    HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, IS_NEAR: tl.constexpr, HAS_KEEP: tl.constexpr,
    USE_ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores, (R, C), to be multiplied by score_unit, and with the bias if near and there is one.

    The offset of an element is shift + rows + columns. `keep` says which keys to attend to, where HAS_KEEP.
    """
    if IS_NEAR and HAS_BIAS:
        if BIAS_IN_ACC:
            s = product(a, b, bias_tile(strip_ptr + shift, rows, columns, USE_ASM), PRECISION)
        else:
            s = product(a, b, None, PRECISION) * scale_log2 + bias_tile(strip_ptr + shift, rows, columns, USE_ASM)
    else:
        s = product(a, b, None, PRECISION)
        if IS_NEAR:
            offset = (rows[:, None] + columns[None, :]).to(tl.int32)
            s = tl.where((offset >= band_lo - shift) & (offset <= band_hi - shift), s, float("-inf"))
    if HAS_KEEP:
        s = tl.where(keep, s, float("-inf"))
    return s


@triton.jit
def score_unit(scale_log2, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, IS_NEAR: tl.constexpr):
    """Bits in one of what score_tile gives."""
    if IS_NEAR and HAS_BIAS and not BIAS_IN_ACC:
        return 1.0
    else:
        return scale_log2


@triton.jit
def far_bias(strip_ptr, offset, scale_log2, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr):
    """The one bias of far tiles, in bits: that of `offset`."""
    if not HAS_BIAS:
        return 0.0
    elif BIAS_IN_ACC:
        return tl.load(strip_ptr + offset) * scale_log2
    else:
        return tl.load(strip_ptr + offset)


@triton.jit
def load_rows(
    lse_bits_ptr, log_sum_ptr, delta_ptr, offs, length, IS_EVEN: tl.constexpr, SPLIT_LSE: tl.constexpr
):  # fmt: skip
    """Of queries, the log-sum-exp in bits, of which SPLIT_LSE keeps the log of the sum apart, and delta.

    Past the `length` the log-sum-exp is +inf: P and dS are 0 there.
    """
    if IS_EVEN:
        lse = tl.load(lse_bits_ptr + offs)
        log_sum = tl.load(log_sum_ptr + offs) if SPLIT_LSE else lse
        delta = tl.load(delta_ptr + offs)
    else:
        mask = offs < length
        lse = tl.load(lse_bits_ptr + offs, mask=mask, other=float("inf"))
        log_sum = tl.load(log_sum_ptr + offs, mask=mask, other=0.0) if SPLIT_LSE else lse
        delta = tl.load(delta_ptr + offs, mask=mask, other=0.0)
    return lse, log_sum, delta


@triton.jit
def probabilities(s, lse, log_sum, SPLIT_LSE: tl.constexpr):
    """P from scores in bits; `lse` is all of the log-sum-exp, or without the log of the sum."""
    if SPLIT_LSE:
        return tl.math.exp2((s - lse) - log_sum)
    else:
        return tl.math.exp2(s - lse)


@triton.jit
def kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK: tl.constexpr):
    """Which of the keys `offs_n` exist and are not padding, (BLOCK_N,)."""
    if HAS_MASK:
        return tl.load(key_mask_ptr + offs_n, mask=offs_n < len_k, other=0) != 0
    else:
        return offs_n < len_k


@triton.jit
def sum_diagonals(previous, current, BLOCK: tl.constexpr):
    """Sums along the diagonals of two square tiles side by side: (BLOCK,).

    Element c is the sum over rows r of [previous | current][r, BLOCK + r - c]: the part of offset c in `current`, and
    the part of the same diagonal that came before. One trip through shared memory turns diagonals into columns. The
    image there is made of 4 x 8 sub-tiles, for which neither the stores from the dot's layout nor the loads along
    diagonals meet in a bank, and whose addresses are linear in the coordinates of sub-tiles.
    """
    BLOCKS: tl.constexpr = BLOCK // 8
    pair = tl.reshape(tl.join(previous, current), (BLOCK // 4, 4, BLOCKS, 8, 2))
    image = tl.reshape(tl.permute(pair, (0, 4, 2, 1, 3)), (2 * BLOCK * BLOCK,))
    # Row r = 8 r8 + 4 r4 + r1 and element c = 8 c8 + c1; the column BLOCK + r - c = 8 (BLOCKS - 1 + r8 - c8) + within.
    r8 = tl.arange(0, BLOCKS)[:, None, None, None, None]
    r4 = tl.arange(0, 2)[None, :, None, None, None]
    c8 = tl.arange(0, BLOCKS)[None, None, :, None, None]
    r1 = tl.arange(0, 4)[None, None, None, :, None]
    c1 = tl.arange(0, 8)[None, None, None, None, :]
    within = 8 + 4 * r4 + r1 - c1  # 1 to 15
    row = (2 * r8 + r4) * (2 * BLOCKS * 32) + r1 * 8
    index = row + (BLOCKS - 1 + r8 - c8) * 32 + ((within >> 3) * 32 + (within & 7))
    skewed = tl.gather(image, tl.reshape(index, (BLOCK * BLOCK,)), 0)
    skewed = tl.reshape(skewed, (BLOCK // 4, BLOCKS, 4, 8))
    return tl.reshape(tl.sum(tl.sum(skewed, 0), 1), (BLOCK,))
