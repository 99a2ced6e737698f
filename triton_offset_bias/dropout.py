"""Dropout's choice of weights. It depends on the seed and on a weight's place alone, and is the same on all backends.

The weight of query i and key j, in head h of H of sequence b, has 32 random bits:

    word 2 (i / 8 % 2) + (j / 8 % 2) of the four of Philox4x32-7, with the seed as its key and the counter
    (i / 16 * 8 + i % 8, j / 16 * 8 + j % 8, b H + h, 0)        (integer divisions)

The weight is dropped where its bits are at most `largest_dropped(p)`. One Philox thus serves the four weights whose
places differ in bit 3, which a GPU's matrix layouts and a CPU's vectors keep together.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3": seven rounds pass all of its tests.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


class Place(NamedTuple):
    """The part of a whole that a call has: its first query, key and head there, and the whole's number of heads.

    Places in the formula above are those in the whole.
    """

    query: int
    key: int
    head: int
    heads: int


def new_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device, () int64, without waiting for the device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def largest_dropped(dropout_p: float) -> int:
    """The largest 32 bits with which a weight is dropped; `dropout_p` is above 0."""
    return max(math.ceil(dropout_p * 2**32) - 1, 0)


def kept_scale(dropout_p: float) -> float:
    """The factor on the kept weights. It keeps the expected output the same."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def kept(
    seed: Tensor,
    dropout_p: float,
    sequence: int,
    num_sequences: int,
    heads: int,
    len_q: int,
    len_k: int,
    place: Place | None = None,
) -> Tensor:
    """True where a weight is kept: (num_sequences, heads, len_q, len_k) bool, for the sequences from `sequence` on."""
    device = seed.device
    place = place or Place(0, 0, 0, heads)
    first_q, first_k = place.query // 16, place.key // 16  # blocks
    blocks_q, blocks_k = -(-(place.query + len_q) // 16) - first_q, -(-(place.key + len_k) // 16) - first_k
    row = torch.arange(8 * blocks_q, device=device).view(-1, 1) + 8 * first_q
    column = torch.arange(8 * blocks_k, device=device) + 8 * first_k
    sequences = torch.arange(sequence, sequence + num_sequences, device=device).view(-1, 1)
    head = sequences * place.heads + place.head + torch.arange(heads, device=device)
    words = torch.stack(
        _philox(seed, row, column, head.view(-1, 1, 1)), dim=-1
    )  # (sequences * heads, rows, columns, 4)
    words = words.view(num_sequences * heads, blocks_q, 8, blocks_k, 8, 2, 2).permute(0, 1, 5, 2, 3, 6, 4)
    words = words.reshape(num_sequences, heads, 16 * blocks_q, 16 * blocks_k)
    words = words[:, :, place.query % 16 :, place.key % 16 :]
    return words[:, :, :len_q, :len_k] > largest_dropped(dropout_p)


def _philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """The four random words, in int64, for every counter of three words."""
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2 = torch.broadcast_tensors(*counter)
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        high_0, low_0 = _product(c0, _MULTIPLIERS[0])
        high_1, low_1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _WEYL[0]) & _WORD, (key_1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words."""
    low, high = (word & 0xFFFF) * factor, (word >> 16) * factor
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD
