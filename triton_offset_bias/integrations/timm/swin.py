"""Swin and Swin V2 attend within windows of an image."""

import math

from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from torch import Tensor
from torch.nn import functional

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.timm.projections import queries_keys_values
from triton_offset_bias.integrations.windows import attend_in_windows, table_of_cosines


class OffsetBiasSwinAttention(ReplacedAttention, SwinAttention):
    """Swin's attention."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends within windows.

        Args:
            x: (B * windows, tokens, dim).
            mask: (windows, tokens, tokens) of shifted windows, or None.

        Returns:
            (B * windows, tokens, dim).
        """
        states = queries_keys_values(self, x)
        table, dropout_p = self.relative_position_bias_table.T, self.attn_drop.p if self.training else 0.0
        out = attend_in_windows(self, states, table, self.window_size, mask, self.scale, dropout_p)
        return self.proj_drop(self.proj(out))


class OffsetBiasSwinV2Attention(ReplacedAttention, SwinV2Attention):
    """Swin V2's attention, whose scores are scaled cosines."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends within windows, see `OffsetBiasSwinAttention`."""
        query, key, value = queries_keys_values(self, x)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        states = functional.normalize(query, dim=-1) * scale, functional.normalize(key, dim=-1), value
        table = table_of_cosines(self.cpb_mlp, self.relative_coords_table, self.num_heads)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = attend_in_windows(self, states, table, self.window_size, mask, 1.0, dropout_p)
        return self.proj_drop(self.proj(out))


REPLACEMENTS: tuple[type[Replacement], ...] = (OffsetBiasSwinAttention, OffsetBiasSwinV2Attention)
