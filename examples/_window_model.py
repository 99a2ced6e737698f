"""The model of `swin_windows.py`."""

import torch
from torch import Tensor, nn

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import OffsetBias2d

GREY_LEVELS, CLASSES = 17, 10


def partition(images: Tensor, window: int) -> Tensor:
    """Cuts (B, S, S, C) into windows, each a sequence: (B, (S / window)**2, window**2, C), all in reading order."""
    tiles = images.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, rows, window, columns, window, C)
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def unpartition(windows: Tensor, side: int, window: int) -> Tensor:
    """The images (B, side, side, C) from their windows (B, (side / window)**2, window**2, C)."""
    tiles = windows.unflatten(2, (window, window)).unflatten(1, (side // window, side // window))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def regions(side: int, window: int, shift: int) -> Tensor:
    """The region of each pixel after a roll by `-shift`: ((side / window)**2, window**2) int64.

    Pixels of one window in different regions come from opposite edges of the image.

    Source:
        Liu et al. 2021 (Swin Transformer, arXiv:2103.14030), section 3.2, "Efficient batch computation".
    """
    wrapped = (torch.arange(side) >= side - shift).long()
    numbers = 2 * wrapped[:, None] + wrapped
    return partition(numbers[None, :, :, None], window)[0, ..., 0]


class WindowAttention(nn.Module):
    """Multi-head attention among the pixels of each window, with a bias per head and two-dimensional offset.

    Args:
        width: size of a pixel's embedding; a multiple of `num_heads`.
        num_heads: attention heads.
        side: height and width of the images; a multiple of `window`.
        window: height and width of a window.
        shift: pixels by which the windows are moved down and right; the edges of the image cut them.
        with_bias: whether there is a bias.
    """

    def __init__(self, width: int, num_heads: int, side: int, window: int, shift: int, with_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        bias = OffsetBias2d(num_heads, (window, window))
        self.bias = bias if with_bias else None
        # Regions are further apart than any two pixels of one region. `window_size` excludes such distances.
        num_offsets = (2 * window - 1) ** 2
        self.reach = num_offsets // 2
        positions = bias.positions() + num_offsets * regions(side, window, shift)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, side, side, width) to the same shape."""
        windows = partition(x.roll((-self.shift, -self.shift), (1, 2)), self.window)
        projected = self.qkv_proj(windows.flatten(0, 1)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # each (B * windows, num_heads, window**2, head dim)
        positions = self.positions.repeat(len(x), 1)
        out = offset_bias_attention(
            q,
            k,
            v,
            None if self.bias is None else self.bias(),
            window_size=(self.reach, self.reach),
            query_positions=positions,
            key_positions=positions,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2)).unflatten(0, windows.shape[:2])
        return unpartition(out, x.shape[1], self.window).roll((self.shift, self.shift), (1, 2))


class Block(nn.Module):
    """A pre-norm transformer layer: attention in windows, then a feed-forward network at every pixel."""

    def __init__(self, width: int, attention: WindowAttention) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, side, side, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(x)


class WindowTransformer(nn.Module):
    """Classifies small images: a token per pixel, layers of windows, shifted by half in every other, and a mean.

    Neither the embedding nor the mean knows where a pixel is. Only the windows do, and the biases within them.

    Args:
        width, num_heads, side, window, with_bias: as in `WindowAttention`.
        num_layers: layers.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int, side: int, window: int, *, with_bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(GREY_LEVELS, width)
        shifts = [layer % 2 * (window // 2) for layer in range(num_layers)]
        self.blocks = nn.Sequential(
            *(Block(width, WindowAttention(width, num_heads, side, window, shift, with_bias)) for shift in shifts)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes, (B, 10), of `images` (B, side, side), int64 grey levels from 0 to 16."""
        x = self.blocks(self.embedding(images))
        return self.head(x.flatten(1, 2).mean(1))

    def biases(self) -> list[OffsetBias2d]:
        """The biases of all layers; empty without a bias."""
        return [block.attention.bias for block in self.blocks if block.attention.bias is not None]
