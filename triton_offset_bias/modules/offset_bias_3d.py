"""A free parameter per three-dimensional offset, for windows of a video or of a volume."""

from triton_offset_bias.modules.windowed_bias import WindowedBias, checked_window


class OffsetBias3d(WindowedBias):
    """One free number per head and three-dimensional offset, for attention within depth x height x width tokens.

        bias[h, ddepth, drow, dcol] = relative_position_bias_table[n, h]
        n = ((ddepth + depth - 1) * (2 height - 1) + drow + height - 1) * (2 width - 1) + dcol + width - 1

    where (ddepth, drow, dcol) is the query's place minus the key's. `OffsetBias2d` is the same for images, and says how
    table and positions are passed to a call. The tokens of a window come slice by slice, and row by row in a slice.

    Args:
        num_heads: heads, each with numbers of its own.
        window_size: (depth, height, width) of the window, in tokens. In a video the depth counts frames.
        class_token: whether a class token comes before the tokens of the window, as in `OffsetBias2d`.

    Attributes:
        relative_position_bias_table: ((2 depth - 1) * (2 height - 1) * (2 width - 1), num_heads) parameter in nats,
            initially 0; 3 rows more with a class token. Its name and layout are those that Video Swin and MONAI's
            SwinUNETR use, so their state dicts load and save unchanged.

    Raises:
        TypeError: `num_heads` or a size is no int, or `class_token` is no bool.
        ValueError: `num_heads` or a size is below 1, or `window_size` is no triple.

    Source:
        Liu et al. 2022 (Video Swin Transformer, arXiv:2106.13230), equation 4.
    """

    def __init__(self, num_heads: int, window_size: tuple[int, int, int], class_token: bool = False) -> None:
        super().__init__(num_heads, checked_window(window_size, ("depth", "height", "width")), class_token)
