"""BLOOM, MPT and Falcon have ALiBi.

They add slope times the key's position to a score. For the softmax of a row this equals minus slope times the offset.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, PretrainedConfig
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.mpt.modeling_mpt import MptAttention, MptBlock

from triton_offset_bias.integrations.replacement import Replacement
from triton_offset_bias.integrations.transformers.attention import MaskedAttention, refuse_attentions
from triton_offset_bias.modules.alibi import alibi_slopes


def unserved_reason(config: PretrainedConfig) -> str | None:
    """The reason why a model of this configuration is not served; None if it is served."""
    if config.model_type == "falcon" and not config.alibi:
        return "alibi=False: rotary positions are no bias per offset, and Falcon's own attention serves them as well"
    if config.model_type == "bloom" and config.slow_but_exact and config.pretraining_tp > 1:
        return "slow_but_exact=True and pretraining_tp > 1: its sliced output projection is not reproduced"
    return None


def _penalties(slopes: Tensor, num_keys: int) -> Tensor:
    """Minus slope times offset, for the offsets from 0 on that causal attention has: (heads, num_keys)."""
    return -slopes[:, None] * torch.arange(num_keys, device=slopes.device)


class OffsetBiasBloomAttention(MaskedAttention, BloomAttention):
    """BLOOM's attention."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends with ALiBi.

        Args:
            hidden_states: (B, Lq, hidden_size).
            residual: (B, Lq, hidden_size), added to the result.
            alibi: not used.
            attention_mask: (B, keys) bool or int64 of `numbered_key_mask`.
            layer_past: the cache that keys and values are added to.
            use_cache: not used.
            output_attentions: must be False.

        Returns:
            (B, Lq, hidden_size), and None for the weights.
        """
        refuse_attentions(output_attentions)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = self.attend(
            query,
            key,
            value,
            _penalties(alibi_slopes(self.num_heads, query.device), key.shape[2]),
            attention_mask,
            scale=self.inv_norm_factor,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            bias_origin=0,
            is_causal=True,
        )
        out = functional.dropout(self.dense(out), p=self.hidden_dropout, training=self.training)
        return residual + out, None


class OffsetBiasMptAttention(MaskedAttention, MptAttention):
    """MPT's attention."""

    is_spreadable = True

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends with ALiBi.

        Args:
            hidden_states: (B, Lq, hidden_size).
            position_bias: (heads, 1, max_seq_len), slope times key position, counted so that the last position is 0.
            cache: the cache that keys and values are added to.
            attention_mask: (B, keys) bool of `key_mask`.
            past_key_values: the name of `cache` in older versions.

        Returns:
            (B, Lq, hidden_size), and None for the weights.

        Raises:
            ValueError: there are more keys than `position_bias` has positions.
        """
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=2))
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        num_keys = key.shape[2] * self._ranks
        if num_keys > position_bias.shape[2]:
            raise ValueError(
                f"`max_seq_len` must be at least the number of keys, {num_keys}, got {position_bias.shape[2]}"
            )
        out = self.attend(
            query,
            key,
            value,
            position_bias[:, 0, -num_keys:].flip(-1),
            attention_mask,
            scale=self.softmax_scale,
            dropout_p=self.attn_dropout_p if self.training else 0.0,
            bias_origin=0,
            is_causal=True,
        )
        return self.out_proj(out), None


class OffsetBiasMptBlock(Replacement, MptBlock):
    """MPT's block. In MPT only the block is told whether attention weights are asked for."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Computes MPT's block; `output_attentions` must be False."""
        refuse_attentions(output_attentions)
        return super().forward(hidden_states, position_bias, attention_mask, layer_past, use_cache, **kwargs)


class OffsetBiasFalconAttention(MaskedAttention, FalconAttention):
    """Falcon's attention with ALiBi, as in its `sdpa` implementation. Its `eager` implementation adds ALiBi twice."""

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: Sequence[Tensor] | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends with ALiBi, whose slopes are rounded to bfloat16. Falcon multiplies ALiBi by the scale, too.

        Args:
            hidden_states: (B, Lq, hidden_size).
            alibi: not used.
            attention_mask: (B, keys) bool or int64 of `numbered_key_mask`.
            position_ids: not used.
            layer_past: the cache that keys and values are added to.
            use_cache: not used.
            output_attentions: must be False.
            position_embeddings: not used.

        Returns:
            (B, Lq, hidden_size), and None for the weights.
        """
        refuse_attentions(output_attentions)
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        slopes = alibi_slopes(self.num_heads, query.device).bfloat16().float() * self.inv_norm_factor
        out = self.attend(
            query,
            key,
            value,
            _penalties(slopes, key.shape[2]),
            attention_mask,
            scale=self.inv_norm_factor,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            bias_origin=0,
            is_causal=True,
        )
        return self.dense(out), None


REPLACEMENTS: tuple[type[Replacement], ...] = (
    OffsetBiasBloomAttention,
    OffsetBiasMptAttention,
    OffsetBiasMptBlock,
    OffsetBiasFalconAttention,
)
