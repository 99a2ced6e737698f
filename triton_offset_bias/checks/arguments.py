"""Checks of one argument at a time. Each raises an error that names the argument, or returns a valid value."""

import sys
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from triton_offset_bias import table

LARGEST_SCALE = sys.float_info.max
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"`{name}` must be a dense torch.Tensor (layout torch.strided), got {kind}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool, got {value!r}")


def checked_int(name: str, value: int) -> int:
    """`value`, an int; NumPy's integers become one."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | Integral):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    # A comparison would make a symbolic number a constant. Such numbers are small, because they are sizes of tensors.
    if not isinstance(value, torch.SymInt) and not -table.UNLIMITED < value < table.UNLIMITED:
        raise ValueError(f"`{name}` must be between -2**61 and 2**61, got {value}")
    return value if isinstance(value, int | torch.SymInt) else int(value)


def checked_count(name: str, value: int) -> int:
    """`value`, an int of at least 1."""
    if checked_int(name, value) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
    return value


def checked_length(name: str, value: int | Tensor) -> int:
    """`value`, an int of at least 0. A tensor with one integer becomes an int, which waits for the device."""
    length = _read(name, torch.as_tensor(value) if isinstance(value, np.ndarray) else value)
    if length is not value and torch.compiler.is_compiling():
        # A graph does not know the number that it reads. The operator checks it.
        torch._check(length >= 0, lambda: f"`{name}` must be at least 0")
    elif checked_int(name, length) < 0:
        raise ValueError(f"`{name}` must be at least 0, got {length}")
    return length


def _read(name: str, value: int | Tensor) -> int:
    """The one integer in a tensor."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.dtype not in INTEGERS:
        got = f"{value.dtype} with shape {shape(value)}"
        raise TypeError(f"`{name}` must be an int or a tensor with one integer, got {got}")
    return int(value.item())


def checked_causal_by(causal_by: str, is_causal: bool) -> str:
    """Returns `causal_by`, or raises if it is unknown or has no meaning."""
    if causal_by not in table.CAUSAL_BY:
        raise ValueError(f"`causal_by` must be one of {', '.join(map(repr, table.CAUSAL_BY))}, got {causal_by!r}")
    if causal_by == "index" and not is_causal:
        raise ValueError("`causal_by` must be 'position' where `is_causal` is False, got 'index'")
    return causal_by


def check_offset_range(min_offset: int, max_offset: int) -> None:
    """Raises ValueError unless the range of offsets, both ends included, has at least one."""
    if checked_int("max_offset", max_offset) < checked_int("min_offset", min_offset):
        raise ValueError(f"`max_offset` must be at least `min_offset` ({min_offset}), got {max_offset}")


def checked_window(window_size: tuple[int, int]) -> tuple[int, int]:
    """The window (left, right), two ints of at least -1."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"`window_size` must be a pair (left, right) of ints, got {window_size!r}")
    left, right = (checked_int("window_size", side) for side in window_size)
    if left < -1 or right < -1:
        raise ValueError(f"`window_size` must hold sizes >= 0, or -1 for unlimited, got {tuple(window_size)}")
    return left, right


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the dot products, a float; the default is ``head_dim ** -0.5``."""
    if scale is None:
        return float(head_dim) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat | Real):
        raise TypeError(f"`scale` must be a float or None, got {scale!r}")
    scale = scale if isinstance(scale, int | float | torch.SymFloat) else float(scale)
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"`scale` must be finite, got {scale}")
    return float(scale)


def checked_dropout(dropout_p: float) -> float:
    """The probability of dropping a weight, a float."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float | Real):
        raise TypeError(f"`dropout_p` must be a float, got {dropout_p!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"`dropout_p` must be between 0 and 1, got {dropout_p}")
    return float(dropout_p)


def checked_beyond(beyond: str) -> str:
    """`beyond`, one of `table.BEYOND`."""
    if beyond not in table.BEYOND:
        raise ValueError(f"`beyond` must be one of {', '.join(map(repr, table.BEYOND))}, got {beyond!r}")
    return beyond


def checked_deterministic(deterministic: bool | None) -> bool:
    """The caller's choice, or torch's setting if it is None."""
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    check_flag("deterministic", deterministic)
    return deterministic
