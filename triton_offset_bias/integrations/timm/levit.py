"""LeViT has one number for the distances in rows and in columns, whatever their signs."""

import torch
from timm.models.levit import Attention, AttentionDownsample
from torch import Tensor

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.windows import WindowBias, attend_with_window_bias, split_last
from triton_offset_bias.modules.window_positions import window_positions


def _bias_of(numbers: Tensor, resolution: tuple[int, int], stride: int = 1) -> WindowBias:
    """The bias of an image.

    Args:
        numbers: (H, height * width), by distance in rows and in columns.
        resolution: (height, width) of the keys.
        stride: the queries are the tokens of every `stride`-th row and column.
    """
    height, width = resolution
    rows = torch.arange(1 - height, height, device=numbers.device).abs()
    columns = torch.arange(1 - width, width, device=numbers.device).abs()
    places = window_positions(resolution, numbers.device)
    queries = places.view(height, width)[::stride, ::stride].flatten()
    return WindowBias(numbers[:, (rows[:, None] * width + columns).flatten()], queries, places)


class OffsetBiasLevitAttention(ReplacedAttention, Attention):
    """LeViT's attention."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends to the whole image.

        Args:
            x: (B, dim, height, width) where the model uses convolutions, else (B, tokens, dim).

        Returns:
            The same shape.
        """
        mixed = self.qkv(x)
        mixed = mixed.flatten(2).transpose(1, 2) if self.use_conv else mixed  # (B, tokens, channels)
        sizes = [self.key_dim, self.key_dim, self.val_dim]
        parts = split_last(mixed, self.num_heads, -1).split(sizes, dim=-1)
        query, key, value = (part.transpose(1, 2) for part in parts)
        bias = _bias_of(self.attention_biases, self.resolution)
        out = attend_with_window_bias(self, query, key, value, bias, self.scale)
        return self.proj(split_last(out.transpose(1, 2), *x.shape[2:]) if self.use_conv else out)


class OffsetBiasLevitAttentionDownsample(ReplacedAttention, AttentionDownsample):
    """LeViT's attention from the tokens of every second row and column to all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends to the whole image.

        Args:
            x: (B, dim, height, width) where the model uses convolutions, else (B, tokens, dim).

        Returns:
            (B, dim_out, smaller height, smaller width), or (B, fewer tokens, dim_out).
        """
        query, mixed = self.q(x), self.kv(x)
        smaller = query.shape[2:]
        if self.use_conv:
            query, mixed = (states.flatten(2).transpose(1, 2) for states in (query, mixed))
        query, mixed = (split_last(states, self.num_heads, -1) for states in (query, mixed))
        parts = (query, *mixed.split([self.key_dim, self.val_dim], dim=-1))
        query, key, value = (part.transpose(1, 2) for part in parts)
        bias = _bias_of(self.attention_biases, self.resolution, self.stride)
        out = attend_with_window_bias(self, query, key, value, bias, self.scale)
        return self.proj(split_last(out.transpose(1, 2), *smaller) if self.use_conv else out)


REPLACEMENTS: tuple[type[Replacement], ...] = (OffsetBiasLevitAttention, OffsetBiasLevitAttentionDownsample)
