"""Strips from tables, as a part of `prepare_kernel`; and a kernel that makes a table's gradient from a strip's.

Column `c` of a strip is the table's column ``first + c``, or the bias beyond its end. Every head of a table is a row.
"""

import triton
import triton.language as tl

from triton_offset_bias.backends.triton.kernels.arguments import INTEGERS

BLOCK = 1024
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=INTEGERS)
def constants_kernel(
    bias_ptr, constants_ptr,
    stride_b, stride_h, stride_n, num_heads, num_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The constant that a row of the table is counted from: one of its numbers where that is exact, else 0.

    One program has one row. See `Strip.constants`. A number that is +inf or NaN makes the constant 0.
    """
    row = tl.program_id(0)
    bias_ptr += (row // num_heads).to(tl.int64) * stride_b + (row % num_heads).to(tl.int64) * stride_h
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(bias_ptr + column.to(tl.int64) * stride_n, mask=column < num_columns, other=float("-inf"))
        x = x.to(tl.float32)
        nans |= (x != x).to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
        highest = tl.maximum(highest, x)
    low, high = tl.min(lowest, 0), tl.max(highest, 0)
    is_finite = (low >= -LARGEST) & (high <= LARGEST) & (tl.max(nans, 0) == 0)
    spread = tl.where(is_finite, high, 0.0) - tl.where(is_finite, low, 0.0)
    is_exact = is_finite & (low <= high) & (spread <= tl.minimum(tl.abs(low), tl.abs(high)))
    tl.store(constants_ptr + row, tl.where(is_exact, low, 0.0))


@triton.jit
def fill_strip(table, index, programs, num_heads, columns, unit, limit, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Writes (table - constant) * unit to block `index` of the strips, and -inf outside of the columns [begin, end).

    Finite numbers stay finite, since only -inf forbids a pair: `limit` is the largest number that is finite in units.
    Outside of the columns a gated strip has 0. If it is cut, the mask behind the strips has 0 inside and -inf outside.
    """
    blocks = tl.cdiv(columns.width, BLOCK)
    row, column = index // blocks, index % blocks * BLOCK + tl.arange(0, BLOCK)
    b, h = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    bias_ptr = table.bias + b * columns.stride_b + h * columns.stride_h
    is_inside = (column >= columns.begin) & (column < columns.end)
    source = columns.first + column.to(tl.int64)
    within = tl.minimum(tl.maximum(source, 0), columns.num_columns - 1)
    x = tl.load(bias_ptr + within * columns.stride_n, mask=is_inside, other=float("-inf")).to(tl.float32)
    if FORM.IS_ZERO_BEYOND:
        x = tl.where(is_inside & (source != within), 0.0, x)
    if FORM.HAS_CONSTANTS:
        x -= tl.load(table.constants + row)
    # Comparisons let NaN pass, unlike minimum and maximum.
    x = tl.where((x > limit) & (x <= LARGEST), limit, x)
    x = tl.where((x < -limit) & (x >= -LARGEST), -limit, x)
    to_column = row.to(tl.int64) * columns.width + column
    if FORM.HAS_GATE:
        x = tl.where(is_inside, x, 0.0)
    if FORM.IS_CUT:
        mask_ptr = table.strip + programs // blocks * tl.cast(columns.width, tl.int64)
        tl.store(mask_ptr + to_column, tl.where(is_inside, 0.0, float("-inf")), mask=column < columns.width)
    tl.store(table.strip + to_column, x * unit, mask=column < columns.width)
    tl.store(table.sums + to_column, tl.zeros([BLOCK], table.sums.dtype.element_ty), mask=column < columns.sums_width)


@triton.jit(do_not_specialize=INTEGERS)
def fold_kernel(
    dstrip_ptr, dbias_ptr,
    stride_row, num_columns, first, begin, end,
    IS_ZERO_BEYOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The transpose of `fill_strip` with unit 1: each column of the table gets the columns [begin, end) that see it.

    The program that holds an end of the table adds up the columns beyond that end.
    """
    blocks = tl.cdiv(num_columns, BLOCK)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    dstrip_ptr += row.to(tl.int64) * stride_row
    first = tl.cast(first, tl.int64)  # the difference of two that 32 bits hold may take more
    source = column - first
    total = tl.load(dstrip_ptr + source, mask=(source >= begin) & (source < end) & (column < num_columns), other=0.0)
    if not IS_ZERO_BEYOND:
        if block == 0:
            below = sum_of(dstrip_ptr, begin, tl.minimum(tl.maximum(-first, begin), end), BLOCK)
            total += tl.where(column == 0, below, 0.0)
        if block == blocks - 1:
            above = sum_of(dstrip_ptr, tl.maximum(tl.minimum(num_columns - first, end), begin), end, BLOCK)
            total += tl.where(column == num_columns - 1, above, 0.0)
    tl.store(dbias_ptr + row.to(tl.int64) * num_columns + column, total, mask=column < num_columns)


@triton.jit
def sum_of(ptr, begin, end, BLOCK: tl.constexpr):
    """The sum of the float32 numbers [begin, end), in one order."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums += tl.load(ptr + index, mask=index < end, other=0.0)
    return tl.sum(sums, 0)
