"""ALiBi: a penalty in proportion to the distance."""

import torch
from torch import Tensor, nn

from triton_offset_bias.checks.arguments import check_flag, checked_count
from triton_offset_bias.modules.ranges import distance_range


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slope of every head: a geometric sequence, for any number of heads.

        slope[h] = 2 ** (-8 (h + 1) / m)         for h < m, the largest power of 2 that is at most num_heads
        slope[h] = 2 ** (-4 (2 (h - m) + 1) / m)   for the other h: every second slope of 2 m heads

    Args:
        num_heads: heads.
        device: where to compute.

    Returns:
        (num_heads,) float32, positive.

    Raises:
        TypeError: `num_heads` is no int.
        ValueError: `num_heads` is below 1.

    Source:
        Press et al. 2022 (ALiBi, arXiv:2108.12409), section 3. For numbers of heads that are no powers of 2: the
        authors' public code, ``get_slopes``.
    """
    power = 2 ** (checked_count("num_heads", num_heads).bit_length() - 1)
    heads = torch.arange(num_heads, device=device)
    steps = torch.where(heads < power, 2 * (heads + 1), 2 * (heads - power) + 1)
    return torch.exp2(steps.float() * (-4.0 / power))


class ALiBiBias(nn.Module):
    """A penalty in proportion to the distance, with a slope per head.

        bias[h, offset] = -slope[h] * |offset|

    The paper defines the penalty for causal attention, where ``|offset| = offset``. In other attention this module is
    symmetric: a key after the query gets the penalty of a key at the same distance before it.

    Args:
        num_heads: heads.
        learnable: whether the slopes are trained. They start as the paper's slopes; nothing keeps them positive.

    Attributes:
        slopes: (num_heads,) parameter in nats per position, initially ``alibi_slopes(num_heads)``; None unless
            learnable.

    Raises:
        TypeError: `num_heads` is no int, or `learnable` no bool.
        ValueError: `num_heads` is below 1.

    Source:
        Press et al. 2022 (ALiBi, arXiv:2108.12409), section 3.
    """

    slopes: nn.Parameter | None
    _device_marker: Tensor

    def __init__(self, num_heads: int, learnable: bool = False) -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        check_flag("learnable", learnable)
        self.register_parameter("slopes", nn.Parameter(alibi_slopes(num_heads)) if learnable else None)
        # Fixed slopes are computed in each call, because `module.half()` would round a buffer of slopes. This buffer
        # is empty. It moves with the module, and so tells the device.
        self.register_buffer("_device_marker", torch.empty(0), persistent=False)

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        device = self._device_marker.device
        slopes = alibi_slopes(self.num_heads, device) if self.slopes is None else self.slopes.float()
        return -slopes[:, None] * distance_range(min_offset, max_offset, device)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, learnable={self.slopes is not None}"
