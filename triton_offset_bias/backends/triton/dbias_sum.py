"""The sum of the strip's gradient, to which `dquery_kernel` adds, and the table's gradient that is folded from it."""

import torch
from torch import Tensor

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.call import Call
from triton_offset_bias.backends.triton.kernels.backward_queries import COPIES
from triton_offset_bias.backends.triton.kernels.strip import BLOCK, fold_kernel
from triton_offset_bias.backends.triton.launch import Launch
from triton_offset_bias.backends.triton.plan import Plan


class DbiasSum:
    """The strip's gradient while it is summed by atomic adds.

    A deterministic sum of gathered biases is a sum of integers, which does not depend on the order. An integer counts
    steps of 1 / unit, a power of two.

    No sum may pass 2^63. |dS| <= P (|dP| + |delta|). By Cauchy-Schwarz |dP| <= Z |dO| |V|, with the largest norms of
    rows; delta = sum of P dP - dlse, so |delta| <= Z |dO| |V| + |dlse|. The rows of P sum to 1. So the sum of |dS| over
    a row is at most 2 Z |dO| |V| + |dlse|, and over all rows as many times that; 2.1 leaves room for rounding. The
    largest power of two below 2^61 over this bound is the unit. It is far finer than float32 of the same sum. A gate
    multiplies dS, and the bound by its largest number.

    Attributes:
        how: DBIAS of `dquery_kernel`.
        sums: copies of the strip, (copies, 1 or B, 1 or H, columns), zeros once prepared; see `configs.takes_copies`.
        copy_stride: from one copy to the next, in elements; 0 if there is one.
        unit: () float32 for "fixed" sums; otherwise None.
        poison: (1 or B, 1 or H), for "fixed" sums only: NaN where scores were NaN, which integers cannot hold; else 0.
    """

    def __init__(self, call: Call) -> None:
        """Allocates the sums. `prepare_kernel` zeroes them."""
        assert call.strip is not None
        self._problem = call.problem
        self.how = configs.gathering()
        self.unit: Tensor | None = None
        if call.plan.has_positions:
            self.how = "fixed" if call.problem.deterministic else "elements"
        dtype = torch.int64 if self.how == "fixed" else torch.float32
        queries = call.plan.batch * call.plan.num_heads * call.plan.len_q // call.strip[..., 0].numel()
        if call.plan.has_positions and configs.takes_copies(queries, call.strip.shape[-1]):
            self.sums = call.strip.new_zeros(COPIES.value, *call.strip.shape, dtype=dtype)
            self.copy_stride = call.strip.numel()
        else:
            self.sums = torch.empty_like(call.strip, dtype=dtype).unsqueeze(0)
            self.copy_stride = 0

    def find_unit(self, row_sum: Tensor, dout: Tensor, dlse: Tensor | None) -> None:
        """Chooses the unit of "fixed" sums; `dout` is 0 in rows that attend to nothing."""
        if self.how != "fixed":
            return
        problem = self._problem
        self.poison = 0.0 * row_sum.amax(-1).sum_to_size(self.sums.shape[1:3])
        largest = _largest_row(dout) * _largest_row(problem.value) * dropout.kept_scale(problem.dropout_p)
        largest = 2.1 * largest + (0.0 if dlse is None else dlse.abs().amax())
        if problem.bias_gate is not None:
            largest = largest * problem.bias_gate.abs().amax()
        bits = torch.floor(61.0 - torch.log2(largest * (dout.numel() // dout.shape[3])))
        self.unit = torch.exp2(bits.clamp(-120.0, 120.0)).float()

    def total(self) -> Tensor:
        """The strip's gradient, float32."""
        sums = self.sums[0] if len(self.sums) == 1 else self.sums.sum(0)
        if self.unit is None:
            return sums
        return (sums.double() / self.unit).float() + self.poison.unsqueeze(-1)


def _largest_row(x: Tensor) -> Tensor:
    """The largest Euclidean norm of a row."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax()


def fold_strip(call: Call, dstrip: Tensor) -> Tensor:
    """The table's gradient, in its shape and dtype, from the strip's, (1 or B, 1 or H, columns)."""
    _, first, *_ = call.plan.strip.columns
    return _fold(call, dstrip, (first, *call.plan.strip.offsets))


def fold_offsets(call: Call, doffsets: Tensor, lo: int) -> Tensor:
    """The table's gradient, in its shape and dtype, from every offset's from `lo` on, (1 or B, 1 or H, offsets)."""
    return _fold(call, doffsets, (lo + call.problem.bias_origin, 0, doffsets.shape[-1]))


def _fold(call: Call, dstrip: Tensor, numbers: tuple[int, int, int]) -> Tensor:
    """Folds the columns [begin, end); numbers are the table's column that is the strip's first one, begin and end."""
    bias, plan = call.problem.bias, call.plan
    assert bias is not None
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    stride_row = dstrip.stride(-2) if dstrip.shape[1] > 1 else dstrip.stride(0)
    launch = plan.launch((fold_kernel, stride_row, numbers), lambda: _fold_launch(plan, stride_row, numbers))
    launch(call.is_aligned, dstrip, dbias)
    return dbias


def _fold_launch(plan: Plan, stride_row: int, numbers: tuple[int, int, int]) -> Launch:
    columns = plan.strip.num_columns
    constants = {"IS_ZERO_BEYOND": plan.strip.is_zero_beyond, "BLOCK": BLOCK, "enable_fp_fusion": True}
    programs = plan.strip.shape[0] * plan.strip.shape[1] * -(-columns // BLOCK)
    return Launch(fold_kernel, programs, (stride_row, columns, *numbers), constants)
