"""The layers of T5, mT5 and UMT5. An encoder takes padding out of a batch, so that all its layers compute tokens alone.

The layers of a decoder stay as they are, because its cache has a place for each token and each padding.
"""

from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.umt5.modeling_umt5 import UMT5Stack
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from triton_offset_bias.integrations.packing import Packing, packing_of
from triton_offset_bias.integrations.replacement import Replacement
from triton_offset_bias.integrations.transformers.masks import TABLE


class _PackedStack(Replacement):
    """The layers of an encoder or decoder."""

    is_needed = False
    is_decoder: bool
    config: PretrainedConfig
    block: nn.ModuleList
    _can_record_outputs: ClassVar[dict[str, object]]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """Calls the layers' own `forward`, with the tokens alone where an encoder's batch is packed.

        The states of padding are 0 then.

        Args:
            input_ids: (B, L), or None.
            attention_mask: (B, L), 0 for padding, or None.
            encoder_hidden_states, encoder_attention_mask: what a decoder attends to.
            inputs_embeds: (B, L, d_model) where `input_ids` is None.
            args, kwargs: what else the layers' own `forward` takes. With `output_hidden_states` nothing is packed.
        """
        memory = encoder_hidden_states, encoder_attention_mask
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        packing = self._packing(inputs, attention_mask, kwargs)
        if packing is None:
            return super().forward(input_ids, attention_mask, *memory, inputs_embeds, *args, **kwargs)
        tokens, embeds = (None if x is None else packing.packed(x) for x in (input_ids, inputs_embeds))
        outputs = super().forward(tokens, packing.bounds, *memory, embeds, *args, **kwargs)
        states = packing.padded(outputs[0])
        if isinstance(outputs, tuple):
            return (states, *outputs[1:])
        outputs["last_hidden_state"] = states
        return outputs

    def _packing(self, inputs: Tensor | None, mask: Tensor | None, options: dict[str, object]) -> Packing | None:
        """The packing of an encoder's batch, or None. Masks of `TABLE` alone may be bounds of packed sequences."""
        has_states = options.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        if self.is_decoder or has_states or self.config._attn_implementation != TABLE:
            return None
        return packing_of(self.block, inputs, mask)


class OffsetBiasT5Stack(_PackedStack, T5Stack):
    """The layers of T5's encoder or decoder."""


class OffsetBiasMT5Stack(_PackedStack, MT5Stack):
    """The layers of mT5's encoder or decoder."""


class OffsetBiasUMT5Stack(_PackedStack, UMT5Stack):
    """The layers of UMT5's encoder or decoder."""


STACKS: tuple[type[_PackedStack], ...] = (OffsetBiasT5Stack, OffsetBiasMT5Stack, OffsetBiasUMT5Stack)
# transformers looks up by a class's name which outputs its models can record, such as the states of all layers.
_CAN_RECORD_REGISTRY.update({str(cls): cls._can_record_outputs for cls in STACKS})
