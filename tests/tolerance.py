"""The one rule of accuracy: twice the error of plain PyTorch in the same dtype, plus a few roundings.

    max|got - ref64| <= 2 max|torch_same_dtype - ref64| + 4 eps max(1, max|ref64|)        and no NaN

A table's gradient is a sum of many terms that cancel, so there max|ref64| counts the sum of |dS| over a column as well.
"""

import torch
from torch import Tensor


def assert_accurate(
    name: str, got: Tensor, ref64: Tensor, same_dtype: Tensor, eps: float, summed: Tensor | None = None
) -> None:
    """Fails unless `got` obeys the rule; infinities (a log-sum-exp's -inf) must be where `ref64` has them.

    Args:
        name: the name of `got` in the message.
        got: the result to judge.
        ref64: the truth, float64.
        same_dtype: plain PyTorch's result in the dtype of the inputs.
        eps: rounding unit of that dtype.
        summed: the magnitudes that went into every sum, for a table's gradient.
    """
    assert got.shape == ref64.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref64.shape)}"
    got, same_dtype = got.detach().double(), same_dtype.double()
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} elements are NaN"
    finite = ref64.isfinite()
    assert torch.equal(got[~finite], ref64[~finite]), f"{name}: infinities differ"
    error = _largest(got[finite] - ref64[finite])
    magnitude = max(1.0, _largest(ref64[finite]), 0.0 if summed is None else _largest(summed))
    allowed = 2 * _largest(same_dtype[finite] - ref64[finite]) + 4 * eps * magnitude
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (largest value {magnitude:.3e})"


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
