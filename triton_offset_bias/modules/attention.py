"""Self-attention with any position bias of this package."""

from torch import Tensor, nn

from triton_offset_bias.checks.arguments import check_flag, check_tensor, checked_count, checked_dropout, shape
from triton_offset_bias.modules.gated import GatedBias
from triton_offset_bias.modules.windowed_bias import WindowedBias
from triton_offset_bias.spreadable import SpreadableAttention


class OffsetBiasAttention(SpreadableAttention, nn.Module):
    """Multi-head self-attention: projections, `offset_bias_attention` with a table from `bias`, output projection.

    Args:
        embed_dim: width of input and output; a multiple of `num_heads`.
        num_heads: query heads.
        bias: a module that gives a table, ``bias(min_offset, max_offset) -> (H, offsets)``, such as `OffsetBias`; the
            same module may serve several layers. A `GatedBias` gives factors from the query as well. None: no position
            bias.
        num_kv_heads: key and value heads, a divisor of `num_heads` (grouped-query attention); default `num_heads`.
        is_causal: attend only to keys at or before the query.
        dropout_p: probability of dropping an attention weight while training.

    Raises:
        TypeError: a count is no int, `is_causal` is no bool, `dropout_p` is no float, `bias` is no module, or `bias` is
            a module for positions (`OffsetBias2d`, `OffsetBias3d`).
        ValueError: a count is below 1, `dropout_p` is no probability, `embed_dim` is no multiple of `num_heads`, or
            `num_heads` is no multiple of `num_kv_heads`.

    Source:
        Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2; Ainslie et al. 2023 (GQA, arXiv:2305.13245).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: nn.Module | None,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if checked_count("embed_dim", embed_dim) % checked_count("num_heads", num_heads):
            raise ValueError(f"`embed_dim` must be a multiple of num_heads={num_heads}, got {embed_dim}")
        if num_heads % checked_count("num_kv_heads", num_kv_heads):
            raise ValueError(f"`num_kv_heads` must divide num_heads={num_heads}, got {num_kv_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        if isinstance(bias, WindowedBias):
            raise TypeError(
                "`bias` must give a table for a range of offsets, "
                f"got {type(bias).__name__}, whose table is for positions"
            )
        if bias is not None and not isinstance(bias, nn.Module):
            raise TypeError(f"`bias` must be a module that gives a table, or None, got {type(bias).__name__}")
        check_flag("is_causal", is_causal)
        self.is_causal = is_causal
        self.dropout_p = checked_dropout(dropout_p)
        self.bias = bias
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attends within every sequence of `x`.

        Args:
            x: (B, L, embed_dim).
            key_padding_mask: (B, L) bool, True = attend.

        Returns:
            (B, L, embed_dim).

        Raises:
            TypeError: `x` is no dense tensor.
            ValueError: `x` has another shape, or tensor parallelism cuts a head in two.
        """
        check_tensor("x", x)
        if x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            raise ValueError(
                f"`x` must have shape (batch, length, embed_dim={self.q_proj.in_features}), got shape {shape(x)}"
            )
        length = x.shape[1] * self._ranks
        min_offset = 0 if self.is_causal else 1 - length
        bias = None if self.bias is None or length == 0 else self.bias(min_offset, length - 1)
        query, gated = self._split_heads("q_proj", x), {}
        if bias is not None and isinstance(self.bias, GatedBias):
            query, gated["bias_gate"] = self.bias.factors(x, query)
        out = self._attend(
            query,
            self._split_heads("k_proj", x),
            self._split_heads("v_proj", x),
            bias,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            bias_origin=-min_offset,
            key_padding_mask=key_padding_mask,
            **gated,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split_heads(self, name: str, x: Tensor) -> Tensor:
        """The heads of a projection of `x`, (B, heads, L, head_dim): under tensor parallelism those of this rank."""
        projected: Tensor = getattr(self, name)(x)
        if projected.shape[-1] % self.head_dim:
            raise ValueError(
                f"`{name}` must give whole heads of {self.head_dim} numbers, got {projected.shape[-1]} numbers: tensor "
                "parallelism must divide the number of heads"
            )
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
