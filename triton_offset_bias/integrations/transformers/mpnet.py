"""MPNet has T5's buckets, in an encoder that computes the bias once for all layers."""

from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from triton_offset_bias.integrations.packing import packing_of
from triton_offset_bias.integrations.replacement import Replacement
from triton_offset_bias.integrations.transformers.attention import MaskedAttention, refuse_attentions
from triton_offset_bias.modules.t5 import t5_buckets

# MPNet's code has these numbers as constants, not in its configuration.
_NUM_BUCKETS, _MAX_DISTANCE = 32, 128


def unserved_reason(config: PretrainedConfig) -> None:
    """None, because every MPNet is served."""
    return


class OffsetBiasMPNetEncoder(Replacement, MPNetEncoder):
    """MPNet's encoder, whose `position_bias` is a table."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs: object,
    ) -> BaseModelOutput | tuple[Tensor]:
        """Encodes the tokens that are no padding. The states of padding are 0 where `packing_of` packs the batch.

        Args:
            hidden_states: (B, L, hidden_size).
            attention_mask: (B, L) bool of `key_mask`, or None.
            output_attentions: must be False.
            output_hidden_states: whether to return the states of all layers. The batch is not packed then.
            return_dict: whether to return a `BaseModelOutput`.
        """
        packing = None if output_hidden_states else packing_of(self.layer, hidden_states, attention_mask)
        if packing is None:
            return super().forward(
                hidden_states, attention_mask, output_attentions, output_hidden_states, return_dict, **kwargs
            )
        states = super().forward(packing.packed(hidden_states), packing.bounds, output_attentions, **kwargs)[0]
        padded = packing.padded(states)
        return BaseModelOutput(last_hidden_state=padded) if return_dict else (padded,)

    def compute_position_bias(
        self, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = _NUM_BUCKETS
    ) -> Tensor:
        """The bias of every offset from -128 to 128, (heads, offsets). Offsets beyond share the buckets of the ends.

        Raises:
            NotImplementedError: `position_ids` are given, which the encoder never does.
        """
        if position_ids is not None:
            raise NotImplementedError("`position_ids` must be None for offset-bias attention, got a tensor")
        buckets = t5_buckets(-_MAX_DISTANCE, _MAX_DISTANCE, num_buckets, _MAX_DISTANCE, device=x.device)
        return self.relative_attention_bias(buckets).T


class OffsetBiasMPNetSelfAttention(MaskedAttention, MPNetSelfAttention):
    """MPNet's attention."""

    is_spreadable = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: object,
    ) -> tuple[Tensor]:
        """Attends with a table.

        Args:
            hidden_states: (B, L, hidden_size).
            attention_mask: what `masked_call` takes.
            position_bias: the table, of 257 offsets.
            output_attentions: must be False.

        Returns:
            (B, L, hidden_size), alone in a tuple.
        """
        refuse_attentions(output_attentions)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        out = self.attend(
            query,
            key,
            value,
            position_bias,
            attention_mask,
            scale=self.attention_head_size**-0.5,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return (self.o(out),)


REPLACEMENTS: tuple[type[Replacement], ...] = (OffsetBiasMPNetEncoder, OffsetBiasMPNetSelfAttention)
