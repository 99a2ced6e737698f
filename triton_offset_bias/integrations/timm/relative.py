"""The bias modules that timm's ViTs with relative positions, MaxViT and CoAtNet share, and their attention."""

from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.timm.projections import queries_keys_values
from triton_offset_bias.integrations.windows import WindowBias, attend_with_window_bias, split_last, window_bias
from triton_offset_bias.modules.window_positions import CLASS_TOKEN_COLUMNS


class OffsetBiasRelPosBias(Replacement, RelPosBias):
    """A free number per offset, and three for a class token."""

    def get_bias(self) -> WindowBias:
        """The bias of the window."""
        table = self.relative_position_bias_table.T
        if not self.prefix_tokens:
            return window_bias(table, self.window_size)
        return window_bias(table[:, :-CLASS_TOKEN_COLUMNS], self.window_size, table[:, -CLASS_TOKEN_COLUMNS:])


class OffsetBiasRelPosMlp(Replacement, RelPosMlp):
    """A small network of each offset's logarithmic coordinates. Class tokens have no bias."""

    def get_bias(self) -> WindowBias:
        """The bias of the window."""
        table = self.bias_act(self.mlp(self.rel_coords_log).view(-1, self.num_heads).T)
        table = table if self.bias_gain is None else self.bias_gain * table
        extra = table.new_zeros(self.num_heads, CLASS_TOKEN_COLUMNS) if self.prefix_tokens else None
        return window_bias(table, self.window_size, extra, self.prefix_tokens)


class OffsetBiasRelPosBiasTf(Replacement, RelPosBiasTf):
    """A free number per offset, key minus query."""

    def get_bias(self) -> WindowBias:
        """The bias of the window."""
        return window_bias(self.relative_position_bias_table.flatten(1).flip(-1), self.window_size)


def _bias_for(rel_pos: nn.Module | None, shared: WindowBias | None) -> WindowBias | None:
    """The bias of a layer: its own if it has one, else the shared one."""
    return shared if rel_pos is None else rel_pos.get_bias()  # type: ignore[operator]


class OffsetBiasRelPosAttention(ReplacedAttention, RelPosAttention):
    """The attention of a ViT with relative positions."""

    def forward(self, x: Tensor, shared_rel_pos: WindowBias | None = None) -> Tensor:
        """Attends with the layer's own bias or with the shared one.

        Args:
            x: (B, tokens, dim), class tokens first.
            shared_rel_pos: the bias that all layers share, or None.

        Returns:
            (B, tokens, dim).
        """
        query, key, value = queries_keys_values(self, x)
        bias, dropout_p = _bias_for(self.rel_pos, shared_rel_pos), self.attn_drop.p if self.training else 0.0
        out = attend_with_window_bias(self, self.q_norm(query), self.k_norm(key), value, bias, self.scale, dropout_p)
        return self.proj_drop(self.proj(out))


def _states_of(module: Attention2d | AttentionCl, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each (B, H, tokens, D), of the projected tokens (B, tokens, 3 * H * D)."""
    if module.head_first:
        parts = split_last(mixed, module.num_heads, 3, module.dim_head).unbind(3)
    else:
        parts = split_last(mixed, 3, module.num_heads, module.dim_head).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in parts)
    return query, key, value


class OffsetBiasAttention2d(ReplacedAttention, Attention2d):
    """The attention of MaxViT and CoAtNet with channels first."""

    def forward(self, x: Tensor, shared_rel_pos: WindowBias | None = None) -> Tensor:
        """Attends with the layer's own bias or with the shared one.

        Args:
            x: (B, dim, height, width).
            shared_rel_pos: the bias that all layers share, or None.

        Returns:
            (B, dim_out, height, width).
        """
        mixed = self.qkv(x).flatten(2).transpose(1, 2)  # (B, tokens, 3 * H * D)
        bias, dropout_p = _bias_for(self.rel_pos, shared_rel_pos), self.attn_drop.p if self.training else 0.0
        out = attend_with_window_bias(self, *_states_of(self, mixed), bias, self.scale, dropout_p)
        return self.proj_drop(self.proj(split_last(out.transpose(1, 2), *x.shape[2:])))


class OffsetBiasAttentionCl(ReplacedAttention, AttentionCl):
    """The attention of MaxViT and CoAtNet with channels last."""

    def forward(self, x: Tensor, shared_rel_pos: WindowBias | None = None) -> Tensor:
        """Attends with the layer's own bias or with the shared one.

        Args:
            x: (B, ..., dim).
            shared_rel_pos: the bias that all layers share, or None.

        Returns:
            (B, ..., dim_out).
        """
        mixed = self.qkv(x).flatten(1, -2)  # (B, tokens, 3 * H * D)
        bias, dropout_p = _bias_for(self.rel_pos, shared_rel_pos), self.attn_drop.p if self.training else 0.0
        out = attend_with_window_bias(self, *_states_of(self, mixed), bias, self.scale, dropout_p)
        return self.proj_drop(self.proj(out.reshape(*x.shape[:-1], -1)))


REPLACEMENTS: tuple[type[Replacement], ...] = (
    OffsetBiasRelPosBias,
    OffsetBiasRelPosMlp,
    OffsetBiasRelPosBiasTf,
    OffsetBiasRelPosAttention,
    OffsetBiasAttention2d,
    OffsetBiasAttentionCl,
)
