"""The arguments of kernels and their helpers, as values with names.

The launches, the register budget and the compile tests build their arguments from these tuples alone. Triton hands a
kernel the members of a tuple one by one, in their order; it leaves out members that are None.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton.language as tl


class Inputs(NamedTuple):
    """Pointers to the tensors that kernels read; None where a call has no such tensor."""

    q: Any  # (B, H, M, D)
    k: Any  # (B, H // group, N, D)
    v: Any  # (B, H // group, N, DV)
    strip: Any = None  # (1 or B, 1 or H, columns) float32, see `scores`
    gate: Any = None  # (B, H, M) float32
    key_mask: Any = None  # (B, N) uint8
    query_positions: Any = None  # (M,) or (B, M)
    key_positions: Any = None  # (N,) or (B, N)
    cu_seqlens_q: Any = None  # (B + 1,)
    cu_seqlens_k: Any = None  # (B + 1,)
    key_lengths: Any = None  # (B,)
    query_starts: Any = None  # (B,)
    seed: Any = None  # () int64


class Outputs(NamedTuple):
    """Pointers to the results of a forward pass: out (B, H, M, DV), and three numbers a row, (B, H, M) float32."""

    out: Any
    row_max: Any  # bits
    row_sum: Any
    lse: Any  # nats


class Table(NamedTuple):
    """Pointers to the table, and to what is made of it: (1 or B, 1 or H, columns) each, constants with one column."""

    bias: Any
    constants: Any  # see `Strip.constants`
    strip: Any
    sums: Any  # of the strip's gradient


class QueryGradients(NamedTuple):
    """Pointers to the gradients that belong to queries; None where nobody asks for them."""

    q: Any = None  # (B, H, M, D)
    gate: Any = None  # (B, H, M) float32


class Results(NamedTuple):
    """Pointers to what the backward pass starts from, and to one result: (B, H, M, DV), or (B, H, M) float32."""

    out: Any
    dout: Any
    row_max: Any  # bits
    row_sum: Any
    dlse: Any = None  # None if nobody asks for its gradient
    clean_dout: Any = None  # dO without the rows that attend to nothing
    dq_sum: Any = None  # float32, see `Sums`


class Sums(NamedTuple):
    """Pointers to float32 sums that many programs add to; None where nobody asks for them."""

    dq: Any = None  # of dQ / scale, (B, H, M, D)
    dstrip: Any = None  # of the strip's gradient


class Parts(NamedTuple):
    """Pointers to the results of every split of the keys, (splits, B, H, len_q) float32; acc has an axis DV as well."""

    acc: Any
    max: Any  # bits
    sum: Any


class Rows(NamedTuple):
    """Three float32 numbers of every row, which `prepare_kernel` writes.

    They are pointers to (B, H, `row_stride`), or the values of one block of rows.
    """

    lse: Any  # bits; without the log of the sum where SPLIT_LSE
    log_sum: Any  # bits
    delta: Any


class Strides(NamedTuple):
    """Strides of a (batch, heads, rows, dim) tensor, in elements."""

    b: Any
    h: Any
    row: Any
    d: Any


class StripStrides(NamedTuple):
    """Strides of the strip, in elements: multiples of 16, and 0 where sequences or heads share it."""

    b: Any
    h: Any
    mask: Any  # from a number of a strip that is gated and cut to its mask, see `scores`


class Layout(NamedTuple):
    """`Strides` of the tensors that a kernel reads and writes; None of those that it does not get.

    Triton 3.6 looks at the types of a tuple's members only up to the last member that is None. So the last one is.
    """

    q: Any
    k: Any
    v: Any
    strip: Any  # StripStrides
    out: Any = None
    dout: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None
    none: Any = None


class Sizes(NamedTuple):
    """Numbers of heads, queries, keys and rows."""

    num_heads: Any  # of queries
    group: Any  # of them that share a key head, compiled in
    len_q: Any  # of the longest sequence
    len_k: Any
    rows_q: Any  # of the tensors
    rows_k: Any


class Bounds(NamedTuple):
    """Ranges of offsets.

    Offsets count from the first query and key; with HAS_LENGTHS, from those of a sequence that has all keys. For packed
    sequences, and where tensors give the positions, they count as the caller's do.
    """

    zero: Any  # the strip's column of offset 0
    band_lo: Any  # pairs outside of the band are not attended to
    band_hi: Any
    near_lo: Any  # at offsets <= near_lo, and >= near_hi, the bias does not change any more
    near_hi: Any


class ResultStrides(NamedTuple):
    """`Strides` of the tensors of `Results` that have a head dim."""

    out: Any
    dout: Any
    clean_dout: Any
    dq_sum: Any


class TableRows(NamedTuple):
    """The number of rows that a table has: for sequences, and for heads; 1 where they share a row."""

    b: Any
    h: Any


class Columns(NamedTuple):
    """How the columns of the strip come from those of the table, whose strides are in elements."""

    stride_b: Any
    stride_h: Any
    stride_n: Any
    num_columns: Any  # of the table
    width: Any  # the columns of the strip
    first: Any  # the table's column that is the strip's first
    begin: Any  # columns outside of [begin, end) are -inf
    end: Any
    sums_width: Any  # the first so many sums become 0: all of them, or none


class Factors(NamedTuple):
    """Float32 factors of a call."""

    scale: Any
    scale_log2: Any  # the scale, in bits


class Place(NamedTuple):
    """The place of a call in the whole that dropout counts in, see `triton_offset_bias.dropout.Place`."""

    query: Any
    key: Any
    head: Any
    heads: Any


class Dropout(NamedTuple):
    """Numbers of a call with dropout."""

    largest_dropped: Any  # int32 whose bits are the largest dropped word
    kept_scale: Any  # float32, the factor on the weights that are kept
    place: Any = None  # Place; None for a whole


# Arguments that kernels take one by one. Triton compiles a kernel anew for a multiple of 16 and for 1, unless it is
# told not to, which it can be for arguments but not for members of tuples. No load is wider for knowing these integers.
INTEGERS = [
    *(name for fields in (Sizes, Bounds) for name in fields._fields if name != "group"),
    *("batch", "num_splits", "num_parts", "bias_heads", "first_distance", "num_distances"),
    *("stride_b", "stride_h", "stride_n", "stride_row", "num_columns", "width", "first", "begin", "end"),
    *("sums_width", "strip_programs", "rows_cleaned", "rows_zeroed", "copy_stride"),
]


class Form(NamedTuple):
    """Properties of a call that are compiled into its kernels."""

    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any  # the head dims padded to powers of two
    BLOCK_DV: Any
    GROUP: Any  # query heads that share a key head
    HAS_BIAS: Any
    HAS_GATE: Any  # whether each query has a factor on its bias
    IS_CUT: Any  # whether a gated strip has a mask, because a band forbids some pair
    BIAS_IN_ACC: Any  # see `scores`
    HAS_MASK: Any
    HAS_POSITIONS: Any
    OWN_QUERY_POSITIONS: Any  # whether every sequence has positions of its own
    OWN_KEY_POSITIONS: Any
    IS_CAUSAL_BY_INDEX: Any  # whether causality goes by the rows in the tensors, where positions differ from them
    IS_PACKED: Any
    HAS_LENGTHS: Any  # whether every sequence has its own number of keys, its last query on the last of them
    HAS_STARTS: Any  # whether packed sequences have the position of their first query
    DROPOUT_ROUNDS: Any  # of Philox; 0 without dropout
    HAS_PLACE: Any  # whether dropout counts in a whole that the call is a part of
    SPLIT_LSE: Any  # whether a row's log of the sum is kept apart from its maximum
    USE_ASM: Any  # whether the bias is loaded by inline assembly
    PRECISION: Any  # of products, see `tiles.product`
    FOLD: Any  # whether rows are added in pairs before diagonals are summed, see `tiles.fold_rows`
    KEEP_SUMS: Any  # whether diagonals' sums are kept from tile to tile instead of tiles, see `tiles.next_diagonals`
    STACKED: Any  # whether the warps of a product lie one below the other, see `tiles.thread_totals`
    COPY: Any  # whether products start from a copy of the bias, see `tiles.started_from`
    WAIT: Any  # whether products must end in their iteration, see `tiles.waited_for`


class Wanted(NamedTuple):
    """The gradients that `dkey_dvalue_kernel` computes."""

    DQ: Any
    DK: Any
    DV: Any
    DBIAS: Any


class PrepareForm(NamedTuple):
    """Properties of a call that are compiled into `prepare_kernel`."""

    HAS_BIAS: Any
    HAS_GATE: Any
    IS_CUT: Any
    HAS_CONSTANTS: Any  # see `Strip`
    IS_ZERO_BEYOND: Any  # whether offsets outside of the table have no bias
    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    HAS_DLSE: Any
    SPLIT_LSE: Any


class Loops(NamedTuple):
    """The loops that a kernel has: a flag for each part of the other side, see `blocks`."""

    FAR_LEFT: Any
    NEAR: Any
    FAR_RIGHT: Any
    REST: Any = False  # the launch knows whether there is one


# Arguments of helpers.


class Scoring(NamedTuple):
    """Values that turn products into scores. strip_ptr points to the strip's offset 0, for all rows or for each row."""

    strip_ptr: Any
    mask: Any  # see `StripStrides`
    bounds: Any
    scale_log2: Any  # the scale, in bits
    gate: Any  # factors of the queries on the bias, (rows,); 0.0 without a gate


class Dropping(NamedTuple):
    """Numbers that decide which weights of a head are dropped, and the factor on the others."""

    seed: Any
    head: Any  # as dropout counts heads
    largest_dropped: Any
    kept_scale: Any
    first_query: Any  # of the call, in the whole
    first_key: Any


class KeyTiles(NamedTuple):
    """A sequence's keys and values: pointers to the first tile, and strides to the next rows."""

    k_ptrs: Any
    v_ptrs: Any
    stride_k: Any
    stride_v: Any
    mask_ptr: Any
    positions_ptr: Any
    length: Any
    query_start: Any  # the last key that query 0 may attend to, as far as rows go


class QueryTiles(NamedTuple):
    """A sequence's queries, dO, sums of dQ and `Rows`: pointers to the first tile, and strides to the next rows."""

    q_ptrs: Any
    dout_ptrs: Any
    dq_ptrs: Any
    stride_q: Any
    stride_dout: Any
    stride_dq: Any
    row_ptrs: Any  # Rows
    gate_ptr: Any
    positions_ptr: Any
    length: Any


class QueryBlock(NamedTuple):
    """A program's block of queries."""

    q: Any  # (BLOCK, BLOCK_D)
    dout: Any  # (BLOCK, BLOCK_DV)
    rows: Any  # (BLOCK,) int64: positions, or distances from the query at `start`
    stats: Any  # Rows of (BLOCK,)
    weights: Any  # (BLOCK,), see `scores.slope_weights`
    gate: Any  # (BLOCK,), or 0.0 without a gate
    start: Any


class KeyBlock(NamedTuple):
    """A program's block of keys."""

    k: Any  # (BLOCK_N, BLOCK_D)
    v: Any  # (BLOCK_N, BLOCK_DV)
    keep: Any  # (BLOCK_N,) bool: which of them exist and are no padding
    rows: Any  # (BLOCK_N,) int64: minus the positions, or minus the distances from the key at `start`
    start: Any
    query_start: Any  # see `KeyTiles`


class StripGradient(NamedTuple):
    """The place where dbias is added: the pointer to offset 0, and the unit of sums in integers."""

    ptr: Any
    fixed_unit: Any


def constants(values: Iterable[Any]) -> Iterable[tl.constexpr]:
    """The values as constexprs: members of a tuple that is compiled in."""
    return map(tl.constexpr, values)
