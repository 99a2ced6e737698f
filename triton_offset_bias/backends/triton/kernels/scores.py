"""Scores, and how they meet the bias; shared by forward and backward.

Kernels count offsets from the first query and key: ``offset = i - j``, without `query_start`. They read the bias from a
*strip*: one fp32 number for every such offset of a head, -inf where causality or the window forbids the offset. Clamp,
causal mask and window therefore cost no instruction. The strip ends STRIP_PAD beyond the near offsets, where nothing
changes any more, or beyond the score matrix, which tiles may overhang on every side.

Where tensors give the positions, an offset is the difference of two of them, and a tile gathers its bias: from a strip
of the offsets [near_lo, near_hi] alone, the ends of which serve all others. The band is then asked for every pair.

With a gate the bias of a pair is the query's factor times the strip's number. Then all numbers of the strip are finite,
since 0 * -inf is NaN. If the band forbids some pair, a second strip, the *mask*, holds 0 and -inf, and takes no more
instructions than its loads: it is the summand of a fused multiply-add.

The strip has one of two units. With BIAS_IN_ACC it is in units of the products (bias / scale), and the matrix product
starts from it, which takes no instruction. Otherwise it is in bits (bias times log2 e) and is added to the product.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import Dropping, KeyTiles, Rows, Scoring
from triton_offset_bias.backends.triton.kernels.tiles import first_element, product, started_from, swept_ptrs

LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_BLOCK = tl.constexpr(128)
STRIP_PAD = tl.constexpr(256)  # 2 * LARGEST_BLOCK
# The running maximum before any score: no more than any finite score, and finite, so that -inf minus it is -inf.
NO_SCORE = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def strip_of_head(strip_ptr, b, h, strides, zero, HAS_STRIP: tl.constexpr):
    """The pointer to offset 0, the column `zero`, in the strip of a head."""
    if HAS_STRIP:
        return strip_ptr + (b * strides.b + h * strides.h + zero)
    else:
        return 0  # nobody reads it; Triton 3.6 cannot return None


@triton.jit
def scoring_of(inputs, b, h, strides, bounds, scale_log2, gate, FORM: tl.constexpr):
    """The `Scoring` of a head, or of each row's head."""
    strip_ptr = strip_of_head(inputs.strip, b, h, strides, bounds.zero, FORM.HAS_BIAS)
    return Scoring(strip_ptr, strides.mask, bounds, scale_log2, gate)


@triton.jit
def first_gate(b, h, sizes, first_q, FORM: tl.constexpr):
    """The number of a head's first query, or of each row's head, in a gate."""
    if FORM.IS_PACKED:
        return h * sizes.rows_q + first_q
    else:
        return (b * sizes.num_heads + h) * sizes.rows_q


@triton.jit
def gate_of_head(inputs, b, h, sizes, first_q, FORM: tl.constexpr):
    """The pointer to the factors of a head's queries, or of each row's head; 0 without a gate."""
    return of_sequence(inputs.gate, first_gate(b, h, sizes, first_q, FORM), FORM.HAS_GATE)


@triton.jit
def gate_rows(gate_ptr, offs, length, FORM: tl.constexpr):
    """The factors of the queries `offs` on their bias, (rows,) float32; 0.0 without a gate."""
    if FORM.HAS_GATE:
        return tl.load(gate_ptr + offs, mask=offs < length, other=0.0)
    else:
        return 0.0


@triton.jit
def shift_in_strip(shift, bounds):
    """The distance of a tile from the diagonal, clamped to distances that the strip reaches with the same bias."""
    return tl.minimum(tl.maximum(shift, bounds.near_lo - LARGEST_BLOCK), bounds.near_hi + LARGEST_BLOCK)


@triton.jit
def of_sequence(ptr, offset, EXISTS: tl.constexpr):
    """The pointer to a sequence's numbers, if it has any; otherwise 0."""
    if EXISTS:
        return ptr + offset
    else:
        return 0


@triton.jit
def query_positions(inputs, b, sizes, FORM: tl.constexpr):
    """The pointer to the positions of a sequence's queries, if the call has any; otherwise 0."""
    first = b * sizes.rows_q if FORM.OWN_QUERY_POSITIONS else 0
    return of_sequence(inputs.query_positions, first, FORM.HAS_POSITIONS)


@triton.jit
def key_positions(inputs, b, sizes, FORM: tl.constexpr):
    """The pointer to the positions of a sequence's keys, if the call has any; otherwise 0."""
    first = b * sizes.rows_k if FORM.OWN_KEY_POSITIONS else 0
    return of_sequence(inputs.key_positions, first, FORM.HAS_POSITIONS)


@triton.jit
def position_rows(positions_ptr, offs, length):
    """The positions of the rows `offs` of a sequence, int64."""
    return tl.load(positions_ptr + offs, mask=offs < length, other=0).to(tl.int64)


@triton.jit
def table_columns(offsets, bounds):
    """The columns of the strip of gathered biases that hold `offsets`, int64, as int32 counted from near_lo."""
    return (tl.minimum(tl.maximum(offsets, bounds.near_lo), bounds.near_hi) - bounds.near_lo).to(tl.int32)


@triton.jit
def bias_tile(ptrs, USE_ASM: tl.constexpr):
    """The values at the pointers, element by element in the layout of the scores.

    An address is the sum of a row's part and a column's part. So LLVM sees which elements share a diagonal, and loads
    each value once. The load is inline assembly, because Triton would convert a `tl.load` to another layout first.
    """
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptrs], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptrs)


@triton.jit
def strip_ptrs(scoring, shift, rows, columns, FORM: tl.constexpr):
    """Pointers to the strip's numbers of a near tile, (R, C); see `score_tile`."""
    if FORM.HAS_POSITIONS:
        bounds = scoring.bounds
        offset = tl.minimum(tl.maximum(rows[:, None] + columns[None, :], bounds.near_lo), bounds.near_hi)
        return (scoring.strip_ptr + tl.zeros_like(rows))[:, None] + offset
    else:
        return (scoring.strip_ptr + shift + rows)[:, None] + columns[None, :]


@triton.jit
def near_bias(scoring, gate, ptrs, FORM: tl.constexpr):
    """The bias of a near tile in units of the strip, (R, C); `gate` broadcasts to it."""
    bias = bias_tile(ptrs, FORM.USE_ASM)
    if FORM.HAS_GATE:
        bias *= gate
        if FORM.IS_CUT and not FORM.HAS_POSITIONS:
            bias += bias_tile(ptrs + scoring.mask, FORM.USE_ASM)
    return bias


@triton.jit
def score_tile(
    a, b, scoring, gate, shift, rows, columns, keep, FORM: tl.constexpr, IS_NEAR: tl.constexpr, HAS_KEEP: tl.constexpr
):
    """Scores (R, C) in units of `score_unit`. They contain the bias if there is one and the tile is near.

    The offset of an element is shift + rows + columns, all int64. scoring.strip_ptr is one pointer for all rows, or one
    for each. `gate` broadcasts to the tile. With HAS_KEEP, `keep` tells which keys are attended to.
    """
    bounds = scoring.bounds
    acc = None
    if IS_NEAR and FORM.HAS_BIAS:
        ptrs = strip_ptrs(scoring, shift, rows, columns, FORM)
        if FORM.BIAS_IN_ACC:
            acc = started_from(near_bias(scoring, gate, ptrs, FORM), FORM.COPY)
    s = product(a, b, acc, FORM.PRECISION)
    if IS_NEAR and FORM.HAS_BIAS and not FORM.BIAS_IN_ACC:
        s = s * scoring.scale_log2 + near_bias(scoring, gate, ptrs, FORM)
    if FORM.HAS_POSITIONS:
        offset = rows[:, None] + columns[None, :]
        s = tl.where((offset >= bounds.band_lo) & (offset <= bounds.band_hi), s, float("-inf"))
    elif IS_NEAR and not FORM.HAS_BIAS:
        offset = (rows[:, None] + columns[None, :]).to(tl.int32)
        s = tl.where((offset >= bounds.band_lo - shift) & (offset <= bounds.band_hi - shift), s, float("-inf"))
    if HAS_KEEP:
        s = tl.where(keep, s, float("-inf"))
    return s


@triton.jit
def score_unit(scale_log2, FORM: tl.constexpr, IS_NEAR: tl.constexpr):
    """The unit of `score_tile`'s scores, in bits."""
    if IS_NEAR and FORM.HAS_BIAS and not FORM.BIAS_IN_ACC:
        return 1.0
    else:
        return scale_log2


@triton.jit
def far_bias(scoring, offset, FORM: tl.constexpr, IS_NEAR: tl.constexpr):
    """The one bias of far tiles in bits, which the strip holds at `offset`."""
    if IS_NEAR or not FORM.HAS_BIAS:
        return 0.0
    elif FORM.BIAS_IN_ACC:
        return tl.load(scoring.strip_ptr + offset) * scoring.scale_log2
    else:
        return tl.load(scoring.strip_ptr + offset)


@triton.jit
def row_stride(rows_q):
    """The distance from a head's `Rows` to the next head's: a multiple of 16, so that blocks of them are aligned."""
    return tl.cdiv(rows_q, 16) * 16


@triton.jit
def rows_of_head(rows, first):
    """Pointers to the numbers of a head's first row."""
    return Rows(rows.lse + first, rows.log_sum + first, rows.delta + first)


@triton.jit
def load_rows(rows, offs, length, IS_EVEN: tl.constexpr, FORM: tl.constexpr):
    """The `Rows` of the queries `offs`. Past the `length` the log-sum-exp is +inf, so that P and dS are 0."""
    if IS_EVEN:
        lse = tl.load(rows.lse + offs)
        log_sum = tl.load(rows.log_sum + offs) if FORM.SPLIT_LSE else lse
        delta = tl.load(rows.delta + offs)
    else:
        mask = offs < length
        lse = tl.load(rows.lse + offs, mask=mask, other=float("inf"))
        log_sum = tl.load(rows.log_sum + offs, mask=mask, other=0.0) if FORM.SPLIT_LSE else lse
        delta = tl.load(rows.delta + offs, mask=mask, other=0.0)
    return Rows(lse, log_sum, delta)


@triton.jit
def probabilities(s, unit, bias, lse, log_sum, FORM: tl.constexpr, IS_NEAR: tl.constexpr):
    """P from `score_tile`'s scores, which lack far tiles' bias. With SPLIT_LSE, `lse` lacks the log of the sum."""
    if FORM.SPLIT_LSE:
        return tl.math.exp2((rounded_scores(s, unit, bias, FORM, IS_NEAR) - lse) - log_sum)
    elif IS_NEAR:
        return tl.math.exp2(s * unit - lse)
    else:
        return tl.math.exp2(s * unit + (bias - lse))


@triton.jit
def rounded_scores(s, unit, bias, FORM: tl.constexpr, IS_NEAR: tl.constexpr):
    """Float32 scores in bits, rounded once, so that the maximum minus itself is exactly 0.

    A multiplication by the unit would be fused with the subtraction.
    """
    if IS_NEAR and FORM.HAS_BIAS:
        return s
    else:
        return s * unit + bias


@triton.jit
def slope_weights(stats, FORM: tl.constexpr):
    """The factor on a query's dP: 0 where `prepare_kernel` marked that one key has all the weight, otherwise 1.

    In a marked row dP and <dO, O> are one sum in two orders: their exact difference is 0. For 16-bit inputs the mark is
    the last bit of the log-sum-exp. For others the mark is a log of the sum of 0.
    """
    if FORM.SPLIT_LSE:
        return tl.where(stats.log_sum == 0.0, 0.0, 1.0)
    else:
        return tl.where((stats.lse.to(tl.int32, bitcast=True) & 1) == 0, 0.0, 1.0)


@triton.jit
def key_tiles(inputs, sizes, sequence, length, b, h_kv, strides, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """The first `length` keys of a sequence and key head; the first tile has BLOCK of them."""
    k_ptr = inputs.k + first_element(strides.k, b, h_kv, sequence.first_k)
    v_ptr = inputs.v + first_element(strides.v, b, h_kv, sequence.first_k)
    return KeyTiles(
        swept_ptrs(k_ptr, strides.k.row, strides.k.d, BLOCK, FORM.BLOCK_D),
        swept_ptrs(v_ptr, strides.v.row, strides.v.d, BLOCK, FORM.BLOCK_DV),
        strides.k.row,
        strides.v.row,
        of_sequence(inputs.key_mask, b * sizes.len_k, FORM.HAS_MASK),
        key_positions(inputs, b, sizes, FORM),
        length,
        sizes.len_k - sizes.len_q,
    )


@triton.jit
def kept_keys(key_mask_ptr, offs_n, len_k, HAS_MASK: tl.constexpr):
    """True for the keys `offs_n` that exist and are not padding, (BLOCK_N,)."""
    if HAS_MASK:
        return tl.load(key_mask_ptr + offs_n, mask=offs_n < len_k, other=0) != 0
    else:
        return offs_n < len_k


@triton.jit
def with_causality_by_index(keep, last_keys, keys, FORM: tl.constexpr):
    """The pairs of `keep` that indices allow: a query attends to no key behind its last. All broadcast to the tile."""
    if FORM.IS_CAUSAL_BY_INDEX:
        return keep & (keys <= last_keys)
    else:
        return keep


@triton.jit
def dropping_of(inputs, b, h, num_heads, dropout, kept_scale, FORM: tl.constexpr):
    """The `Dropping` of a head."""
    seed = tl.load(inputs.seed) if FORM.DROPOUT_ROUNDS > 0 else 0
    head, first_query, first_key = b * num_heads + h, 0, 0
    if FORM.HAS_PLACE:
        head = b * dropout.place.heads + dropout.place.head + h
        first_query, first_key = dropout.place.query, dropout.place.key
    return Dropping(seed, head.to(tl.int32), dropout.largest_dropped, kept_scale, first_query, first_key)


@triton.jit
def dropout_factors(dropping, start_m, start_n, offs_m, offs_n, FORM: tl.constexpr):
    """Dropout's factors on P: 0 or `kept_scale`. The random bits equal those of `triton_offset_bias.dropout`.

    The weights' places are start_m + offs_m and start_n + offs_n, from the call's place on. The offs_ have the shape of
    the tile's rows and columns, and the starts are multiples of 16. So the compiler sees that the four weights that
    share a Philox have equal counters. They lie in one thread, which computes the Philox once.
    """
    if FORM.HAS_PLACE:  # not always a multiple of 16
        offs_m += start_m + dropping.first_query
        offs_n += start_n + dropping.first_key
        start_m, start_n = 0, 0
    rows = start_m // 2 + (offs_m // 16 * 8 + offs_m % 8)
    columns = start_n // 2 + (offs_n // 16 * 8 + offs_n % 8)
    word_0, word_1, word_2, word_3 = tl.philox(dropping.seed, rows, columns, dropping.head, 0, FORM.DROPOUT_ROUNDS)
    is_right, is_lower = (offs_n & 8) != 0, (offs_m & 8) != 0
    word = tl.where(is_lower, tl.where(is_right, word_3, word_2), tl.where(is_right, word_1, word_0))
    largest_dropped = tl.cast(dropping.largest_dropped, tl.uint32, bitcast=True)
    return tl.where(word > largest_dropped, dropping.kept_scale, 0.0)
