"""The offsets that a module is asked for, as tensors."""

import torch
from torch import Tensor

from triton_offset_bias.checks.arguments import check_offset_range


def offset_range(min_offset: int, max_offset: int, device: torch.device | str | None) -> Tensor:
    """Every offset from `min_offset` to `max_offset`, both included: (offsets,) int64.

    Raises:
        TypeError: a bound is no int.
        ValueError: `max_offset` is below `min_offset`.
    """
    check_offset_range(min_offset, max_offset)
    return torch.arange(min_offset, max_offset + 1, device=device)


def distance_range(min_offset: int, max_offset: int, device: torch.device | str | None) -> Tensor:
    """The absolute value of every offset of `offset_range`: (offsets,) float32, exact up to 2**24."""
    return offset_range(min_offset, max_offset, device).abs().float()
