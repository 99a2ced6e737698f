"""Asks about autocast in a form that `torch.compile` can trace."""

import torch


@torch.compiler.assume_constant_result  # torch before 2.13 cannot trace the function below
def has_autocast(device_type: str) -> bool:
    """Whether torch has autocast for devices of the type, such as "cuda"."""
    return torch.amp.is_autocast_available(device_type)
