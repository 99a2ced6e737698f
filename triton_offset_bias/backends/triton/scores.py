"""Scores, and how they meet the bias; shared by forward and backward.

Kernels count offsets from the first query and key: ``offset = i - j``, without `query_start`. They read the bias from a
*strip*: one fp32 number for every such offset of a head, -inf where causality or the window forbids the offset. Clamp,
causal mask and window therefore cost no instruction. The strip ends STRIP_PAD beyond the near offsets, where nothing
changes any more, or beyond the score matrix, which tiles may overhang on every side.

Where tensors give the positions, an offset is the difference of two of them, and a tile gathers its bias: from a strip
of the offsets [near_lo, near_hi] alone, the ends of which serve all others. The band is then asked for every pair.

Scores meet the strip in one of two units. BIAS_IN_ACC: the strip counts products (bias / scale) and is what the matrix
product starts from, which costs nothing more. Else the strip is in bits (bias times log2 e) and is added afterwards.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.tiles import product, started_from

LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_BLOCK = tl.constexpr(128)
STRIP_PAD = tl.constexpr(256)  # twice that
# A running maximum before any score: finite, so that -inf - it is -inf, and no more than any finite score.
NO_SCORE = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def strip_of_head(strip_ptr, b, h, stride_sb, stride_sh, zero, HAS_STRIP: tl.constexpr):
    """Pointer to offset 0, the column `zero`, in the strip of a head."""
    if HAS_STRIP:
        strip_ptr += b * stride_sb + h * stride_sh + zero
    return strip_ptr


@triton.jit
def shift_in_strip(shift, near_lo, near_hi):
    """The distance of a tile from the diagonal, or one in the strip's reach at which its bias is the same."""
    return tl.minimum(tl.maximum(shift, near_lo - LARGEST_BLOCK), near_hi + LARGEST_BLOCK)


@triton.jit
def position_rows(positions_ptr, b, stride_pb, offs, length, HAS_POSITIONS: tl.constexpr):
    """The positions of rows, int64."""
    if HAS_POSITIONS:
        return tl.load(positions_ptr + b * stride_pb + offs, mask=offs < length, other=0).to(tl.int64)
    else:
        return offs


@triton.jit
def bias_tile(ptrs, USE_ASM: tl.constexpr):
    """What the pointers point at, element by element in the layout of the scores.

    With addresses made of a row's and a column's part, LLVM sees which elements share a diagonal and loads each value
    once; through inline assembly because `tl.load` would be converted to another layout first.
    """
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptrs], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptrs)


@triton.jit
def score_tile(
    a, b, strip_ptr, shift, rows, columns, keep, scale_log2, band_lo, band_hi, near_lo, near_hi,
    HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr, IS_NEAR: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, USE_ASM: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Scores, (R, C), to be multiplied by score_unit, and with the bias if near and there is one.

    The offset of an element is shift + rows + columns, all int64. strip_ptr: one for all rows, or one for each. `keep`
    says which keys to attend to, where HAS_KEEP.
    """
    acc = None
    if IS_NEAR and HAS_BIAS:
        if HAS_POSITIONS:
            offset = tl.minimum(tl.maximum(rows[:, None] + columns[None, :], near_lo), near_hi)
            ptrs = (strip_ptr + tl.zeros_like(rows))[:, None] + offset
        else:
            ptrs = (strip_ptr + shift + rows)[:, None] + columns[None, :]
        if BIAS_IN_ACC:
            acc = started_from(bias_tile(ptrs, USE_ASM), WAIT)
    s = product(a, b, acc, PRECISION)
    if IS_NEAR and HAS_BIAS and not BIAS_IN_ACC:
        s = s * scale_log2 + bias_tile(ptrs, USE_ASM)
    if HAS_POSITIONS:
        offset = rows[:, None] + columns[None, :]
        s = tl.where((offset >= band_lo) & (offset <= band_hi), s, float("-inf"))
    elif IS_NEAR and not HAS_BIAS:
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
def far_bias(ptrs, scale_log2, HAS_BIAS: tl.constexpr, BIAS_IN_ACC: tl.constexpr):
    """The one bias of far tiles, in bits, from where the strip holds it."""
    if not HAS_BIAS:
        return 0.0
    elif BIAS_IN_ACC:
        return tl.load(ptrs) * scale_log2
    else:
        return tl.load(ptrs)


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
def probabilities(s, unit, bias, lse, log_sum, IS_NEAR: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT_LSE: tl.constexpr):
    """P from score_tile's scores, which far tiles' bias is missing in; SPLIT_LSE: `lse` lacks the log of the sum."""
    if SPLIT_LSE:
        return tl.math.exp2((rounded_scores(s, unit, bias, IS_NEAR, HAS_BIAS) - lse) - log_sum)
    elif IS_NEAR:
        return tl.math.exp2(s * unit - lse)
    else:
        return tl.math.exp2(s * unit + (bias - lse))


@triton.jit
def rounded_scores(s, unit, bias, IS_NEAR: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Float32's scores in bits, whose maximum less itself is exactly 0: a multiplication by the unit would be fused."""
    if IS_NEAR and HAS_BIAS:
        return s
    else:
        return s * unit + bias


@triton.jit
def slope_weights(lse, log_sum, SPLIT_LSE: tl.constexpr):
    """What a query's dP is multiplied with: 1, or 0 where one key has all the weight, as `prepare_kernel` marked it.

    There dP and <dO, O> are one sum in two orders, and their difference is exactly 0. Of 16-bit inputs the mark is the
    last bit of the log-sum-exp; of others, the log of the sum is 0.
    """
    if SPLIT_LSE:
        return tl.where(log_sum == 0.0, 0.0, 1.0)
    else:
        return tl.where((lse.to(tl.int32, bitcast=True) & 1) == 0, 0.0, 1.0)


@triton.jit
def kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK: tl.constexpr):
    """Which of the keys `offs_n` exist and are not padding, (BLOCK_N,)."""
    if HAS_MASK:
        return tl.load(key_mask_ptr + offs_n, mask=offs_n < len_k, other=0) != 0
    else:
        return offs_n < len_k


@triton.jit
def dropout_factors(seed, head, start_m, start_n, offs_m, offs_n, largest_dropped, kept_scale, ROUNDS: tl.constexpr):
    """What dropout multiplies P with: 0, or `kept_scale`; the bits are those of `triton_offset_bias.dropout`.

    The weights' places are start_m + offs_m and start_n + offs_n, where the offs_ have the shape of rows and columns of
    the tile and the starts are multiples of 16. Then the compiler sees that the four weights that share a Philox have
    equal counters: they lie in one thread, which computes it once.
    """
    rows = start_m // 2 + (offs_m // 16 * 8 + offs_m % 8)
    columns = start_n // 2 + (offs_n // 16 * 8 + offs_n % 8)
    word_0, word_1, word_2, word_3 = tl.philox(seed, rows, columns, head, 0, ROUNDS)
    is_right, is_lower = (offs_n & 8) != 0, (offs_m & 8) != 0
    word = tl.where(is_lower, tl.where(is_right, word_3, word_2), tl.where(is_right, word_1, word_0))
    return tl.where(word > largest_dropped.to(tl.uint32, bitcast=True), kept_scale, 0.0)
