"""The sum of the strip's gradient, to which `dquery_kernel` adds."""

import torch
from torch import Tensor

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.call import Call


class DbiasSum:
    """The strip's gradient while it is summed by atomic adds.

    A deterministic sum of gathered biases is a sum of integers, which does not depend on the order. An integer counts
    steps of 1 / unit, a power of two.

    No sum may pass 2^63. |dS| <= P (|dP| + |delta|). By Cauchy-Schwarz |dP| <= Z |dO| |V|, with the largest norms of
    rows; delta = sum of P dP - dlse, so |delta| <= Z |dO| |V| + |dlse|. The rows of P sum to 1. So the sum of |dS| over
    a row is at most 2 Z |dO| |V| + |dlse|, and over all rows as many times that; 2.1 leaves room for rounding. The
    largest power of two below 2^61 over this bound is the unit. It is far finer than float32 of the same sum.

    Attributes:
        how: DBIAS of `dquery_kernel`.
        sums: shaped like the strip, zeros at first.
        unit: () float32 for "fixed" sums; otherwise None.
        poison: (1 or B, 1 or H), for "fixed" sums only: NaN where scores were NaN, which integers cannot hold; else 0.
    """

    def __init__(self, call: Call, row_sum: Tensor, dout: Tensor, dlse: Tensor | None) -> None:
        assert call.strip.values is not None
        problem, strip = call.problem, call.strip.values
        self.how = configs.gathering()
        self.unit: Tensor | None = None
        if problem.query_positions is not None:
            self.how = "fixed" if problem.deterministic else "elements"
        if self.how == "fixed":
            self.poison = 0.0 * row_sum.amax(-1).sum_to_size(strip.shape[:2])
            largest = _largest_row(dout) * _largest_row(problem.value) * dropout.kept_scale(problem.dropout_p)
            largest = 2.1 * largest + (0.0 if dlse is None else dlse.abs().amax())
            bits = torch.floor(61.0 - torch.log2(largest * (dout.numel() // dout.shape[3])))
            self.unit = torch.exp2(bits.clamp(-120.0, 120.0)).float()
        dtype = torch.int64 if self.how == "fixed" else torch.float32
        self.sums = torch.zeros_like(strip, dtype=dtype)

    def total(self) -> Tensor:
        """The strip's gradient, float32."""
        if self.unit is None:
            return self.sums
        return (self.sums.double() / self.unit).float() + self.poison.unsqueeze(-1)


def _largest_row(x: Tensor) -> Tensor:
    """The largest Euclidean norm of a row."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax()
