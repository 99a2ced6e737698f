"""Philox4x32 in Python's integers, and dropout's factors from it: an independent witness of the package's."""

import torch
from torch import Tensor

WORD = 2**32


def philox(key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int) -> tuple[int, int, int, int]:
    """Four random words (Salmon et al. 2011, figure 2)."""
    k0, k1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (right // WORD ^ counter[1] ^ k0, right % WORD, left // WORD ^ counter[3] ^ k1, left % WORD)
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return counter


def dropout_factors(dropout_p: float, shape: tuple[int, int, int, int], first_sequence: int = 0) -> Tensor:
    """Dropout's factors on the weights, (B, H, Lq, Lk) float64, from the next seed of torch's generator."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    return factors_of_seed(int(drawn), dropout_p, shape, first_sequence)


def factors_of_seed(seed: int, dropout_p: float, shape: tuple[int, int, int, int], first_sequence: int = 0) -> Tensor:
    """Dropout's factors on the weights, (B, H, Lq, Lk) float64, from a seed."""
    batch, heads, len_q, len_k = shape
    key = (seed % WORD, (seed >> 32) % WORD)
    factors = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for b in range(batch):
        for h in range(heads):
            for row in range(0, len_q, 16):
                for column in range(0, len_k, 16):
                    fill_square(factors[b, h, row : row + 16, column : column + 16], key, dropout_p,
                                (row // 2, column // 2, (first_sequence + b) * heads + h, 0))  # fmt: skip
    return factors.to(torch.get_default_device())


def fill_square(square: Tensor, key: tuple[int, int], dropout_p: float, first: tuple[int, int, int, int]) -> None:
    """Fills in up to 16 x 16 factors; `first` is the counter of the first."""
    rows, columns = square.shape
    for r in range(min(8, rows)):
        for c in range(min(8, columns)):
            words = philox(key, (first[0] + r, first[1] + c, *first[2:]), 7)
            for word, (row, column) in zip(words, ((r, c), (r, c + 8), (r + 8, c), (r + 8, c + 8)), strict=True):
                if row < rows and column < columns and word / WORD >= dropout_p:
                    square[row, column] = 1 / (1 - dropout_p)
