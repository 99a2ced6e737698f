"""Launch configurations of the kernels, by target, dtype and head dim.

`block_d` is the head dim padded to a power of two. Modelled cycles of the compiled code decided between configurations,
see docs/gpu.md.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton

from triton_offset_bias.backends.triton.kernels.arguments import Loops
from triton_offset_bias.backends.triton.target import KIB, Target

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
HOPPER_KEYS = 128  # the most keys of a tile of `hopper_forward_kernel`

# The variable selects how the table's gradient is added up: "diagonals" is one atomic add for each diagonal of a tile;
# "elements" is one for each score, and shows in benchmarks how much time the diagonals save.
GATHERING_VARIABLE = "TRITON_OFFSET_BIAS_DBIAS"

# Names of the kernels' constants that are block sizes; BLOCK is the size of square tiles.
BLOCKS = ("BLOCK", "BLOCK_M", "BLOCK_N")


@dataclass(frozen=True)
class Config:
    """A launch configuration: rows and columns of a tile of scores, warps a program, stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def sizes(self) -> dict[str, int]:
        """The values of `BLOCKS`."""
        return {"BLOCK": self.block_m, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @property
    def options(self) -> dict[str, Any]:
        """The options that Triton's compiler takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


_MIN_COPIED_QUERIES, _MAX_COPIED_COLUMNS = 1024, 1024
MAX_DECODE_ROWS = 64  # queries times heads that share a key head
_MIN_DECODE_KEYS = 512
_MIN_KEYS_PER_SPLIT, _MAX_SPLITS = 256, 128  # also of sums

_SQUARE = [Config(size, size, 4, stages) for size in (32, 64) for stages in (1, 2, 3)]
_SQUARE += [Config(64, 64, 8, 2), Config(64, 64, 8, 3), Config(128, 128, 8, 1), Config(128, 128, 8, 2)]
# The configurations that tuning on the user's machine tries, by kernel, if they `may_fit`. One that does not fit after
# all loses. The large tiles, and 8 warps, are for data centres' GPUs.
CANDIDATES = {
    "forward": [
        Config(32, 32, 4, 1),
        *(
            Config(block_m, block_n, warps, stages)
            for block_m, warps in ((64, 4), (128, 4), (128, 8))
            for block_n in (32, 64, 128)
            for stages in (2, 3)
        ),
        *(Config(128, 64, warps, 4) for warps in (4, 8)),
        Config(256, 64, 8, 3),
    ],
    "dquery": _SQUARE,
    "dkey_dvalue": [
        *_SQUARE,
        *(Config(32, 64, 4, 3), Config(32, 128, 8, 3)),
        *(Config(64, 128, 8, stages) for stages in (2, 3)),
        *(Config(128, 64, 8, stages) for stages in (2, 3)),
    ],
}


def may_fit(kernel: str, config: Config, target: Target, dtype: torch.dtype, block_d: int) -> bool:
    """Whether shared memory has room for the tiles that are on their way while the loop's last stage is at work.

    Each stage loads two tiles: keys and values, or queries and dO. What else a kernel needs is not counted.
    """
    rows = config.block_m if kernel == "dkey_dvalue" else config.block_n
    return 2 * (config.num_stages - 1) * rows * block_d * dtype.itemsize <= target.shared_memory


def gathering() -> str:
    """The way in which the table's gradient is added up where offsets are contiguous: "diagonals" or "elements"."""
    return os.environ.get(GATHERING_VARIABLE, "diagonals")


def takes_copies(queries: int, columns: int) -> bool:
    """Whether the gradient of a table that is gathered is summed in copies, of which each program takes one.

    Thousands of windows may share a small table, as Swin's do. Their programs would add to the same few addresses.

    Args:
        queries: the number of queries, of all heads and sequences, that share a row of the table.
        columns: the columns of a row.
    """
    return queries >= _MIN_COPIED_QUERIES and columns <= _MAX_COPIED_COLUMNS


def is_bias_in_acc(target: Target, dtype: torch.dtype, scale_log2: float) -> bool:
    """Whether the matrix product starts from the bias. Otherwise the bias is added to the product.

    Starting from the bias saves one addition a score. Four cases start from 0: float32, whose sum is then more exact;
    a tiny scale, by which the strip would overflow; Blackwell, where copies start a product in tensor memory; and other
    vendors' GPUs, where without inline assembly the bias would be loaded in another layout.
    """
    return target.backend == "cuda" and not target.is_blackwell and dtype != torch.float32 and scale_log2 > 1e-6


def needs_far_loop(target: Target) -> bool:
    """Whether kernels with a bias have loops over far tiles around the loop over near tiles, even if they are empty.

    With Triton 3.9, ptxas makes asynchronous products of a kernel's first loop wait for the bias (C7515, C7517). With
    older versions `needs_copy` and `needs_wait` prevent that. With all versions the loops save kernels: lengths within
    the table's reach take those of other lengths.
    """
    return target.is_hopper


def folds_rows(target: Target, block_d: int) -> bool:
    """Whether the sums along diagonals add rows in pairs first.

    This halves their way through shared memory, and takes registers that wide heads need without asynchronous products.
    """
    return target.is_asynchronous or block_d <= 64


def keeps_sums(block_d: int) -> bool:
    """Whether the sums along diagonals that go on are kept from tile to tile, instead of the tile.

    That takes instructions, and leaves registers to wide heads, which lack them.
    """
    return block_d > 64


def needs_copy(target: Target, dtype: torch.dtype) -> bool:
    """Whether products that start from the bias must start from a copy. Triton 3.9 makes one by itself."""
    return target.is_hopper and dtype != torch.float32 and TRITON < (3, 9)


def needs_wait(target: Target, dtype: torch.dtype, is_whole: bool = False) -> bool:
    """Whether kernels must make asynchronous products start and end in one iteration.

    Triton 3.9 does so by itself, but not in the backward pass that is one kernel (`is_whole`).
    """
    return target.is_hopper and dtype != torch.float32 and (is_whole or TRITON < (3, 9))


def forward_config(target: Target, dtype: torch.dtype, block_d: int, has_positions: bool = False) -> Config:
    """Launch configuration of `forward_kernel`. Position tensors take registers, so with them tiles are smaller."""
    if target.backend == "interpreter":
        return Config(64, 32, 4, 1)
    if dtype == torch.float32 or not target.takes_large_tiles:
        return Config(64, 32, 4, 2) if block_d <= 64 else Config(32, _rows(target, dtype, block_d), 4, 1)
    if target.backend == "hip":
        return Config(128, 64, 4, 1) if block_d <= 128 else Config(64, 32, 4, 1)
    if has_positions and (block_d <= 128 or not target.is_asynchronous):
        return Config(128, 64, 8, 2) if block_d <= 128 else Config(64, 32, 4, 2)
    if block_d > 128:
        return Config(128, 32, 8, 3) if target.shared_memory >= 162 * KIB else Config(64, 32, 4, 2)
    if block_d > 64:
        if target.is_asynchronous:
            return Config(128, 64, 8, 3)
        return Config(128, 64 if TRITON < (3, 7) else 128, 8, 2)  # 3.6 spills kilobytes of masked tiles of 128 keys
    return Config(128, 64, 4, 2 if target.is_hopper and TRITON == (3, 8) else 3)  # there a third stage spills


def hopper_forward_config(block_d: int, loops: Loops) -> Config:
    """Launch configuration of `hopper_forward_kernel`, each of whose loops has buffers of its own.

    128 queries are 64 for each of two groups of four warps; Triton counts the four that it starts with. Head dims above
    64 have room for the buffers of one loop with so many keys.
    """
    num_loops = sum([loops.FAR_LEFT or loops.FAR_RIGHT, loops.NEAR, loops.REST])
    takes_most = num_loops == 1 or (block_d <= 64 and TRITON != (3, 8))  # 3.8's compiler fails on such a tile
    return Config(128, HOPPER_KEYS if takes_most else HOPPER_KEYS // 2, 4, 2)


def dquery_config(target: Target, dtype: torch.dtype, block_d: int) -> Config:
    """Launch configuration of `dquery_kernel` and `dbias_kernel`, which sum along diagonals of square tiles."""
    if target.backend == "interpreter":
        return Config(64, 64, 4, 1)
    if dtype == torch.float32 or block_d > 128 or not target.takes_large_tiles:
        rows = _rows(target, dtype, block_d)
        return Config(rows, rows, 4, 1)
    return Config(64, 64, 4, 3 if target.is_asynchronous else 1 if target.backend == "hip" else 2)


def dkey_dvalue_config(target: Target, dtype: torch.dtype, block_d: int) -> Config:
    """Launch configuration of `dkey_dvalue_kernel`."""
    if target.is_asynchronous and dtype != torch.float32 and 64 < block_d <= 128:
        return Config(32, 64, 4, 3)  # 64 queries would spill
    return dquery_config(target, dtype, block_d)


def backward_config(target: Target, dtype: torch.dtype, block_d: int) -> Config | None:
    """Launch configuration of `dkey_dvalue_kernel` as the whole backward pass; None where two kernels are faster.

    One kernel computes five products a tile instead of seven. In return programs add dQ atomically. Modelled cycles
    decide, since no device has: docs/gpu.md has them.
    """
    if dtype == torch.float32 or block_d > 128:
        return None
    if target.backend == "interpreter" or target.is_hopper:
        return Config(64, 128, 8, 3)
    is_a100 = target.backend == "cuda" and not target.is_blackwell and target.shared_memory >= 160 * KIB
    return Config(64, 64, 4, 3) if is_a100 else None


def least_shared_memory(dtype: torch.dtype, block_d: int) -> int:
    """Bytes that the smallest tiles of the backward pass take: four tiles of 16 rows, and 16 x 16 scores."""
    return 16 * (4 * block_d * dtype.itemsize + 16 * 4)


def _rows(target: Target, dtype: torch.dtype, block_d: int) -> int:
    """Rows of a small tile: as many as leave room for five tiles of queries, keys, values and gradients."""
    if target.backend == "hip":  # holds them in registers
        return 32
    return 32 if 5 * 32 * block_d * dtype.itemsize <= target.shared_memory else 16


def is_decode(rows: int, keys: int) -> bool:
    """Whether splitting the keys is faster: `rows` (queries times heads that share a key head) are few, keys many."""
    return rows <= MAX_DECODE_ROWS and keys >= _MIN_DECODE_KEYS


def decode_config(target: Target, dtype: torch.dtype, block_d: int, rows: int) -> Config:
    """Launch configuration of `decode_kernel`."""
    fewest = 64 if target.backend == "hip" else 16  # Triton 3.6.0 does not compile fewer for AMD
    block_m = max(fewest, 1 << (rows - 1).bit_length())
    is_narrow = target.backend == "cuda" and target.shared_memory < 160 * KIB
    if is_narrow and dtype == torch.float32 and block_d > 128 and block_m > 16:
        return Config(block_m, 16, 4, 1)  # GeForce has no room for more
    return Config(block_m, 64 if block_d <= 128 and dtype != torch.float32 else 32, 4, 2)


def combine_block(splits: int) -> int:
    """The number of splits that `combine_kernel` is compiled for: one of three, since caches grow."""
    return next(block for block in (8, 32, _MAX_SPLITS) if splits <= block)


def combine_warps(block_s: int, block_d: int) -> int:
    """Warps of `combine_kernel`: one for every 1024 numbers, at least 1 and at most 4."""
    return max(1, min(block_s * block_d // 1024, 4))


def num_parts(programs: int, most: int, multiprocessors: int) -> int:
    """The number of parts that sums in one order are split into: enough for two programs on every multiprocessor.

    Args:
        programs: the number of programs without splits.
        most: the number of addends of a program.
        multiprocessors: the device's.
    """
    return max(1, min(-(-2 * multiprocessors // max(programs, 1)), most, _MAX_SPLITS))


def num_splits(key_heads: int, keys: int, multiprocessors: int) -> int:
    """The number of parts that the keys are split into: enough for two programs on every multiprocessor."""
    wanted = -(-2 * multiprocessors // max(key_heads, 1))
    return max(1, min(wanted, keys // _MIN_KEYS_PER_SPLIT, _MAX_SPLITS))
