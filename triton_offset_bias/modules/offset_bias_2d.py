"""A free parameter per two-dimensional offset, for windows of an image."""

import torch
from torch import Tensor
from torch.nn import functional

from triton_offset_bias.modules.windowed_bias import WindowedBias, checked_window

_SIDES = ("height", "width")


class OffsetBias2d(WindowedBias):
    """One free number per head and two-dimensional offset, for attention within a window of height x width tokens.

        bias[h, drow, dcol] = relative_position_bias_table[(drow + height - 1) * (2 width - 1) + dcol + width - 1, h]

    where (drow, dcol) is the query's place minus the key's. With the positions ``row * (2 width - 1) + col`` every
    (drow, dcol) is one offset of its own. The module gives the table of these offsets, with offset 0 in the middle:

        offset_bias_attention(query, key, value, bias(), query_positions=p, key_positions=p)   with p = bias.positions()

    The tokens of a window come row by row. A class token comes before them. It has three numbers per head: for class
    token to window, window to class token, and class token to itself. Queries and keys then have different positions:

        offset_bias_attention(
            query, key, value, bias(), query_positions=bias.query_positions(), key_positions=bias.key_positions()
        )

    Args:
        num_heads: heads, each with numbers of its own.
        window_size: (height, width) of the window, in tokens.
        class_token: whether a class token comes before the tokens of the window.

    Attributes:
        relative_position_bias_table: ((2 height - 1) * (2 width - 1), num_heads) parameter in nats, initially 0. Its
            name and layout are those that Swin uses, so Swin's state dicts load and save unchanged. With a class token
            there are 3 rows more, at the end, as in BEiT's state dicts.

    Raises:
        TypeError: `num_heads` or a size is no int, or `class_token` is no bool.
        ValueError: `num_heads` or a size is below 1, or `window_size` is no pair.

    Source:
        Liu et al. 2021 (Swin Transformer, arXiv:2103.14030), equation 4; for the class token the public code of BEiT
        (Bao et al. 2022, arXiv:2106.08254).
    """

    def __init__(self, num_heads: int, window_size: tuple[int, int], class_token: bool = False) -> None:
        super().__init__(num_heads, checked_window(window_size, _SIDES), class_token)
        self.height, self.width = self.window_size

    def resized(self, window_size: tuple[int, int]) -> Tensor:
        """The parameter of a module for another window: this parameter, interpolated bicubically as an image.

            image[h, drow + height - 1, dcol + width - 1] = the bias of head h at (drow, dcol)
            new image = interpolate(image, (2 new height - 1, 2 new width - 1), mode="bicubic", align_corners=False)

        Swin's and timm's code resizes a checkpoint for another window in the same way. A new module loads the result:

            new = OffsetBias2d(num_heads, window_size)
            new.load_state_dict({"relative_position_bias_table": old.resized(window_size)})

        Without a class token, the result's transpose is the table for the new window's `positions`. `old` may be
        trained through it. The numbers of a class token stay as they are.

        Args:
            window_size: (height, width) of the new window, in tokens.

        Returns:
            ((2 new height - 1) * (2 new width - 1), num_heads), 3 rows more with a class token. The result is
            differentiable, in the parameter's dtype, and interpolated in float32 or finer. The same window gives the
            same numbers.

        Raises:
            TypeError: a size is no int.
            ValueError: a size is below 1, or `window_size` is no pair.

        Source:
            ``load_pretrained`` in Swin's public code (Liu et al. 2021, arXiv:2103.14030), ``utils.py``, and
            ``resize_rel_pos_bias_table_simple`` in timm. The interpolation's kernel is from Keys 1981, with torch's
            factor -0.75.
        """
        old, new = ([2 * side - 1 for side in size] for size in (self.window_size, checked_window(window_size, _SIDES)))
        weight = self.relative_position_bias_table
        windowed, extra = weight[: self.num_offsets], weight[self.num_offsets :]
        image = windowed.T.unflatten(-1, old).unsqueeze(0)
        compute = torch.promote_types(weight.dtype, torch.float32)
        resized = functional.interpolate(image.to(compute), new, mode="bicubic", align_corners=False)
        return torch.cat([resized[0].flatten(1).T.to(weight.dtype), extra])
