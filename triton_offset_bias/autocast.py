"""A question about autocast that `torch.compile` can trace."""

import torch


@torch.compiler.assume_constant_result  # before 2.13 torch cannot trace what answers
def has_autocast(device_type: str) -> bool:
    """Whether torch has autocast for devices of the type, such as "cuda"."""
    return torch.amp.is_autocast_available(device_type)
