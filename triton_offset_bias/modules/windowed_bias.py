"""The part that biases for windows of two and of three dimensions share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import check_flag, checked_count
from triton_offset_bias.modules.window_positions import (
    CLASS_TOKEN_COLUMNS,
    class_token_positions,
    window_positions,
    with_class_token,
)


class WindowedBias(nn.Module):
    """One free number per head and offset within a window. The last dimension of the window is the fastest.

    Attributes:
        relative_position_bias_table: (offsets, num_heads) parameter in nats, initially 0; with a class token
            (offsets + 3, num_heads).
    """

    def __init__(self, num_heads: int, window_size: Sequence[int], class_token: bool) -> None:
        super().__init__()
        check_flag("class_token", class_token)
        self.num_heads = checked_count("num_heads", num_heads)
        self.window_size = tuple(window_size)
        self.class_token = class_token
        self.num_offsets = math.prod(2 * size - 1 for size in self.window_size)
        rows = self.num_offsets + (CLASS_TOKEN_COLUMNS if class_token else 0)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, self.num_heads))

    def forward(self) -> Tensor:
        """The table, (num_heads, offsets or offsets + 3) float32; the default `bias_origin` fits it."""
        numbers = self.relative_position_bias_table.float().T
        if self.class_token:
            return with_class_token(numbers[:, : self.num_offsets], numbers[:, self.num_offsets :])
        # The result is never a view: `fully_shard` frees the parameter's memory as soon as this has returned.
        return numbers.clone(memory_format=torch.contiguous_format)

    def positions(self) -> Tensor:
        """The position of every token of a window, as a query and as a key: (tokens,) int64.

        Raises:
            ValueError: there is a class token, whose position differs between queries and keys.
        """
        if self.class_token:
            raise ValueError("`class_token` must be False for `positions`: use `query_positions` and `key_positions`")
        return self._window_positions()

    def query_positions(self) -> Tensor:
        """The position of every token as a query, a class token first: (tokens,) int64."""
        return self._positions_of_both()[0]

    def key_positions(self) -> Tensor:
        """The position of every token as a key, a class token first: (tokens,) int64."""
        return self._positions_of_both()[1]

    def dense(self) -> Tensor:
        """The bias of every pair of tokens, for inspection: (num_heads, tokens, tokens) float32."""
        bias = self()
        offsets = table.dense_offsets(*self._positions_of_both())
        columns = offsets + table.default_origin(bias.shape[-1])
        return bias[:, columns.clamp(0, bias.shape[-1] - 1)]

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        class_token = ", class_token=True" if self.class_token else ""
        return f"num_heads={self.num_heads}, window_size={self.window_size}{class_token}"

    def _window_positions(self) -> Tensor:
        return window_positions(self.window_size, self.relative_position_bias_table.device)

    def _positions_of_both(self) -> tuple[Tensor, Tensor]:
        places = self._window_positions()
        return class_token_positions(places, self.num_offsets // 2) if self.class_token else (places, places)


def checked_window(window_size: Sequence[int], names: tuple[str, ...]) -> tuple[int, ...]:
    """The sizes of a window, one for each of the dimensions called `names`."""
    if not isinstance(window_size, tuple | list) or len(window_size) != len(names):
        kind = {2: "a pair", 3: "a triple"}[len(names)]
        raise ValueError(f"`window_size` must be {kind} ({', '.join(names)}), got {window_size!r}")
    return tuple(checked_count("window_size", size) for size in window_size)
