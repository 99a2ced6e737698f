"""Sandwich: the inner product of two positions' sinusoidal embeddings."""

import torch
from torch import Tensor, nn

from triton_offset_bias.checks.arguments import checked_count
from triton_offset_bias.modules.ranges import offset_range


class SandwichBias(nn.Module):
    """The inner product of the sinusoidal embeddings of two positions, divided by a ratio per head. No parameters.

        bias[h, offset] = num_heads / (8 (h + 1)) * sum of cos(offset / 10000 ** (i / embed_dim))
                                                    over the even i from 0 to embed_dim - 2

    The bias is symmetric in the offset. Implementations that subtract the value at offset 0 give the same attention.

    Args:
        num_heads: heads; head h is divided by ``8 (h + 1) / num_heads``.
        embed_dim: width of the sinusoidal embeddings, even: a hyperparameter of its own, 128 in the paper.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is below 1, or `embed_dim` is odd.

    Source:
        Chi et al. 2023 (Sandwich, arXiv:2212.10356); Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, for the
        embeddings.
    """

    _device_marker: Tensor

    def __init__(self, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        if checked_count("embed_dim", embed_dim) % 2:
            raise ValueError(f"`embed_dim` must be even, got {embed_dim}")
        self.embed_dim = embed_dim
        # The module has no parameters. This empty buffer moves with it, and so tells the device.
        self.register_buffer("_device_marker", torch.empty(0), persistent=False)

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        device = self._device_marker.device
        offsets = offset_range(min_offset, max_offset, device)
        # The angles are float64, because float32 would round an angle of 10000 by up to 0.0005.
        exponents = torch.arange(0, self.embed_dim, 2, device=device, dtype=torch.float64) / self.embed_dim
        product = torch.cos(offsets * 10000.0 ** -exponents[:, None]).sum(0)
        ratios = 8.0 / self.num_heads * torch.arange(1, self.num_heads + 1, device=device, dtype=torch.float64)
        return (product / ratios[:, None]).float()

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, embed_dim={self.embed_dim}"
