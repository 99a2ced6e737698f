"""T5 and its relatives: mT5, UMT5, LongT5 with local attention, Switch Transformers, Pop2Piano.

Their layers look a bucket's number up for every pair, which gives a (1, heads, queries, keys) `position_bias` that the
first layer computes and the others are handed. Here the same argument carries the table, (heads, offsets): one column
per offset as far as `relative_attention_max_distance`, from where on all offsets share a bucket, so that the table's
ends stand for all of them.
"""

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.models.longt5.modeling_longt5 import LongT5Attention, LongT5LocalAttention
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.pop2piano.modeling_pop2piano import Pop2PianoAttention
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from triton_offset_bias.integrations.transformers.masks import TABLE
from triton_offset_bias.integrations.transformers.replacement import Replacement, refuse_attentions
from triton_offset_bias.modules.t5 import t5_buckets


def unserved_reason(config: PretrainedConfig) -> str | None:
    """Why a model of this configuration is not served; None if it is."""
    if getattr(config, "encoder_attention_type", "local") != "local":
        return (
            f"encoder_attention_type={config.encoder_attention_type!r}: the bias towards global tokens depends on "
            "the block that a key lies in, not on its offset; only 'local' is served"
        )
    return None


class _BucketTable(Replacement):
    """What every attention layer of the family has: perhaps an embedding of buckets, and its reach."""

    is_decoder: bool
    relative_attention_num_buckets: int
    relative_attention_max_distance: int

    @property
    def table_origin(self) -> int:
        """The table's column of offset 0."""
        return 0 if self.is_decoder else self.relative_attention_max_distance

    def table(self) -> Tensor | None:
        """(heads, offsets), from -max_distance, or 0 in decoders, to max_distance; None in layers without their own."""
        embedding: nn.Embedding | None = getattr(self, "relative_attention_bias", None)
        if embedding is None:
            return None
        buckets = t5_buckets(
            -self.table_origin,
            self.relative_attention_max_distance,
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
            bidirectional=not self.is_decoder,
            device=embedding.weight.device,
        )
        return embedding(buckets).T


class _TableAttention(_BucketTable):
    """Self- and cross-attention of the family; reached through `transformers.AttentionInterface`."""

    config: PretrainedConfig
    is_causal: bool

    @property
    def has_relative_attention_bias(self) -> bool:
        """True: layers without a `position_bias` ask `compute_bias`, instead of building a dense one of zeros."""
        return True

    def compute_bias(
        self, query_length: int, key_length: int, device: object = None, past_seen_tokens: object = 0
    ) -> Tensor | None:
        """The table in place of the dense bias; None for no bias, as in cross-attention.

        Raises:
            RuntimeError: the model was told to attend in another way since it was enabled.
        """
        if self.config._attn_implementation != TABLE:
            raise RuntimeError(
                f"`attn_implementation` must stay {TABLE!r} until disable_offset_bias(model) is called, "
                f"got {self.config._attn_implementation!r}"
            )
        return self.table()


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
        attention_mask: what `padding_of` takes.
        scaling: factor on the products, 1 in this family.
        dropout: probability of dropping a weight.
        position_bias: the table of `module` or of the first layer; None for no bias.
        output_attentions: must be False.

    Returns:
        (B, Lq, H * D), and None for the weights.

    Raises:
        TypeError: `module` is not one that `enable_offset_bias` has changed.
    """
    if not isinstance(module, _TableAttention):
        raise TypeError(
            f"`config` must not be that of a model that enable_offset_bias was called with, got it in a new "
            f"{type(module).__name__}: build the model with attn_implementation='eager'"
        )
    refuse_attentions(output_attentions)
    out = module.attend(
        query,
        key,
        value,
        position_bias,
        attention_mask,
        scale=scaling,
        dropout_p=dropout,
        bias_origin=module.table_origin,
        # Older UMT5 layers do not know that they are causal; but of a decoder's layers only those with a table are.
        is_causal=module.is_causal or (module.is_decoder and position_bias is not None),
    )
    return out, None


class OffsetBiasT5Attention(_TableAttention, T5Attention):
    """T5's attention."""


class OffsetBiasMT5Attention(_TableAttention, MT5Attention):
    """mT5's attention."""


class OffsetBiasUMT5Attention(_TableAttention, UMT5Attention):
    """UMT5's attention: every layer has a table of its own."""


class OffsetBiasLongT5Attention(_TableAttention, LongT5Attention):
    """The attention of LongT5's decoder."""


class OffsetBiasSwitchTransformersAttention(_TableAttention, SwitchTransformersAttention):
    """Switch Transformers' attention."""


class OffsetBiasPop2PianoAttention(_TableAttention, Pop2PianoAttention):
    """Pop2Piano's attention."""


class OffsetBiasLongT5LocalAttention(_BucketTable, LongT5LocalAttention):
    """The attention of LongT5's encoder: blocks and their mask, which amount to a window of `local_radius`."""

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
            mask: (B, 1, blocks, block_len, 3 * block_len) bool as the model makes it of its padding mask, or None.
            position_bias: the table, from the first layer on.
            output_attentions: must be False.

        Returns:
            (B, L, d_model), and the table for the next layers.
        """
        refuse_attentions(output_attentions)
        table = self.table() if position_bias is None else position_bias
        length = hidden_states.shape[1]
        # A key is padding where it may not even attend to itself, in the middle one of its block's three.
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
    OffsetBiasT5Attention,
    OffsetBiasMT5Attention,
    OffsetBiasUMT5Attention,
    OffsetBiasLongT5Attention,
    OffsetBiasLongT5LocalAttention,
    OffsetBiasSwitchTransformersAttention,
    OffsetBiasPop2PianoAttention,
)

AttentionInterface.register(TABLE, attend_with_table)
