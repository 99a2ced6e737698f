"""Which blocks a program works on: the rows of its sequence, and the ranges of blocks on the other side.

The keys that a block of queries attends to fall into four ranges: far left | near | far right | rest. Near tiles look
up the bias; far tiles lie wholly beyond the end of the table, see one bias, and are plain attention. The rest is the
last tile if the keys do not fill it: a near one, and the only one to ask which keys exist.
"""

import triton
import triton.language as tl


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
def counted_from(first, zero, band_lo, band_hi, near_lo, near_hi):
    """The strip's column of offset 0, and the bounds, counted from a query `first` positions after the first key."""
    return zero + first, band_lo - first, band_hi - first, near_lo - first, near_hi - first


@triton.jit
def all_blocks(length, BLOCK: tl.constexpr):
    """As `block_ranges`, where nothing is known of the offsets: everything is near."""
    even = length // BLOCK * BLOCK
    return 0, 0, even, even, tl.cdiv(length, BLOCK) * BLOCK


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
