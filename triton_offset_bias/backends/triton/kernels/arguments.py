"""What kernels and their helpers take, as values with names.

The launches, the register budget and the compile tests make their arguments of these alone. Triton hands a kernel the
members of a tuple one by one, in their order; a member that is None is not handed over.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton.language as tl


class Inputs(NamedTuple):
    """Pointers to what every kernel reads; None where a call has no such tensor."""

    q: Any  # (B, H, M, D)
    k: Any  # (B, H // group, N, D)
    v: Any  # (B, H // group, N, DV)
    strip: Any = None  # (1 or B, 1 or H, columns) float32, see `scores`
    key_mask: Any = None  # (B, N) uint8
    query_positions: Any = None  # (M,) or (B, M)
    key_positions: Any = None  # (N,) or (B, N)
    cu_seqlens_q: Any = None  # (B + 1,)
    cu_seqlens_k: Any = None  # (B + 1,)
    seed: Any = None  # () int64


class Outputs(NamedTuple):
    """Pointers to what a forward pass leaves: out (B, H, M, DV), and (B, H, M) float32 of every row."""

    out: Any
    row_max: Any  # bits
    row_sum: Any
    lse: Any  # nats


class Parts(NamedTuple):
    """Pointers to what each split of the keys leaves: (splits, B, H, len_q) float32; acc has the axis DV as well."""

    acc: Any
    max: Any  # bits
    sum: Any


class Rows(NamedTuple):
    """(B, H, M) float32 of every row, as `prepare_kernel` leaves them: pointers, or a block's numbers."""

    lse: Any  # bits; without the log of the sum where SPLIT_LSE
    log_sum: Any  # bits
    delta: Any


class Strides(NamedTuple):
    """Of a (batch, heads, rows, dim) tensor, in elements."""

    b: Any
    h: Any
    row: Any
    d: Any


class SharedStrides(NamedTuple):
    """Of the strip, and from one sequence's positions to the next's; 0 where sequences or heads share them."""

    strip_b: Any
    strip_h: Any
    query_positions_b: Any
    key_positions_b: Any


class Sizes(NamedTuple):
    """Numbers of things."""

    num_heads: Any  # of queries
    group: Any  # query heads that share a key head
    len_q: Any  # of the longest sequence
    len_k: Any
    rows_q: Any  # of the tensors
    rows_k: Any


class Bounds(NamedTuple):
    """Ranges of offsets.

    Offsets count from the first query and key; of packed sequences, and where tensors give the positions, as the
    caller counts them.
    """

    zero: Any  # the strip's column of offset 0
    band_lo: Any  # pairs outside of the band are not attended to
    band_hi: Any
    near_lo: Any  # at offsets <= near_lo, and >= near_hi, the bias does not change any more
    near_hi: Any


class Form(NamedTuple):
    """What a call is like, compiled into its kernels."""

    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any  # the head dims padded to powers of two
    BLOCK_DV: Any
    HAS_BIAS: Any
    BIAS_IN_ACC: Any  # see `scores`
    HAS_MASK: Any
    HAS_POSITIONS: Any
    IS_PACKED: Any
    DROPOUT_ROUNDS: Any  # of Philox; 0 without dropout
    SPLIT_LSE: Any  # whether a row's log of the sum is kept apart from its maximum
    USE_ASM: Any  # whether the bias is loaded by inline assembly
    PRECISION: Any  # of products, see `tiles.product`
    WAIT: Any  # whether products must end in their iteration, see `tiles.waited_for`


class Loops(NamedTuple):
    """Which loops a kernel has, see `blocks`."""

    FAR_LEFT: Any
    NEAR: Any
    FAR_RIGHT: Any
    REST: Any = False  # the launch knows whether there is one


# What helpers are given.


class Scoring(NamedTuple):
    """How scores are made of products: where offset 0 of the strip is, for all rows or each, and numbers."""

    strip_ptr: Any
    bounds: Any
    scale_log2: Any  # the scale, in bits


class Dropping(NamedTuple):
    """Which weights are dropped, and what the others are multiplied with."""

    seed: Any
    head: Any  # as dropout counts heads
    largest_dropped: Any
    kept_scale: Any


class KeyTiles(NamedTuple):
    """A sequence's keys and values: pointers to the first tile, and how to go on."""

    k_ptrs: Any
    v_ptrs: Any
    stride_k: Any
    stride_v: Any
    mask_ptr: Any
    positions_ptr: Any
    length: Any


class QueryTiles(NamedTuple):
    """A sequence's queries and what belongs to them: pointers to the first tile, and how to go on."""

    q_ptrs: Any
    dout_ptrs: Any
    stride_q: Any
    stride_dout: Any
    row_ptrs: Any  # Rows
    positions_ptr: Any
    length: Any


class QueryBlock(NamedTuple):
    """A program's queries."""

    q: Any  # (BLOCK, BLOCK_D)
    dout: Any  # (BLOCK, BLOCK_DV)
    rows: Any  # (BLOCK,) int64: positions, or distances from the query at `start`
    stats: Any  # Rows of (BLOCK,)
    weights: Any  # (BLOCK,), see `scores.slope_weights`
    start: Any


class KeyBlock(NamedTuple):
    """A program's keys."""

    k: Any  # (BLOCK_N, BLOCK_D)
    v: Any  # (BLOCK_N, BLOCK_DV)
    keep: Any  # (BLOCK_N,) bool: which of them exist and are no padding
    rows: Any  # (BLOCK_N,) int64: minus the positions, or minus the distances from the key at `start`
    start: Any


class StripGradient(NamedTuple):
    """Where dbias is added: pointer to offset 0, and the unit of sums in integers."""

    ptr: Any
    fixed_unit: Any


def constants(values: Iterable[Any]) -> Iterable[tl.constexpr]:
    """Values as members of a tuple that is compiled in."""
    return map(tl.constexpr, values)
