"""Which blocks a program works on: the rows of its sequence, and the parts of the other side.

The keys that a block of queries attends to fall into four parts: far left | near | far right | rest. Near tiles look
up the bias; far tiles lie wholly beyond the end of the table, see one bias, and are plain attention. The rest is the
last tile if the keys do not fill it: a near one, and the only one to ask which keys exist.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import Bounds

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
    """An offset of the part, if it is far: one at which the strip holds its bias."""
    return (bounds.near_hi, 0, bounds.near_lo, 0)[PART]


@triton.jit
def head_of(index, num_heads):
    """The sequence and head of a number that counts both."""
    return Head(index, (index // num_heads).to(tl.int64), (index % num_heads).to(tl.int64))


@triton.jit
def sequence_of(inputs, b, sizes, bounds, FORM: tl.constexpr):
    """Sequence b of the call; packed, its last query lies on its last key."""
    first_q, len_q = sequence_rows(inputs.cu_seqlens_q, b, sizes.len_q, sizes.rows_q, FORM.IS_PACKED)
    first_k, len_k = sequence_rows(inputs.cu_seqlens_k, b, sizes.len_k, sizes.rows_k, FORM.IS_PACKED)
    if FORM.IS_PACKED:
        bounds = counted_from(len_k - len_q, bounds)
    return Sequence(first_q, len_q, first_k, len_k, bounds)


@triton.jit
def sequence_rows(cu_seqlens_ptr, b, longest, rows, IS_PACKED: tl.constexpr):
    """First row of sequence b, and its number of rows: packed into `rows` rows, or `longest` of its own.

    Nobody has looked at the bounds of packed sequences: whatever they are, they stay inside of the tensor.
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
    """Where the blocks of `length` others begin, turn near, turn far again, lose their evenness, and end.

    All are multiples of BLOCK_OTHER; from the fourth on, at most one block is left, which `length` cuts short. For the
    block of queries at `start` the others are keys. For a block of keys they are queries, and the bounds `mirrored`.
    Of positions nothing is known: everything is near.
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
