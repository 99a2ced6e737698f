"""Sequences one after another in one row of tokens, without the padding between them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_offset_bias.functional import offset_bias_attention_varlen
from triton_offset_bias.spreadable import SpreadableAttention


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor, **options: Any
) -> Tensor:
    """Attention of sequences that lie one after another in the rows of a batch.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        bias: the table, or None.
        bounds: (sequences + 1,) int32. Of the B * L tokens, sequence s has those from ``bounds[s]`` on, and before
            ``bounds[s + 1]``.
        options: options of `offset_bias_attention_varlen`.

    Returns:
        (B, Hq, L, Dv).
    """
    # Compiled code cannot look at the bounds. No sequence has more tokens than there are.
    longest = query.shape[0] * query.shape[2] if torch.compiler.is_compiling() else int(bounds.diff().max())
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = offset_bias_attention_varlen(q, k, v, bias, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.view(query.shape[0], -1, *out.shape[1:]).transpose(1, 2)


class Packing(NamedTuple):
    """The tokens of a padded batch that are no padding.

    Attributes:
        kept: (tokens,) int64, their indices among all B * L places.
        bounds: (B + 1,) int32, the bounds of their sequences.
        shape: (B, L).
    """

    kept: Tensor
    bounds: Tensor
    shape: tuple[int, int]

    def packed(self, states: Tensor) -> Tensor:
        """The states of the tokens, (1, tokens, C), from states (B, L, C); or their ids, from ids (B, L)."""
        return states.flatten(0, 1).index_select(0, self.kept).unsqueeze(0)

    def padded(self, states: Tensor) -> Tensor:
        """The states with 0 in the padding's places, (B, L, C), from states (1, tokens, C)."""
        places = states.new_zeros(self.shape[0] * self.shape[1], states.shape[-1])
        return places.index_copy(0, self.kept, states[0]).unflatten(0, self.shape)


def packing_of(layers: nn.Module, inputs: Tensor | None, mask: Tensor | None) -> Packing | None:
    """The packing of a batch that is worth packing; None for other batches.

    It is worth it on a CPU, where some sequence is padded and all padding is behind the tokens. On a GPU the call would
    wait for the mask, and compiled code cannot look at it. Ranks that hold parts of the sequences do not pack them.

    Args:
        layers: the module that holds the encoder's layers.
        inputs: (B, L, C) states or (B, L) ids.
        mask: (B, L), not 0 for tokens; or None where nothing is padded.
    """
    if inputs is None or mask is None or mask.shape != inputs.shape[:2] or torch.compiler.is_compiling():
        return None
    if inputs.device.type != "cpu" or mask.device.type != "cpu" or _is_spread(layers):
        return None
    mask = mask.bool()
    lengths = mask.sum(-1)
    is_behind = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if bool(mask.all()) or not bool(mask.any()) or not torch.equal(mask, is_behind):
        return None
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return Packing(mask.flatten().nonzero().squeeze(1), bounds, (mask.shape[0], mask.shape[1]))


def _is_spread(layers: nn.Module) -> bool:
    """Whether ranks hold parts of the sequences, which all layers know or none."""
    first = next((module for module in layers.modules() if isinstance(module, SpreadableAttention)), None)
    return first is not None and first._ranks > 1
