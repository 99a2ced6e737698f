"""Projections that timm's attention classes share."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from triton_offset_bias.integrations.windows import split_last


class _Mixed(Protocol):
    """An attention of Swin, Swin V2, BEiT or of a ViT with relative positions."""

    num_heads: int
    qkv: nn.Linear


def queries_keys_values(module: _Mixed, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each (B, H, tokens, D), of tokens (B, tokens, C).

    Some classes keep the biases of query, key and value apart from the weight. The three are taken apart before their
    heads are moved, because their gradients are then put together in the projection's own layout, without a copy.
    """
    apart = [getattr(module, name, None) for name in ("q_bias", "k_bias", "v_bias")]
    biases = [bias for bias in apart if bias is not None]
    if not biases:
        mixed = module.qkv(x)
    elif getattr(module, "qkv_bias_separate", False):
        mixed = module.qkv(x) + torch.cat(biases)
    else:
        mixed = functional.linear(x, module.qkv.weight, torch.cat(biases))
    query, key, value = (x.transpose(1, 2) for x in split_last(mixed, 3, module.num_heads, -1).unbind(2))
    return query, key, value
