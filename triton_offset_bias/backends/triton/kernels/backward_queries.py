"""The backward pass, with the scores recomputed:

    P = exp(S - lse)      dP = Z * dO V^T      delta = <dO, O> - dlse      dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dV = (Z * P)^T dO
    dbias[offset] = sum of dS along the offset's diagonal

With a gate the bias of a pair is gate[query] * bias[offset]. Then

    dgate = row sums of dS * bias      dbias[offset] = sum of gate * dS along the offset's diagonal

Z is dropout's factor, or 1 without dropout. Two kernels share FlashAttention-2's (Dao 2023, arXiv:2307.08691) algorithm
2: here a program has a block of queries (dQ and dbias); in `backward_keys` it has a block of keys (dK and dV). So
programs share dbias alone, whose sums are atomic. Deterministic sums come from a third kernel, in which a program has a
diagonal of tiles (`backward_bias`). On some devices `backward_keys` computes all gradients of most calls, and this
kernel does not run. `prepare` runs before all of them.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import (
    INTEGERS,
    QueryBlock,
    StripGradient,
)
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
    bias_tile,
    dropout_factors,
    dropping_of,
    far_bias,
    first_gate,
    gate_of_head,
    gate_rows,
    kept_keys,
    key_tiles,
    load_rows,
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
    strip_ptrs,
    table_columns,
    with_causality_by_index,
)
from triton_offset_bias.backends.triton.kernels.tiles import (
    add_nonzero,
    first_element,
    load_tile,
    next_diagonals,
    no_diagonals,
    product,
    store_tile,
    thread_sums,
    tile_ptrs,
    waited_for,
)

# Copies of a gathered strip's gradient, so that programs that run side by side add to different addresses.
COPIES = tl.constexpr(16)


@triton.jit
def add_gathered(low_sum, high_sum, ds, columns, dstrip, bounds, FORM: tl.constexpr, HOW: tl.constexpr):
    """Adds a tile of dS to the strip's gradient at its `table_columns`, and returns the sums at the ends of the table.

    Offsets up to near_lo see one bias, and so do offsets from near_hi on: low_sum and high_sum, (rows, 1), take their
    dS. Each dS between them takes one atomic add, unless it is 0, as it is for every pair that is not attended to.
    HOW: "elements" | "fixed", by which dS become int64 that count steps of 1 / fixed_unit.
    """
    if HOW == "fixed":
        ds = (ds * dstrip.fixed_unit).to(tl.int64)
    low, high = 0, tl.cast(bounds.near_hi - bounds.near_lo, tl.int32)
    high = tl.where(high == low, -1, high)  # a single column counts once
    low_sum += tl.sum(tl.where(columns == low, ds, 0), 1, keep_dims=True)
    high_sum += tl.sum(tl.where(columns == high, ds, 0), 1, keep_dims=True)
    between = tl.where((columns == low) | (columns == high), 0, ds)
    add_nonzero(dstrip.ptr + bounds.near_lo + columns, between, FORM.USE_ASM)
    return low_sum, high_sum


@triton.jit
def add_to_end(dstrip, end, sums):
    """Adds all elements of `sums` to the strip's gradient at the offset `end`, by one atomic add."""
    tl.atomic_add(dstrip.ptr + end, tl.sum(tl.sum(sums, 1), 0), sem="relaxed")


@triton.jit
def add_far(dgate, sums, gate, scoring, dstrip, end, FORM: tl.constexpr, DBIAS: tl.constexpr):
    """Adds far tiles' dS, which see the one bias at the offset `end`, to dbias, and to dgate in units of the strip."""
    if FORM.HAS_GATE:
        dgate += tl.sum(sums, 1) * tl.load(scoring.strip_ptr + end)
        sums *= gate[:, None]
    if DBIAS != "none":
        add_to_end(dstrip, end, sums)
    return dgate


@triton.jit
def sweep_keys(
    dq, gate_sum, low_sum, high_sum, block, keys, scoring, dstrip, begin, end, dropping,
    FORM: tl.constexpr, DBIAS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) to dQ of a block of queries, and to the strip's gradient.

    Near dS are added by diagonals, or by offsets. low_sum takes dS at offsets up to near_lo, high_sum from near_hi on:
    far tiles as they are, gathered ones as sums of rows. gate_sum, (BLOCK, 4), takes parts of near tiles' dgate, in
    units of the strip.
    """
    IS_NEAR: tl.constexpr = PART != FAR_LEFT and PART != FAR_RIGHT
    EVEN_N: tl.constexpr = PART != REST
    HAS_KEEP: tl.constexpr = FORM.HAS_MASK or FORM.IS_CAUSAL_BY_INDEX or not EVEN_N
    columns = -tl.arange(0, BLOCK).to(tl.int64)
    unit = score_unit(scoring.scale_log2, FORM, IS_NEAR)
    bias, gate = far_bias(scoring, far_offset(scoring.bounds, PART), FORM, IS_NEAR), 0.0  # bits
    if FORM.HAS_GATE:
        gate = block.gate[:, None]
        bias *= gate
    before, carried = no_diagonals(BLOCK, BLOCK, FORM)
    for start_n in range(begin, end, BLOCK):
        start_n = tl.multiple_of(start_n, BLOCK)
        offs_n = start_n + tl.arange(0, BLOCK)
        shift = block.start - start_n
        if FORM.HAS_BIAS and not EVEN_N:
            shift = shift_in_strip(shift, scoring.bounds)
        step = start_n.to(tl.int64)
        k_ptrs = keys.k_ptrs + step * keys.stride_k
        k = load_tile(k_ptrs, offs_n, keys.length, EVEN_N, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK, BLOCK_D)
        v_ptrs = keys.v_ptrs + step * keys.stride_v
        v = load_tile(v_ptrs, offs_n, keys.length, EVEN_N, FORM.HEAD_DIM_V, FORM.BLOCK_DV)  # (BLOCK, BLOCK_DV)
        keep = kept_keys(keys.mask_ptr, offs_n, keys.length, FORM.HAS_MASK)[None, :]
        last_keys = keys.query_start + block.start + tl.arange(0, BLOCK)[:, None]
        keep = with_causality_by_index(keep, last_keys, offs_n[None, :], FORM)
        if FORM.HAS_POSITIONS:
            columns = -position_rows(keys.positions_ptr, offs_n, keys.length)
        s = score_tile(
            block.q, k.T, scoring, gate, shift, block.rows, columns, keep, FORM, IS_NEAR, HAS_KEEP
        )  # (BLOCK, BLOCK)
        dp = product(block.dout, v.T, None, FORM.PRECISION)
        p = probabilities(s, unit, bias, block.stats.lse[:, None], block.stats.log_sum[:, None], FORM, IS_NEAR)
        if FORM.DROPOUT_ROUNDS > 0:
            m, n = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
            dp *= dropout_factors(dropping, block.start, start_n, m, n, FORM)
        ds = p * (dp * block.weights[:, None] - block.stats.delta[:, None])
        if FORM.HAS_GATE and IS_NEAR:
            numbers = bias_tile(strip_ptrs(scoring, shift, block.rows, columns, FORM), FORM.USE_ASM)
            gate_sum += thread_sums(ds * numbers, BLOCK, BLOCK)
        dbias = ds * gate if FORM.HAS_GATE and IS_NEAR else ds
        if (DBIAS != "none" or FORM.HAS_GATE) and not IS_NEAR:
            if PART == FAR_LEFT:
                high_sum += ds
            else:
                low_sum += ds
        elif DBIAS == "diagonals":
            diagonals, before, carried = next_diagonals(before, carried, dbias, BLOCK, BLOCK, FORM)
        dq = waited_for(product(ds.to(k.dtype), k, dq, FORM.PRECISION), FORM.WAIT)
        if DBIAS == "diagonals" and IS_NEAR:  # after dQ, whose operands load no later than an atomic add
            tl.atomic_add(dstrip.ptr + shift + tl.arange(0, BLOCK), diagonals, sem="relaxed")
        elif DBIAS != "none" and IS_NEAR:
            offset = block.rows[:, None] + columns[None, :]
            if FORM.HAS_POSITIONS:
                offset = table_columns(offset, scoring.bounds)
                low_sum, high_sum = add_gathered(low_sum, high_sum, dbias, offset, dstrip, scoring.bounds, FORM, DBIAS)
            else:
                tl.atomic_add(dstrip.ptr + shift + offset, dbias, sem="relaxed")
    if DBIAS == "diagonals" and IS_NEAR:
        none = tl.zeros([BLOCK, BLOCK], tl.float32)
        diagonals, _, _ = next_diagonals(before, carried, none, BLOCK, BLOCK, FORM)
        shift = shift_in_strip(block.start - end + BLOCK, scoring.bounds) - BLOCK
        tl.atomic_add(dstrip.ptr + shift + tl.arange(0, BLOCK), diagonals, sem="relaxed")
    return dq, gate_sum, low_sum, high_sum


@triton.jit(do_not_specialize=INTEGERS)
def dquery_kernel(
    inputs, dout_ptr, row_ptrs, fixed_unit_ptr, gradients, dstrip_ptr,
    strides,
    num_heads, len_q, len_k, rows_q, rows_k,
    zero, band_lo, band_hi, near_lo, near_hi,
    factors, dropout, copy_stride,
    FORM: tl.constexpr, LOOPS: tl.constexpr, HAS_DQ: tl.constexpr, DBIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dQ and dgate of a block of queries of one head, and adds its part of dbias to the strip's gradient.

    Tensors are as in `forward_kernel`.

    DBIAS: "none" | "diagonals", BLOCK atomic adds for a near tile | "elements", one for every near score | "fixed", one
    for every near score, of int64 that count steps of 1 / fixed_unit: their sum does not depend on the order.
    copy_stride: from one copy of the gathered strip's gradient to the next, in elements; 0 if there is one.
    """
    BLOCK_D: tl.constexpr = FORM.BLOCK_D
    sizes, bounds = counted(
        num_heads, len_q, len_k, rows_q, rows_k, zero, band_lo, band_hi, near_lo, near_hi, FORM, LOOPS
    )
    num_blocks = tl.cdiv(sizes.len_q, BLOCK)
    index = num_blocks - 1 - tl.program_id(0) % num_blocks
    start_m = index * BLOCK
    head = head_of(tl.program_id(0) // num_blocks, sizes.num_heads)
    offs_m = start_m + tl.arange(0, BLOCK)
    row = head.index.to(tl.int64) * row_stride(sizes.rows_q)
    sequence = sequence_of(inputs, head.b, sizes, bounds, FORM)
    len_k = sequence.len_k
    if FORM.IS_PACKED:
        row = head.h * row_stride(sizes.rows_q) + sequence.first_q
        len_k = tl.where(start_m < sequence.len_q, len_k, 0)
    q_ptr = inputs.q + first_element(strides.q, head.b, head.h, sequence.first_q)
    dout_ptr += first_element(strides.dout, head.b, head.h, sequence.first_q)
    scoring = scoring_of(inputs, head.b, head.h, strides.strip, sequence.bounds, factors.scale_log2, 0.0, FORM)
    dstrip_ptr = strip_of_head(dstrip_ptr, head.b, head.h, strides.strip, sequence.bounds.zero, DBIAS != "none")
    if DBIAS != "none" and FORM.HAS_POSITIONS:
        dstrip_ptr += (head.b + head.h + index) % COPIES * copy_stride
    rows = tl.arange(0, BLOCK).to(tl.int64)
    if FORM.HAS_POSITIONS:
        rows = position_rows(query_positions(inputs, head.b, sizes, FORM), offs_m, sequence.len_q)
    keys = key_tiles(inputs, sizes, sequence, len_k, head.b, head.h // sizes.group, strides, FORM, BLOCK)
    q_ptrs = tile_ptrs(q_ptr, offs_m, strides.q.row, strides.q.d, FORM.BLOCK_D)
    dout_ptrs = tile_ptrs(dout_ptr, offs_m, strides.dout.row, strides.dout.d, FORM.BLOCK_DV)
    q = load_tile(q_ptrs, offs_m, sequence.len_q, False, FORM.HEAD_DIM, FORM.BLOCK_D)  # (BLOCK, BLOCK_D)
    dout = load_tile(dout_ptrs, offs_m, sequence.len_q, False, FORM.HEAD_DIM_V, FORM.BLOCK_DV)  # (BLOCK, BLOCK_DV)
    stats = load_rows(rows_of_head(row_ptrs, row), offs_m, sequence.len_q, False, FORM)
    gate_ptr = gate_of_head(inputs, head.b, head.h, sizes, sequence.first_q, FORM)
    gate = gate_rows(gate_ptr, offs_m, sequence.len_q, FORM)
    block = QueryBlock(q, dout, rows, stats, slope_weights(stats, FORM), gate, start_m)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dropping = dropping_of(inputs, head.b, head.h, sizes.num_heads, dropout, dropout.kept_scale, FORM)
    dstrip = StripGradient(dstrip_ptr, tl.load(fixed_unit_ptr) if DBIAS == "fixed" else 0.0)
    edges = edges_of(start_m, len_k, sequence.bounds, BLOCK, BLOCK, FORM)
    # Far tiles have a sum for every element: no exchange between threads.
    low_sum = tl.zeros([BLOCK, 1 if FORM.HAS_POSITIONS else BLOCK], tl.int64 if DBIAS == "fixed" else tl.float32)
    high_sum = low_sum
    dgate, gate_sum = 0.0, 0.0
    if FORM.HAS_GATE:
        dgate, gate_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, 4], tl.float32)
    for part in tl.static_range(4):
        if LOOPS[part]:
            dq, gate_sum, low_sum, high_sum = sweep_keys(
                dq, gate_sum, low_sum, high_sum, block, keys, scoring, dstrip, edges[part], edges[part + 1], dropping,
                FORM, DBIAS, BLOCK, part,
            )  # fmt: skip
            if part == FAR_LEFT:
                dgate = add_far(dgate, high_sum, gate, scoring, dstrip, sequence.bounds.near_hi, FORM, DBIAS)
            if part == FAR_RIGHT:
                dgate = add_far(dgate, low_sum, gate, scoring, dstrip, sequence.bounds.near_lo, FORM, DBIAS)
    if DBIAS != "none" and FORM.HAS_POSITIONS:
        add_to_end(dstrip, sequence.bounds.near_lo, low_sum)
        add_to_end(dstrip, sequence.bounds.near_hi, high_sum)

    if FORM.HAS_GATE:
        dgate = (dgate + tl.sum(gate_sum, 1)) * (factors.scale if FORM.BIAS_IN_ACC else LN_2)
        dgate_ptr = gradients.gate + first_gate(head.b, head.h, sizes, sequence.first_q, FORM)
        tl.store(dgate_ptr + offs_m, dgate, mask=offs_m < sequence.len_q)
    if HAS_DQ:
        dq_ptr = gradients.q + first_element(strides.dq, head.b, head.h, sequence.first_q)
        dq_ptrs = tile_ptrs(dq_ptr, offs_m, strides.dq.row, strides.dq.d, FORM.BLOCK_D)
        store_tile(dq_ptrs, dq * factors.scale, offs_m, sequence.len_q, FORM.HEAD_DIM, FORM.BLOCK_D)
