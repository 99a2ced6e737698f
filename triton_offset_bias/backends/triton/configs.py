"""Block sizes, warps and pipeline stages, by architecture, dtype and head dim."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """A kernel's shape: rows (and, forward, columns) of a tile of scores; warps a program; stages of the pipeline."""

    block: int
    num_warps: int
    num_stages: int
    block_n: int | None = None

    def keywords(self) -> dict[str, Any]:
        """As a launch takes them."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.block_n is None:
            return {**options, "BLOCK": self.block}
        return {**options, "BLOCK_M": self.block, "BLOCK_N": self.block_n}


def forward_config(arch: str, dtype: torch.dtype, block_d: int) -> Config:
    """The forward kernel's, for a head dim padded to `block_d`."""
    if arch == "interpreter":
        return Config(32, 4, 1, block_n=16)
    if dtype == torch.float32:
        return Config(32, 4, 1, block_n=32)
    return Config(128, 4 if block_d <= 64 else 8, 3 if block_d <= 128 else 2, block_n=64 if block_d <= 128 else 32)


def dquery_config(arch: str, dtype: torch.dtype, block_d: int) -> Config:
    """The dQ and dbias kernel's."""
    return _backward_config(arch, dtype, block_d)


def dkey_dvalue_config(arch: str, dtype: torch.dtype, block_d: int) -> Config:
    """The dK and dV kernel's."""
    return _backward_config(arch, dtype, block_d)


def dbias_config(arch: str, dtype: torch.dtype, block_d: int) -> Config:
    """The deterministic dbias kernel's."""
    return _backward_config(arch, dtype, block_d)


def _backward_config(arch: str, dtype: torch.dtype, block_d: int) -> Config:
    if arch == "interpreter":
        return Config(32, 4, 1)
    if dtype == torch.float32:
        return Config(32, 4, 1)
    return Config(64, 4, 2) if block_d <= 128 else Config(32, 4, 1)
