"""Biases with a factor from the query: the interface of such modules, and WavLM's gate."""

import torch
from torch import Tensor, nn

from triton_offset_bias.checks.arguments import checked_count


class GatedBias(nn.Module):
    """A bias module whose tables are multiplied by factors from the query: ``bias_gate`` of `offset_bias_attention`.

    ``bias(min_offset, max_offset)`` gives the tables, as other modules give a table: (H, offsets), (R, offsets) or
    (H, R, offsets), float32. `factors` gives the gate. `OffsetBiasAttention` takes such modules.
    """

    def factors(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The query to attend with, and the gate.

        Args:
            x: (B, L, embed_dim), the input of the attention.
            query: (B, H, L, D), its projection, not multiplied by ``D ** -0.5``.

        Returns:
            The query, changed or not, and the gate, (B, H, L) or (B, H, L, R).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `factors`")


class GatedOffsetBias(GatedBias):
    """Any table times WavLM's gate, a number for each query and head between 1 and 3 + `const`.

        a, b = sigmoid of two sums of four numbers of proj(x[h])        gate = a * (b * const[h] - 1) + 2

    ``x[h]`` is the part of the attention's input that head h would get if heads divided it.

    Args:
        bias: the module that gives the table, ``bias(min_offset, max_offset) -> (H, offsets)``, such as `T5Bias`.
        num_heads: heads.
        head_dim: width of a head's part of the input, ``embed_dim / num_heads``.

    Attributes:
        proj: linear, `head_dim` to 8, WavLM's ``gru_rel_pos_linear``.
        const: (1, num_heads, 1, 1) parameter, initially 1, WavLM's ``gru_rel_pos_const``.

    Raises:
        TypeError: `bias` is no module, or a count no int.
        ValueError: a count is below 1.

    Source:
        Chen et al. 2022 (WavLM, arXiv:2110.13900), section 3.2, in the form of its public code.
    """

    def __init__(self, bias: nn.Module, num_heads: int, head_dim: int) -> None:
        super().__init__()
        if not isinstance(bias, nn.Module):
            raise TypeError(f"`bias` must be a module that gives a table, got {type(bias).__name__}")
        self.bias = bias
        self.num_heads = checked_count("num_heads", num_heads)
        self.proj = nn.Linear(checked_count("head_dim", head_dim), 8)
        self.const = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The table of `bias`, (num_heads, max_offset - min_offset + 1) float32."""
        return self.bias(min_offset, max_offset)

    def factors(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The query as it is, and the gate of `x`, (B, H, L)."""
        parts = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, head_dim)
        sums = self.proj(parts).unflatten(-1, (2, 4)).sum(-1)  # (B, H, L, 2)
        a, b = torch.sigmoid(sums).chunk(2, dim=-1)
        return query, (a * (b * self.const - 1.0) + 2.0).squeeze(-1)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, head_dim={self.proj.in_features}"
