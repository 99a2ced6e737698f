"""Inkling's bias is a product of low rank: a projection of the hidden state times a bank of profiles over distance."""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.models.inkling.modeling_inkling import InklingAttention, InklingRelativeLogits

from triton_offset_bias.integrations.replacement import Replacement
from triton_offset_bias.integrations.transformers.attention import MaskedAttention, refuse_attentions
from triton_offset_bias.integrations.transformers.masks import SLIDING


def unserved_reason(config: PretrainedConfig) -> None:
    """None, because every text model is served."""
    return


class OffsetBiasInklingRelativeLogits(Replacement, InklingRelativeLogits):
    """The module that makes the bias of every pair. This one hands on the factors of the queries."""

    def forward(self, relative_states: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """The factors, (B, heads, L, d_rel), of `relative_states` (B, L, heads, d_rel). Positions are ignored.

        Inkling multiplies the result by a factor of each query, which it may as well do with the factors. The profiles
        are kept until the attention takes them. Hooks that hold parameters elsewhere have them here during this call.
        """
        self._profiles = (self.proj,)
        return relative_states.transpose(1, 2)

    def taken_profiles(self) -> Tensor:
        """The profiles of the last call, (d_rel, distances), which are not kept any longer."""
        (profiles,) = self._profiles
        del self._profiles
        return profiles


class OffsetBiasInklingAttention(MaskedAttention, InklingAttention):
    """Inkling's attention, which calls `attend_with_profiles`."""


def attend_with_profiles(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    output_attentions: object = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function of an enabled Inkling, as `transformers.AttentionInterface` asks for it.

    Args:
        module: an `OffsetBiasInklingAttention`. Its profiles are the tables, (d_rel, distances), from distance 0 on.
        query, key, value: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D); the last query lies on the last key.
        attention_mask: a mask of `sliding_key_mask`.
        scaling: factor on the dot products.
        dropout: probability of dropping a weight.
        sliding_window: the number of keys that a query sees, itself included; None: all before it.
        position_bias: the factors of the queries, (B, Hq, Lq, d_rel).
        output_attentions: must be False.

    Returns:
        (B, Lq, Hq * D), and None in the place of the weights.
    """
    refuse_attentions(output_attentions)
    out = module.attend(
        query,
        key,
        value,
        module.rel_logits_proj.taken_profiles(),
        attention_mask,
        bias_gate=position_bias,
        bias_origin=0,
        beyond="zero",
        scale=scaling,
        dropout_p=dropout,
        is_causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, -1),
    )
    return out, None


AttentionInterface.register(SLIDING, attend_with_profiles)
REPLACEMENTS: tuple[type[Replacement], ...] = (OffsetBiasInklingRelativeLogits, OffsetBiasInklingAttention)
