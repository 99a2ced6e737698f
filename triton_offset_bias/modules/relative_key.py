"""Relative keys: a vector for each offset, which the query is multiplied with beside the key."""

import math

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import check_flag, checked_count
from triton_offset_bias.modules.gated import GatedBias
from triton_offset_bias.modules.ranges import offset_range


class RelativeKeyBias(GatedBias):
    """The product of the query with a vector that belongs to the offset: learned, or projected sinusoids.

        bias[h, i, offset] = D ** -0.5 <query[h, i] + v[h], vector[h, offset]>

    With `max_length` each offset has a learned vector for all heads (Shaw et al.). With `embed_dim` the vectors are a
    projection of sinusoids of the offset, others for each head (Transformer-XL, the Conformer).

    Args:
        num_heads: heads.
        head_dim: width D of queries and vectors, at most 256.
        max_length: longest sequence whose offsets all have a vector of their own. Other offsets have the nearest end's.
        embed_dim: width of the sinusoids, even. Either this or `max_length` is given.
        has_query_biases: whether u is added to the queries that meet the keys, and v to those that meet the vectors.

    Attributes:
        weight: (2 * max_length - 1, head_dim) parameter, initially 0; None with `embed_dim`. Row ``max_length - 1`` is
            that of offset 0.
        proj: linear without bias, `embed_dim` to ``num_heads * head_dim``; None with `max_length`.
        u, v: (num_heads, head_dim) parameters, initially 0; None without `has_query_biases`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is below 1, `embed_dim` is odd, or both or none of `max_length` and `embed_dim` are given.

    Source:
        Shaw et al. 2018 (arXiv:1803.02155), equation 4; Dai et al. 2019 (Transformer-XL, arXiv:1901.02860), section
        3.3; Gulati et al. 2020 (Conformer, arXiv:2005.08100).
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        embed_dim: int | None = None,
        has_query_biases: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = checked_count("num_heads", num_heads), checked_count("head_dim", head_dim)
        if (max_length is None) == (embed_dim is None):
            raise ValueError(
                f"`max_length` or `embed_dim` must be given, and not both, got {max_length!r} and {embed_dim!r}"
            )
        self.weight: nn.Parameter | None = None
        self.proj: nn.Linear | None = None
        if max_length is not None:
            self.weight = nn.Parameter(torch.zeros(2 * checked_count("max_length", max_length) - 1, head_dim))
        if embed_dim is not None:
            if checked_count("embed_dim", embed_dim) % 2:
                raise ValueError(f"`embed_dim` must be even, got {embed_dim}")
            self.proj = nn.Linear(embed_dim, num_heads * head_dim, bias=False)
        check_flag("has_query_biases", has_query_biases)
        self.u = nn.Parameter(torch.zeros(num_heads, head_dim)) if has_query_biases else None
        self.v = nn.Parameter(torch.zeros(num_heads, head_dim)) if has_query_biases else None

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The vectors of every offset from `min_offset` to `max_offset`, both included, as tables.

        Returns:
            (head_dim, offsets) with learned vectors, (num_heads, head_dim, offsets) with sinusoids, float32. As `bias`,
            their `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        if self.weight is not None:
            offset_range(min_offset, max_offset, None)
            return table.per_offset(self.weight.float().T, min_offset, max_offset, self.weight.shape[0] // 2)
        assert self.proj is not None
        offsets = offset_range(min_offset, max_offset, self.proj.weight.device).float()
        steps = torch.arange(0, self.proj.in_features, 2, device=offsets.device).float()
        angles = offsets.unsqueeze(-1) * torch.exp(steps * (-math.log(10000.0) / self.proj.in_features))
        sinusoids = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (offsets, embed_dim)
        vectors = self.proj(sinusoids.to(self.proj.weight.dtype)).float()
        return vectors.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0)

    def factors(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The query plus u, and as the gate D ** -0.5 times the query plus v, (B, H, L, D)."""
        scale = self.head_dim**-0.5
        if self.u is None or self.v is None:
            return query, query * scale
        return query + self.u.unsqueeze(1), (query + self.v.unsqueeze(1)) * scale

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, has_query_biases={self.u is not None}"
