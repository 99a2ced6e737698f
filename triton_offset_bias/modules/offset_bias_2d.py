"""A free parameter per two-dimensional offset, for windows of an image."""

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import checked_count


class OffsetBias2d(nn.Module):
    """One free number per head and two-dimensional offset, for attention within a window of height x width tokens.

        bias[h, drow, dcol] = relative_position_bias_table[(drow + height - 1) * (2 width - 1) + dcol + width - 1, h]

    where (drow, dcol) is the query's place minus the key's. With the positions ``row * (2 width - 1) + col`` every
    (drow, dcol) is one offset of its own. The module gives the table of these offsets, with offset 0 in the middle:

        offset_bias_attention(query, key, value, bias(), query_positions=p, key_positions=p)   with p = bias.positions()

    The tokens of a window come row by row.

    Args:
        num_heads: heads, each with numbers of its own.
        window_size: (height, width) of the window, in tokens.

    Attributes:
        relative_position_bias_table: ((2 height - 1) * (2 width - 1), num_heads) parameter in nats, initially 0. Its
            name and layout are those that Swin uses, so Swin's state dicts load and save unchanged.

    Raises:
        TypeError: `num_heads` or a size is no int.
        ValueError: `num_heads` or a size is below 1, or `window_size` is no pair.

    Source:
        Liu et al. 2021 (Swin Transformer, arXiv:2103.14030), equation 4.
    """

    def __init__(self, num_heads: int, window_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        self.height, self.width = _checked_window(window_size)
        num_offsets = (2 * self.height - 1) * (2 * self.width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))

    def forward(self) -> Tensor:
        """The table, (num_heads, (2 height - 1) * (2 width - 1)) float32; the default `bias_origin` fits it."""
        # The result is never a view: `fully_shard` frees the parameter's memory as soon as this has returned.
        return self.relative_position_bias_table.float().T.clone(memory_format=torch.contiguous_format)

    def positions(self) -> Tensor:
        """The position of every token of a window, row by row: (height * width,) int64."""
        device = self.relative_position_bias_table.device
        rows, columns = torch.arange(self.height, device=device), torch.arange(self.width, device=device)
        return (rows[:, None] * (2 * self.width - 1) + columns).flatten()

    def dense(self) -> Tensor:
        """The bias of every pair of tokens, for inspection: (num_heads, height * width, height * width) float32."""
        positions, bias = self.positions(), self()
        offsets = table.dense_offsets(positions, positions)
        return bias[:, offsets + table.default_origin(bias.shape[-1])]

    def resized(self, window_size: tuple[int, int]) -> Tensor:
        """The parameter of a module for another window: this parameter, interpolated bicubically as an image.

            image[h, drow + height - 1, dcol + width - 1] = the bias of head h at (drow, dcol)
            new image = interpolate(image, (2 new height - 1, 2 new width - 1), mode="bicubic", align_corners=False)

        Swin's and timm's code resizes a checkpoint for another window in the same way. A new module loads the result:

            new = OffsetBias2d(num_heads, window_size)
            new.load_state_dict({"relative_position_bias_table": old.resized(window_size)})

        The result's transpose is the table for the new window's `positions`; `old` may be trained through it.

        Args:
            window_size: (height, width) of the new window, in tokens.

        Returns:
            ((2 new height - 1) * (2 new width - 1), num_heads). The result is differentiable, in the parameter's dtype,
            and interpolated in float32 or finer. The same window gives the same numbers.

        Raises:
            TypeError: a size is no int.
            ValueError: a size is below 1, or `window_size` is no pair.

        Source:
            ``load_pretrained`` in Swin's public code (Liu et al. 2021, arXiv:2103.14030), ``utils.py``, and
            ``resize_rel_pos_bias_table_simple`` in timm. The interpolation's kernel is from Keys 1981, with torch's
            factor -0.75.
        """
        height, width = _checked_window(window_size)
        weight = self.relative_position_bias_table
        image = weight.T.unflatten(-1, (2 * self.height - 1, 2 * self.width - 1)).unsqueeze(0)
        compute = torch.promote_types(weight.dtype, torch.float32)
        size = (2 * height - 1, 2 * width - 1)
        resized = nn.functional.interpolate(image.to(compute), size, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.to(weight.dtype)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, window_size=({self.height}, {self.width})"


def _checked_window(window_size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"`window_size` must be a pair (height, width), got {window_size!r}")
    height, width = (checked_count("window_size", size) for size in window_size)
    return height, width
