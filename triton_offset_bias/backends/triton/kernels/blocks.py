"""The blocks that a program works on: the rows of its sequence, and the parts of the other side.

The keys that a block of queries attends to fall into four parts: far left | near | far right | rest. Near tiles look
up the bias. Far tiles lie wholly beyond the end of the table, see one bias, and are plain attention. The rest is the
last tile, if the keys do not fill it. It is a near tile, and the only one that asks which keys exist.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import Bounds, Sizes

# Indices of the parts among `edges_of`, and in `Loops`.
FAR_LEFT, NEAR, FAR_RIGHT, REST = (tl.constexpr(part) for part in range(4))


class Sequence(NamedTuple):
    """One sequence's rows in the tensors, and its bounds."""

    first_q: Any
    len_q: Any
    first_k: Any
    len_k: Any
    bounds: Any


class Head(NamedTuple):
    """A program's sequence and query head."""

    index: Any  # b * num_heads + h
    b: Any  # int64
    h: Any  # int64


@triton.jit
def far_offset(bounds, PART: tl.constexpr):
    """An offset at which the strip holds the one bias of a far part."""
    return (bounds.near_hi, 0, bounds.near_lo, 0)[PART]


@triton.jit
def counted(
    num_heads, len_q, len_k, rows_q, rows_k, zero, band_lo, band_hi, near_lo, near_hi,
    FORM: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """`Sizes` and `Bounds` of a call, from the arguments of a kernel. Lengths without a rest are multiples of 16."""
    if not LOOPS.REST:
        len_q, len_k = full_length(len_q), full_length(len_k)
    sizes = Sizes(num_heads, FORM.GROUP, len_q, len_k, rows_q, rows_k)
    return sizes, Bounds(zero, band_lo, band_hi, near_lo, near_hi)


@triton.jit
def full_length(length):
    """A multiple of 16, computed so that the compiler sees it: neighbouring rows then share a mask."""
    return length // 16 * 16


@triton.jit
def head_of(index, num_heads):
    """The sequence and the head with the number b * num_heads + h."""
    return Head(index, (index // num_heads).to(tl.int64), (index % num_heads).to(tl.int64))


@triton.jit
def sequence_of(inputs, b, sizes, bounds, FORM: tl.constexpr):
    """Sequence b of the call, its bounds counted from its first query and key."""
    first_q, len_q = sequence_rows(inputs.cu_seqlens_q, b, sizes.len_q, sizes.rows_q, FORM.IS_PACKED)
    first_k, len_k = sequence_keys(inputs, b, sizes, FORM)
    if FORM.IS_PACKED or FORM.HAS_LENGTHS:
        bounds = counted_from(first_position(inputs, b, len_q, len_k, sizes, FORM), bounds)
    return Sequence(first_q, len_q, first_k, len_k, bounds)


@triton.jit
def first_position(inputs, b, len_q, len_k, sizes, FORM: tl.constexpr):
    """The position of a sequence's first query where offsets count as those of `Bounds`, and its first key's is 0.

    The last query of a sequence with a length of its own lies on its last key, unless the call says where it begins.
    """
    if FORM.HAS_STARTS:
        return tl.load(inputs.query_starts + b).to(tl.int32)
    elif FORM.IS_PACKED:
        return len_k - len_q
    elif FORM.HAS_LENGTHS:
        return len_k - sizes.len_k
    else:
        return 0


@triton.jit
def sequence_keys(inputs, b, sizes, FORM: tl.constexpr):
    """The first key of sequence b, and its number of keys."""
    first, length = sequence_rows(inputs.cu_seqlens_k, b, sizes.len_k, sizes.rows_k, FORM.IS_PACKED)
    if FORM.HAS_LENGTHS:  # unchecked
        length = tl.minimum(tl.maximum(tl.load(inputs.key_lengths + b), 0), sizes.len_k).to(tl.int32)
    return first, length


@triton.jit
def sequence_rows(cu_seqlens_ptr, b, longest, rows, IS_PACKED: tl.constexpr):
    """The first row of sequence b and its number of rows: packed into `rows` rows, or `longest` rows of its own.

    Nobody has checked the bounds of packed sequences, so they are limited to the tensor here.
    """
    if IS_PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), first), rows)
        return first, tl.minimum(end - first, longest).to(tl.int32)
    else:
        return 0, longest


@triton.jit
def counted_from(first, bounds):
    """The bounds, counted from a query `first` positions after the first key."""
    return Bounds(
        bounds.zero + first,
        bounds.band_lo - first,
        bounds.band_hi - first,
        bounds.near_lo - first,
        bounds.near_hi - first,
    )


@triton.jit
def mirrored(bounds):
    """The bounds where offsets count backwards, from keys to queries."""
    return Bounds(bounds.zero, -bounds.band_hi, -bounds.band_lo, -bounds.near_hi, -bounds.near_lo)


@triton.jit
def edges_of(start, length, bounds, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, FORM: tl.constexpr):
    """The edges between the parts of the other side: begin, first near, first far right, begin of the rest, and end.

    All are multiples of BLOCK_OTHER. The rest is at most one block, which `length` cuts short. For the block of queries
    at `start` the other side is keys. For a block of keys it is queries, and the bounds are `mirrored`. Nothing is
    known about positions from tensors, so everything is near.
    """
    if FORM.HAS_POSITIONS:
        even = length // BLOCK_OTHER * BLOCK_OTHER
        return 0, 0, even, even, tl.cdiv(length, BLOCK_OTHER) * BLOCK_OTHER
    else:
        begin = tl.maximum(start - bounds.band_hi, 0) // BLOCK_OTHER * BLOCK_OTHER
        end = tl.minimum(start + BLOCK - bounds.band_lo, length)
        end = tl.maximum(tl.cdiv(end, BLOCK_OTHER) * BLOCK_OTHER, begin)
        even = tl.maximum(tl.minimum(length // BLOCK_OTHER * BLOCK_OTHER, end), begin)
        near = tl.maximum(start + 1 - bounds.near_hi, 0) // BLOCK_OTHER * BLOCK_OTHER
        near = tl.minimum(tl.maximum(near, begin), even)
        far = tl.cdiv(tl.maximum(start + BLOCK - 1 - bounds.near_lo, 0), BLOCK_OTHER) * BLOCK_OTHER
        far = tl.minimum(tl.maximum(far, near), even)
        return begin, near, far, even, end
