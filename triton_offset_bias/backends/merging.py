"""The sum of softmax parts, for backends whose kernels compute each part by itself."""

import torch
from torch import Tensor


def add_part(acc: Tensor, row_max: Tensor, row_sum: Tensor, out: Tensor, part_max: Tensor, part_sum: Tensor) -> None:
    """Adds a part's rows to those of other parts, in place; see `forward_part` in `backends.contract`.

    `out` is the part's output, (B, H, Lq, Dv). `part_max` and `part_sum` are its rows' statistics, (B, H, Lq).
    """
    lowest = torch.finfo(row_max.dtype).min  # for rows without a key, whose maximum is no number to compare
    is_first, is_empty = row_sum == 0, part_sum == 0
    old_max, new_max = row_max.masked_fill(is_first, lowest), part_max.masked_fill(is_empty, lowest)
    largest = torch.maximum(old_max, new_max)
    kept = torch.exp2(old_max - largest).masked_fill(is_first, 0.0)
    added = part_sum * torch.exp2(new_max - largest).masked_fill(is_empty, 0.0)
    acc.copy_((kept.unsqueeze(-1) * acc).masked_fill(is_first.unsqueeze(-1), 0.0) + added.unsqueeze(-1) * out)
    row_sum.mul_(kept).add_(added)
    row_max.copy_(largest.masked_fill(row_sum == 0, float("inf")))
