"""Block sizes, warps and pipeline stages, by target ("cuda:90", "hip:gfx942", "interpreter"), dtype and head dim.

`block_d` is the head dim padded to a power of two. Chosen by modelled cycles of the compiled code, see docs/gpu.md.
"""

from dataclasses import dataclass
from typing import Any

import torch

# How dbias is gathered: one atomic add for each diagonal of a tile ("diagonals"), or for each score ("elements").
DBIAS = "diagonals"

# With two stages or wider tiles, ptxas serialises their asynchronous matrix products (C7511, C7515).
_WGMMA = ("cuda:90", "cuda:100")
_LITTLE_SHARED_MEMORY = ("cuda:86", "cuda:89", "cuda:120")  # 99 KiB a block


@dataclass(frozen=True)
class Config:
    """A kernel's shape: rows and columns of a tile of scores, warps a program, stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def forward_config(target: str, dtype: torch.dtype, block_d: int) -> Config:
    """The forward kernel's."""
    if target == "interpreter":
        return Config(64, 32, 4, 1)
    if dtype == torch.float32:
        return Config(64, 32, 4, 2) if block_d <= 64 else Config(32, 32, 4, 1)
    if target.startswith("hip"):
        return Config(128, 64, 4, 1) if block_d <= 128 else Config(64, 32, 4, 1)
    if block_d > 128:
        return Config(64, 32, 4, 2) if target in _LITTLE_SHARED_MEMORY else Config(128, 32, 8, 3)
    if block_d > 64:
        return Config(128, 64, 8, 3) if target in _WGMMA else Config(128, 128, 8, 2)
    return Config(128, 64, 4, 3)


def backward_config(target: str, dtype: torch.dtype, block_d: int) -> Config:
    """That of the backward kernels, whose tiles are square."""
    if target == "interpreter":
        return Config(64, 64, 4, 1)
    if dtype == torch.float32 or block_d > 128:
        return Config(32, 32, 4, 1)
    return Config(64, 64, 4, 3 if target in _WGMMA else 1 if target.startswith("hip") else 2)
