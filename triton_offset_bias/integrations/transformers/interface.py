"""The attention function `offset_bias` of transformers' `AttentionInterface`.

``from_pretrained(..., attn_implementation="offset_bias")`` takes it in every model that reads the interface. The model
keeps its own classes, so a bias arrives here as the model made it, for all pairs of query and key. Its table is read
from its first row and column. `enable_offset_bias` is leaner, because no dense bias is made at all.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from triton_offset_bias.functional import offset_bias_attention
from triton_offset_bias.integrations.packing import packed_attention
from triton_offset_bias.integrations.transformers.attention import masked_call, refuse_attentions
from triton_offset_bias.integrations.transformers.masks import INTERFACE, key_mask

# These read the interface, and their classes do not say so.
_READING_TYPES = ("t5", "mt5", "umt5", "switch_transformers", "pop2piano")


def interface_mask(
    batch_size: int, q_length: int, kv_length: int, config: PretrainedConfig | None = None, **kwargs: Any
) -> Tensor | None:
    """`key_mask` for models that read the interface.

    Raises:
        NotImplementedError: a model of this configuration does not read the interface, and would ask itself for a mask
            that its own attention does not understand; or as `key_mask`.
        ValueError: as `key_mask`.
    """
    if config is not None and not _reads_interface(config):
        raise NotImplementedError(
            f"models of type {config.model_type!r} do not read attn_implementation={INTERFACE!r}: build the model "
            "with its own attention, and call enable_offset_bias if its type is served"
        )
    return key_mask(batch_size, q_length, kv_length, config=config, **kwargs)


def _reads_interface(config: PretrainedConfig) -> bool:
    """Whether attention classes of this configuration's models call functions of the interface."""
    if config.model_type in _READING_TYPES:
        return True
    classes = transformers.MODEL_MAPPING.get(type(config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    return bool(classes) and all(cls._supports_attention_backend for cls in classes)


def attend_through_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function.

    Args:
        module: the layer, whose `is_causal` says whether it is causal unless the argument does.
        query, key, value: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
        attention_mask: a mask of `interface_mask`.
        scaling: factor on the dot products, by default ``1 / sqrt(D)``.
        dropout: probability of dropping a weight.
        is_causal: whether a query attends to earlier keys alone.
        position_bias: (1, Hq or 1, Lq, Lk), a bias that depends on the offset alone, or None.
        output_attentions: must be False.
        softcap, s_aux: must be None.

    Returns:
        (B, Lq, Hq, Dv), and None for the weights.

    Raises:
        NotImplementedError: the model asks for attention weights, a bound on the scores or a sink.
        ValueError: `attention_mask` has another form, or `position_bias` depends on more than the offset.
    """
    refuse_attentions(output_attentions)
    for name, option in (("softcap", softcap), ("s_aux", s_aux)):
        if option is not None:
            raise NotImplementedError(f"`{name}` must be None for attn_implementation={INTERFACE!r}")
    if is_causal is None:
        # Older UMT5 layers do not know that they are causal. In a decoder the causal layers are the ones with a table.
        has_table = getattr(module, "is_decoder", False) and getattr(module, "has_relative_attention_bias", False)
        is_causal = bool(getattr(module, "is_causal", True) or has_table)
    key, value, options = masked_call(query, key, value, attention_mask, is_causal)
    if position_bias is not None:
        options["bias_origin"] = query.shape[2] - 1
    table = None if position_bias is None else _table_of(position_bias[..., : key.shape[2]])
    attend = packed_attention if "bounds" in options else offset_bias_attention
    out = attend(query, key, value, table, scale=scaling, dropout_p=dropout, is_causal=is_causal, **options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


def _table_of(dense: Tensor) -> Tensor:
    """The table (heads, Lq + Lk - 1) of a bias (1, heads, Lq, Lk), with the last query on the last key.

    The first row holds the offsets from the lowest up, in reverse, and the first column the rest.
    """
    if dense.dim() != 4 or dense.shape[0] != 1 or not torch.equal(dense[..., 1:, 1:], dense[..., :-1, :-1]):
        raise ValueError(
            "`position_bias` must depend on the offset alone for attn_implementation="
            f"{INTERFACE!r}, got one of shape {tuple(dense.shape)} that differs along its diagonals"
        )
    return torch.cat([dense[0, :, 0].flip(-1), dense[0, :, 1:, 0]], dim=-1)


AttentionMaskInterface.register(INTERFACE, interface_mask)
AttentionInterface.register(INTERFACE, attend_through_interface)
