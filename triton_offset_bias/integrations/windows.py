"""Biases of two-dimensional windows, which several libraries' models have, as a table and positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_offset_bias.integrations.replacement import ReplacedAttention
from triton_offset_bias.modules.window_positions import class_token_positions, window_positions, with_class_token


class WindowBias(NamedTuple):
    """A table and the positions of all tokens, the class token first. It takes the place of a model's dense bias.

    It is a tuple, so that code which moves or collects tensors finds the tensors in it.

    Attributes:
        table: (H, offsets), with offset 0 in the middle.
        query_positions, key_positions: (tokens,).
    """

    table: Tensor
    query_positions: Tensor
    key_positions: Tensor

    def __add__(self, other: object) -> "WindowBias":  # type: ignore[override]
        """The sum of two biases, such as a shared bias and a layer's own.

        Raises:
            NotImplementedError: `other` is a mask.
        """
        if not isinstance(other, WindowBias):
            raise NotImplementedError("`attention_mask` must be None where a bias has a table, got a mask")
        return WindowBias(self.table + other.table, self.query_positions, self.key_positions)


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """The tensor with its last dimension split into dimensions of these sizes, one of which may be -1.

    `Tensor.unflatten` does the same, but breaks `torch.compile`'s graph where a default device is set.
    """
    return x.reshape(*x.shape[:-1], *sizes)


def window_bias(
    table: Tensor, window_size: tuple[int, int], extra: Tensor | None = None, num_class_tokens: int = 1
) -> WindowBias:
    """The bias of a window.

    Args:
        table: (H, (2 height - 1) * (2 width - 1)), in the order of the differences, query minus key.
        window_size: (height, width).
        extra: (H, 3), the bias of class token to window, window to class token, and class token to itself; None where
            there is no class token.
        num_class_tokens: number of class tokens, which all have the bias in `extra`.
    """
    places = window_positions(window_size, table.device)
    if extra is None:
        return WindowBias(table, places, places)
    reach = table.shape[-1] // 2
    return WindowBias(with_class_token(table, extra), *class_token_positions(places, reach, num_class_tokens))


def attend_with_window_bias(
    module: ReplacedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: WindowBias | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attends within one window that holds all tokens.

    Args:
        module: the layer.
        query, key, value: (B, H, tokens, D), (B, H, tokens, D), (B, H, tokens, Dv).
        bias: the bias, or None.
        scale: factor on the dot products.
        dropout_p: probability of dropping a weight.

    Returns:
        (B, tokens, H * Dv).
    """
    table, query_positions, key_positions = bias or (None, None, None)
    return module.attention(
        query,
        key,
        value,
        table,
        scale=scale,
        dropout_p=dropout_p,
        query_positions=query_positions,
        key_positions=key_positions,
    )


def attend_in_windows(
    module: ReplacedAttention,
    states: tuple[Tensor, Tensor, Tensor],
    table: Tensor,
    window_size: tuple[int, int],
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Attends within windows. A token attends only to its own region of the window.

    Args:
        module: the layer.
        states: query, key and value, each (B * windows, H, tokens, D).
        table: (H, offsets), with offset 0 in the middle.
        window_size: height and width of a window, whose product is the number of tokens.
        mask: (windows, tokens, tokens), 0 within a region and negative between regions of a shifted window; or None.
        scale: factor on the dot products.
        dropout_p: probability of dropping a weight.

    Returns:
        (B * windows, tokens, H * D).
    """
    query, key, value = states
    reach = table.shape[-1] // 2
    places = window_positions(window_size, query.device)
    if mask is not None:
        # A region's number is the index of its first token. Regions lie further apart than `window_size` reaches.
        regions = (mask == 0).int().argmax(-1)
        places = (places + regions * table.shape[-1]).repeat(query.shape[0] // mask.shape[0], 1)
    return module.attention(
        query,
        key,
        value,
        table,
        scale=scale,
        dropout_p=dropout_p,
        window_size=(reach, reach),
        query_positions=places,
        key_positions=places,
    )


def table_of_cosines(network: torch.nn.Module, coordinates: Tensor, num_heads: int) -> Tensor:
    """Swin V2's table, (heads, offsets): a small network of each offset's logarithmic coordinates, between 0 and 16."""
    return 16 * torch.sigmoid(network(coordinates).view(-1, num_heads)).T
