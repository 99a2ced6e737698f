"""Philox4x32 in NumPy, and dropout's factors from it: an independent witness of the package's."""

import numpy as np
import torch
from torch import Tensor

WORD = 2**32
Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox(key: tuple[int, int], counter: Words, rounds: int) -> Words:
    """Four random words of each counter (Salmon et al. 2011, figure 2). All arrays are uint64 and hold 32 bits."""
    k0, k1 = key
    for _ in range(rounds):
        left, right = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = (
            (right >> np.uint64(32)) ^ counter[1] ^ np.uint64(k0),
            right % np.uint64(WORD),
            (left >> np.uint64(32)) ^ counter[3] ^ np.uint64(k1),
            left % np.uint64(WORD),
        )
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return counter


def dropout_factors(dropout_p: float, shape: tuple[int, int, int, int], first_sequence: int = 0) -> Tensor:
    """Dropout's factors on the weights, (B, H, Lq, Lk) float64, from the next seed of torch's generator."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    return factors_of_seed(int(drawn), dropout_p, shape, first_sequence)


def factors_of_seed(seed: int, dropout_p: float, shape: tuple[int, int, int, int], first_sequence: int = 0) -> Tensor:
    """Dropout's factors on the weights, (B, H, Lq, Lk) float64, from a seed.

    Each square of 16 x 16 weights has 8 x 8 counters. A counter's four words are for the weights at its place in the
    four quarters of the square.
    """
    batch, heads, len_q, len_k = shape
    key = (seed % WORD, (seed >> 32) % WORD)
    head = (first_sequence * heads + np.arange(batch * heads, dtype=np.uint64)).reshape(batch, heads, 1, 1)
    row, column = (np.arange(-(-length // 16) * 8, dtype=np.uint64) for length in (len_q, len_k))
    counter = np.broadcast_arrays(row[:, None], column, head, np.uint64(0))
    words = np.stack(philox(key, tuple(counter), 7)).reshape(2, 2, batch, heads, len(row) // 8, 8, len(column) // 8, 8)
    drawn = words.transpose(2, 3, 4, 0, 5, 6, 1, 7).reshape(batch, heads, 2 * len(row), 2 * len(column))
    factors = np.where(drawn[:, :, :len_q, :len_k] / WORD >= dropout_p, 1 / (1 - dropout_p), 0.0)
    return torch.from_numpy(factors).to(torch.get_default_device())
