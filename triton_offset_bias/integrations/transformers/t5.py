"""T5 and its relatives: mT5, UMT5, LongT5 with local attention, Switch Transformers, Pop2Piano.

Their layers look up a bucket's number for every pair. The first layer computes a (1, heads, queries, keys)
`position_bias` and hands it to the others. Here the same argument carries the table, (heads, offsets), which has one
column per offset up to `relative_attention_max_distance`. All offsets beyond share a bucket, so the table's ends stand
for them. A table without columns stands for no bias, as in cross-attention.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PretrainedConfig
from transformers.models.longt5.modeling_longt5 import LongT5Attention, LongT5LocalAttention
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.pop2piano.modeling_pop2piano import Pop2PianoAttention
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from triton_offset_bias.integrations.replacement import Replacement
from triton_offset_bias.integrations.transformers.attention import MaskedAttention, refuse_attentions
from triton_offset_bias.integrations.transformers.masks import TABLE
from triton_offset_bias.integrations.transformers.t5_stacks import STACKS
from triton_offset_bias.modules.t5 import t5_buckets


def unserved_reason(config: PretrainedConfig) -> str | None:
    """The reason why a model of this configuration is not served; None if it is served."""
    if getattr(config, "encoder_attention_type", "local") != "local":
        return (
            f"encoder_attention_type={config.encoder_attention_type!r}: the bias towards global tokens depends on "
            "the block that a key lies in, not on its offset; only 'local' is served"
        )
    return None


class _BucketTable(MaskedAttention):
    """An attention layer of the family. It may have an embedding of buckets, which gives its table."""

    is_decoder: bool
    n_heads: int
    has_relative_attention_bias: bool
    relative_attention_bias: nn.Embedding
    relative_attention_num_buckets: int
    relative_attention_max_distance: int

    @property
    def table_origin(self) -> int:
        """The table's column of offset 0."""
        return 0 if self.is_decoder else self.relative_attention_max_distance

    def table(self, device: torch.device) -> Tensor:
        """The table of offsets from -max_distance (decoders: 0) to max_distance, (heads, offsets).

        A layer without a bias has a table without columns.
        """
        if not self.has_relative_attention_bias:
            return torch.empty(self.n_heads, 0, device=device)
        buckets = t5_buckets(
            -self.table_origin,
            self.relative_attention_max_distance,
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
            bidirectional=not self.is_decoder,
            device=device,
        )
        return self.relative_attention_bias(buckets).T


class _TableAttention(_BucketTable):
    """Self- and cross-attention whose own `forward` calls `attend_with_table` through the `AttentionInterface`."""

    is_spreadable = True
    config: PretrainedConfig
    is_causal: bool

    def compute_bias(
        self, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: object = 0
    ) -> Tensor:
        """The table in place of the dense bias.

        Raises:
            RuntimeError: the model's `attn_implementation` was changed after it was enabled.
        """
        self._check_implementation()
        return self.table(self.relative_attention_bias.weight.device if device is None else device)

    def _check_implementation(self) -> None:
        if self.config._attn_implementation != TABLE:
            raise RuntimeError(
                f"`attn_implementation` must stay {TABLE!r} until disable_offset_bias(model) is called, "
                f"got {self.config._attn_implementation!r}"
            )


class _SharedTableAttention(_TableAttention):
    """A layer that gets the first layer's table."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor, None]:
        """Calls the layer's own `forward` with a table. Without a table it would build a dense bias of zeros."""
        self._check_implementation()
        position_bias = self.table(hidden_states.device) if position_bias is None else position_bias
        return super().forward(hidden_states, mask, key_value_states, position_bias, *args, **kwargs)  # type: ignore[misc]


def attend_with_table(
    module: _TableAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function of the family.

    Args:
        module: the layer.
        query, key, value: (B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D).
        attention_mask: what `masked_call` takes.
        scaling: factor on the dot products, which is 1 in this family.
        dropout: probability of dropping a weight.
        position_bias: the table of `module` or of the first layer. A table without columns means no bias.
        output_attentions: must be False.

    Returns:
        (B, Lq, H * D), and None for the weights.

    Raises:
        TypeError: `enable_offset_bias` has not changed `module`.
        ValueError: `position_bias` is dense.
    """
    if not isinstance(module, _TableAttention):
        raise TypeError(
            "`config` must not come from a model that enable_offset_bias was called with, got one that does in a new "
            f"{type(module).__name__}: build the model with attn_implementation='eager'"
        )
    refuse_attentions(output_attentions)
    if position_bias is not None and position_bias.dim() != 2:
        raise ValueError(
            f"`position_bias` must be a table, (heads, offsets), got shape {tuple(position_bias.shape)}: "
            "call disable_offset_bias(model) before passing a dense bias"
        )
    bias = position_bias if position_bias is not None and position_bias.shape[1] else None
    out = module.attend(
        query,
        key,
        value,
        bias,
        attention_mask,
        scale=scaling,
        dropout_p=dropout,
        bias_origin=module.table_origin,
        # Older UMT5 layers do not know that they are causal. In a decoder the causal layers are the ones with a table.
        is_causal=module.is_causal or (module.is_decoder and bias is not None),
    )
    return out, None


class OffsetBiasT5Attention(_SharedTableAttention, T5Attention):
    """T5's attention."""


class OffsetBiasMT5Attention(_SharedTableAttention, MT5Attention):
    """mT5's attention."""


class OffsetBiasUMT5Attention(_TableAttention, UMT5Attention):
    """UMT5's attention. Every self-attention layer has a table of its own. Cross-attention has none."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends like the layer's own `forward`, which would build a dense bias of zeros in cross-attention.

        Args:
            hidden_states: (B, Lq, d_model).
            encoder_hidden_states: (B, Lk, d_model) in cross-attention, else None.
            cache: the cache that keys and values are added to. Cross-attention adds them once.
            attention_mask: what `masked_call` takes.
            past_key_values: the name of `cache` in older versions.

        Returns:
            (B, Lq, d_model), and None for the weights.
        """
        self._check_implementation()
        cache = past_key_values if cache is None else cache
        if encoder_hidden_states is None:
            return super().forward(hidden_states, None, cache, attention_mask, **kwargs)
        query = self._heads(self.q(hidden_states))
        key, value = self._encoded(encoder_hidden_states, cache)
        dropout_p = self.dropout if self.training else 0.0
        out = self.attend(query, key, value, None, attention_mask, scale=self.scaling, dropout_p=dropout_p)
        return self.o(out), None

    def _encoded(self, encoder_hidden_states: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states, (B, H, Lk, D) each. They come from the cache if it has them."""
        own_cache = cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = (self._heads(projection(encoder_hidden_states)) for projection in (self.k, self.v))
        if own_cache is not None:
            key, value = own_cache.update(key, value, self.layer_idx)
        if isinstance(cache, EncoderDecoderCache):
            cache.is_updated[self.layer_idx] = True
        return key, value

    def _heads(self, states: Tensor) -> Tensor:
        """The projected states with heads apart, (B, H, L, D)."""
        return states.unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)


class OffsetBiasLongT5Attention(_SharedTableAttention, LongT5Attention):
    """The attention of LongT5's decoder."""


class OffsetBiasSwitchTransformersAttention(_SharedTableAttention, SwitchTransformersAttention):
    """Switch Transformers' attention."""


class OffsetBiasPop2PianoAttention(_SharedTableAttention, Pop2PianoAttention):
    """Pop2Piano's attention."""


class OffsetBiasLongT5LocalAttention(_BucketTable, LongT5LocalAttention):
    """The attention of LongT5's encoder. Its blocks and their mask amount to a window of `local_radius` keys a side."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within the window.

        Args:
            hidden_states: (B, L, d_model).
            mask: (B, 1, blocks, block_len, 3 * block_len) bool, which the model makes of its padding mask, or None.
            position_bias: the table; None in the first layer.
            output_attentions: must be False.

        Returns:
            (B, L, d_model), and the table for the next layers.
        """
        refuse_attentions(output_attentions)
        table = self.table(hidden_states.device) if position_bias is None else position_bias
        length = hidden_states.shape[1]
        # A key is padding if it may not even attend to itself, which the middle of the mask's three blocks tells.
        middle = None if mask is None else mask[..., self.block_len : 2 * self.block_len]
        padding = None if middle is None else middle.diagonal(dim1=-2, dim2=-1)[:, 0].flatten(1)[:, :length]
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        out = self.attend(
            query,
            key,
            value,
            table,
            padding,
            scale=1.0,
            dropout_p=self.dropout if self.training else 0.0,
            bias_origin=self.table_origin,
            window_size=(self.local_radius, self.local_radius),
        )
        return self.o(out), table


REPLACEMENTS: tuple[type[Replacement], ...] = (
    *STACKS,
    OffsetBiasT5Attention,
    OffsetBiasMT5Attention,
    OffsetBiasUMT5Attention,
    OffsetBiasLongT5Attention,
    OffsetBiasLongT5LocalAttention,
    OffsetBiasSwitchTransformersAttention,
    OffsetBiasPop2PianoAttention,
)

AttentionInterface.register(TABLE, attend_with_table)
