"""Swin, Swin V2 and the models that are made of their code attend within windows of an image or of a spectrogram.

A patch's position is one integer, row * (2 * width - 1) + column. The difference of two positions tells how many rows
and columns the patches are apart. The models' tables are in the order of these differences.
"""

import math

from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.models.clap.modeling_clap import ClapAudioSelfAttention
from transformers.models.donut.modeling_donut_swin import DonutSwinSelfAttention
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinSelfAttention
from transformers.models.swin.modeling_swin import SwinAttention, SwinRelativePositionBias
from transformers.models.swin2sr.modeling_swin2sr import Swin2SRSelfAttention
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.transformers.attention import refuse_attentions
from triton_offset_bias.integrations.windows import attend_in_windows, table_of_cosines


def unserved_reason(config: PretrainedConfig) -> None:
    """None, because every Swin is served."""
    return


class OffsetBiasSwinRelativePositionBias(Replacement, SwinRelativePositionBias):
    """Swin's bias. It stays a module of its own, so that hooks on it can bring its parameter to the device."""

    def forward(self) -> Tensor:
        """The table, (H, offsets)."""
        return self.relative_position_bias_table.T


class OffsetBiasSwinAttention(ReplacedAttention, SwinAttention):
    """Swin's attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends within windows.

        Args:
            hidden_states: (B * windows, tokens, hidden_size).
            attention_mask: (windows, tokens, tokens) of shifted windows, or None.
            output_attentions: must be False.

        Returns:
            (B * windows, tokens, hidden_size), and None for the weights.
        """
        refuse_attentions(output_attentions)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend_in_windows(
            self,
            (query, key, value),
            self.relative_position_bias(),
            self.relative_position_bias.window_size,
            attention_mask,
            self.scaling,
            self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(out), None


class _SwinSelfAttention(ReplacedAttention):
    """The attention of copies of Swin. Its output projection is a module of its own."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    num_attention_heads: int
    attention_head_size: int
    window_size: tuple[int, int]
    relative_position_bias_table: nn.Parameter
    dropout: nn.Dropout
    training: bool

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor]:
        """Attends within windows.

        Args:
            hidden_states: (B * windows, tokens, hidden_size).
            attention_mask: (windows, tokens, tokens) of shifted windows, or None.
            output_attentions: must be False.

        Returns:
            (B * windows, tokens, hidden_size), alone in a tuple.
        """
        refuse_attentions(output_attentions)
        out = attend_in_windows(
            self,
            _heads_apart(self, hidden_states),
            self.relative_position_bias_table.T,
            self.window_size,
            attention_mask,
            self.attention_head_size**-0.5,
            self.dropout.p if self.training else 0.0,
        )
        return (out,)


class _SwinV2SelfAttention(ReplacedAttention):
    """Swin V2's attention. A score is a cosine times a learned scale of the head, plus a bias from a small network."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    num_attention_heads: int
    window_size: tuple[int, int]
    logit_scale: nn.Parameter
    continuous_position_bias_mlp: nn.Module
    relative_coords_table: Tensor
    dropout: nn.Dropout
    training: bool

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor]:
        """Attends within windows.

        Args:
            hidden_states: (B * windows, tokens, hidden_size).
            attention_mask: (windows, tokens, tokens) of shifted windows, or None.
            output_attentions: must be False.

        Returns:
            (B * windows, tokens, hidden_size), alone in a tuple.
        """
        refuse_attentions(output_attentions)
        query, key, value = _heads_apart(self, hidden_states)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        out = attend_in_windows(
            self,
            (functional.normalize(query, dim=-1) * scale, functional.normalize(key, dim=-1), value),
            table_of_cosines(self.continuous_position_bias_mlp, self.relative_coords_table, self.num_attention_heads),
            self.window_size,
            attention_mask,
            1.0,
            self.dropout.p if self.training else 0.0,
        )
        return (out,)


def _heads_apart(
    module: _SwinSelfAttention | _SwinV2SelfAttention, hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each (B * windows, H, tokens, D)."""
    query, key, value = (
        projection(hidden_states).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for projection in (module.query, module.key, module.value)
    )
    return query, key, value


class OffsetBiasDonutSwinSelfAttention(_SwinSelfAttention, DonutSwinSelfAttention):
    """The attention of Donut's encoder."""


class OffsetBiasMaskFormerSwinSelfAttention(_SwinSelfAttention, MaskFormerSwinSelfAttention):
    """The attention of MaskFormer's backbone."""


class OffsetBiasClapAudioSelfAttention(_SwinSelfAttention, ClapAudioSelfAttention):
    """The attention of CLAP's audio encoder."""


class OffsetBiasSwinv2SelfAttention(_SwinV2SelfAttention, Swinv2SelfAttention):
    """Swin V2's attention."""


class OffsetBiasSwin2SRSelfAttention(_SwinV2SelfAttention, Swin2SRSelfAttention):
    """Swin2SR's attention."""


REPLACEMENTS: tuple[type[Replacement], ...] = (
    OffsetBiasSwinRelativePositionBias,
    OffsetBiasSwinAttention,
    OffsetBiasDonutSwinSelfAttention,
    OffsetBiasMaskFormerSwinSelfAttention,
    OffsetBiasClapAudioSelfAttention,
    OffsetBiasSwinv2SelfAttention,
    OffsetBiasSwin2SRSelfAttention,
)
