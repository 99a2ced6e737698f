"""Positions of the tokens of a window, and the place of a class token among them.

A token's position is one integer, such as ``row * (2 width - 1) + column``. The difference of two positions tells how
far the tokens are apart in every dimension.

A class token has a position far beyond the others: as a query before all keys, as a key after all queries, and to
itself one further than any two tokens of the window are apart. The table has one more column at its lower end and two
more at its upper end for these three offsets. Under "clamp" the ends of the table stand for all offsets beyond them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

CLASS_TOKEN_COLUMNS = 3  # class token to window, window to class token, class token to itself


def window_positions(window_size: Sequence[int], device: torch.device) -> Tensor:
    """The position of every token of a window, last dimension fastest: (tokens,) int64."""
    positions = torch.zeros(1, dtype=torch.int64, device=device)
    for size in window_size:
        positions = (positions[:, None] * (2 * size - 1) + torch.arange(size, device=device)).flatten()
    return positions


def with_class_token(windowed: Tensor, extra: Tensor) -> Tensor:
    """The table of a window and a class token, with offset 0 in the middle.

    Args:
        windowed: (..., offsets), the table of the window, with offset 0 in the middle.
        extra: (..., 3), the bias of class token to window, window to class token, and class token to itself.

    Returns:
        (..., offsets + 3).
    """
    from_class, to_class, within_class = extra.split(1, dim=-1)
    return torch.cat([from_class, windowed, within_class, to_class], dim=-1)


def class_token_positions(positions: Tensor, reach: int, num_tokens: int = 1) -> tuple[Tensor, Tensor]:
    """The positions of queries and of keys with class tokens before them.

    Args:
        positions: (tokens,), the positions in the window.
        reach: the largest difference of two of them.
        num_tokens: number of class tokens. All have the same bias.

    Returns:
        (num_tokens + tokens,) each.
    """
    query_positions = functional.pad(positions, (num_tokens, 0), value=-(reach + 1))
    return query_positions, functional.pad(positions, (num_tokens, 0), value=-2 * (reach + 1))
