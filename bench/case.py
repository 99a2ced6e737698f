"""What a case of the benchmark is."""

import math
from dataclasses import dataclass

import numpy as np
import torch

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
MODES = (FORWARD, BACKWARD, BOTH)


@dataclass(frozen=True)
class Case:
    """A named shape of self-attention.

    Attributes:
        name: the case's name on the command line and in the CSV.
        batch: sequences.
        heads: heads of query, key and value.
        length: keys a sequence.
        head_dim: dimensions a head.
        dtype: name of the torch dtype of query, key and value; the table is always float32.
        is_causal: attend only where offset >= 0.
        decoded: queries a sequence, the last ones, as in decoding with a cache; None: as many queries as keys.
        window: keys on each side that a query attends to; -1: all.
        clamp: the table's last offset on each side; its ends stand for offsets beyond. None: a table of all offsets.
        rank: factors that each query has for the bias, and tables a head; None: no factor, and one table a head.
        is_grid: whether the tokens are a square grid, such as a window of an image. The table then has a number for
            every difference of rows and columns, and there is no clamp.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int = 64
    dtype: str = "float32"
    is_causal: bool = False
    decoded: int | None = None
    window: int = -1
    clamp: int | None = None
    rank: int | None = None
    is_grid: bool = False

    @property
    def side(self) -> int:
        """Rows of a grid, and columns."""
        return math.isqrt(self.length)

    @property
    def reach(self) -> int:
        """The table's last offset on each side."""
        if self.is_grid:
            return (2 * self.side - 1) ** 2 // 2
        return self.length - 1 if self.clamp is None else min(self.clamp, self.length - 1)

    @property
    def queries(self) -> int:
        """Queries a sequence."""
        return self.length if self.decoded is None else self.decoded

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return 2 * self.batch * self.heads * self.length * self.head_dim * getattr(torch, self.dtype).itemsize

    @property
    def pairs(self) -> float:
        """Attended pairs of query and key."""
        positions = np.arange(self.length - self.queries, self.length)
        last = positions if self.is_causal else np.full_like(positions, self.length - 1)
        first = np.zeros_like(positions)
        if self.window >= 0:
            first, last = np.maximum(positions - self.window, 0), np.minimum(positions + self.window, last)
        return self.batch * self.heads * float((last - first + 1).sum())

    def flops(self, mode: str) -> float:
        """Floating point operations of the matmuls: 4 D for each attended pair forward, 10 D backward."""
        return {FORWARD: 4, BACKWARD: 10, BOTH: 14}[mode] * self.pairs * self.head_dim

    def powers(self, mode: str) -> float:
        """Powers of 2: one for each attended pair in each pass."""
        return {FORWARD: 1, BACKWARD: 1, BOTH: 2}[mode] * self.pairs


@dataclass(frozen=True)
class ModelCase(Case):
    """The inputs of a model, and the shape of the attention in its first layer.

    Attributes:
        model: one of `bench.models.MODELS`.
        is_padded: whether the lengths of the sequences differ: from a quarter of `length` to all of it in a batch of
            tokens, as lengths of sentences do in a list of texts.
    """

    model: str = ""
    is_padded: bool = False
