"""Masks of transformers' models, in the form that this package takes: one bool per key, (batch, keys), True = attend.

Models call `key_mask` where they would build a (batch, 1, queries, keys) mask. The mask does not say whether attention
is causal, since each layer knows that itself.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

# The names under which models find these masks, as `config._attn_implementation`. TABLE, SLIDING and INTERFACE are also
# names of attention functions. transformers refuses to build models from a configuration with one of the other names.
PLAIN, TABLE, NUMBERED, SLIDING = "offset_bias_keys", "offset_bias_table", "offset_bias_numbered", "offset_bias_sliding"
INTERFACE = "offset_bias"  # for users


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PretrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> Tensor | None:
    """The mask of keys that may be attended to, as `transformers.AttentionMaskInterface` asks for it.

    A causal mask ends with the last query's own key. A static cache also has places for later keys, which are cut off.

    Returns:
        (batch_size, keys) bool; None if nothing is padded and the attention is not causal; for packed sequences, which
        the models find by their `position_ids`, the bounds (sequences + 1,) int32 among all batch_size * keys tokens.
        An encoder that packs its batch passes such bounds as `attention_mask`, and they are returned.

    Raises:
        NotImplementedError: the mask is more than causal or bidirectional attention with padding or packed sequences.
        ValueError: `attention_mask` is not of shape (batch, keys).
    """
    packed = _packed_sequences(mask_function)
    if packed is not None and attention_mask is None and q_length == kv_length:
        return _bounds(packed)
    is_causal = mask_function is causal_mask_function
    is_switched = not getattr(config, "is_causal", True)
    if not (is_causal or mask_function is bidirectional_mask_function) or is_switched or kv_offset:
        raise NotImplementedError(
            "offset-bias attention serves causal or bidirectional attention with padding masks or packed sequences; "
            "sliding or chunked caches, `config.is_causal=False` and custom mask functions are not served"
        )
    if attention_mask is not None and attention_mask.dim() == 1 and attention_mask.dtype == torch.int32:
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"`attention_mask` must have shape (batch, keys), got shape {tuple(attention_mask.shape)}")
    first = int(q_offset) if isinstance(q_offset, Tensor) else q_offset  # it is a tensor while a static cache fills up
    num_keys = first + q_length if is_causal else kv_length
    if attention_mask is None:
        return torch.ones(batch_size, num_keys, dtype=torch.bool, device=device) if is_causal else None
    missing = max(num_keys - attention_mask.shape[1], 0)
    return torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, :num_keys]


def _packed_sequences(mask_function: Callable[..., object]) -> Tensor | None:
    """The number of each token's sequence, (batch, tokens), if a mask is causal within packed sequences; else None."""
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(parts) != 2 or not all(inspect.isfunction(part) for part in parts):
        return None
    within, packed = (inspect.getclosurevars(part).nonlocals for part in parts)
    is_packed = parts[1].__code__ in packed_sequence_mask_function.__code__.co_consts
    # Newer versions compare positions within a sequence, older ones compare places, with the same result.
    is_causal = causal_mask_function in (parts[0], within.get("mask_function"))
    return packed["packed_sequence_mask"] if is_packed and is_causal else None


def _bounds(sequences: Tensor) -> Tensor:
    """The bounds of sequences, (sequences + 1,) int32, from each token's number, (batch, tokens)."""
    is_first = torch.ones_like(sequences, dtype=torch.bool)
    is_first[:, 1:] = sequences.diff(dim=-1) != 0
    firsts = is_first.flatten().nonzero().squeeze(1)
    return torch.cat([firsts, firsts.new_tensor([sequences.numel()])]).int()


def sliding_key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> Tensor:
    """The mask of keys for models that have causal layers with a sliding window. Layers know the window themselves.

    A sliding cache keeps the last keys alone, from `kv_offset` on.

    Returns:
        (batch_size, keys) bool, up to the last query's own key.

    Raises:
        NotImplementedError: the mask is more than causal attention, within a window, with padding.
        ValueError: `attention_mask` is not of shape (batch, keys), or ends before the last key.
    """
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    overlays = [part for part in parts if part is not causal_mask_function]
    codes = sliding_window_overlay.__code__.co_consts
    is_sliding = len(parts) == 2 and len(overlays) == 1 and overlays[0].__code__ in codes
    if not (mask_function is causal_mask_function or is_sliding):
        raise NotImplementedError(
            "offset-bias attention serves causal attention with padding masks, within a window or not, for this model; "
            "packed sequences and custom mask functions are not served"
        )
    num_keys = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        return torch.ones(batch_size, num_keys, dtype=torch.bool, device=device)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < kv_offset + num_keys:
        raise ValueError(
            f"`attention_mask` must have shape (batch, keys) with at least {kv_offset + num_keys} keys, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    return attention_mask.bool()[:, kv_offset : kv_offset + num_keys]


def numbered_key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """`key_mask` for models that number the attended keys of a sequence one after the other.

    If padding is only at the ends, the numbers differ from the places by a shift, which softmax does not see.

    Returns:
        The mask of `key_mask`, unless some sequence has padding between attended keys. Then (batch_size, keys) int64:
        the attended keys' numbers, from 1 on, and 0 for padding. Given this result as its `attention_mask`, the
        function returns it again. This is needed because generation with a static cache makes masks ahead of the model,
        and the model takes them for padding masks.

    Raises:
        NotImplementedError: as `key_mask`.
        ValueError: as `key_mask`; or `attention_mask` leaves out keys of the cache.
    """
    mask = key_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)
    if attention_mask is None or mask is None:
        return mask
    if attention_mask.shape[1] < mask.shape[1]:
        raise ValueError(
            f"`attention_mask` must cover all {mask.shape[1]} keys, also the keys in the cache, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    # In a sequence without gaps, number minus place is the same for all attended keys.
    numbers = mask.cumsum(-1)
    shifts = numbers - 1 - torch.arange(mask.shape[1], device=mask.device)
    has_gaps = (mask & (shifts != -mask.int().argmax(-1, keepdim=True))).any()
    # Compiled code cannot look at the mask. It takes numbers, which are right for every mask.
    return numbers * mask if torch.compiler.is_compiling() or bool(has_gaps) else mask


def padding_of(mask: Tensor | None, batch_size: int, is_causal: bool) -> Tensor | None:
    """The mask per key, (batch_size, keys) bool or numbers, or None, from the mask that reached an attention layer.

    Args:
        mask: a result of `key_mask` or of `numbered_key_mask`; or (batch or 1, 1, 1, keys) as some encoders make it,
            with bools, or with 0 for attended keys and the lowest number for others.
        batch_size: the batch size of the query.
        is_causal: whether the layer is causal. Only a mask from `key_mask` is then known to be causal too.

    Raises:
        ValueError: the mask differs between queries, holds other numbers, or has four axes and holds integers.
    """
    if mask is not None and mask.dim() == 2:
        return mask
    if mask is None and not is_causal:
        return None
    if mask is None or is_causal or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        got = "None" if mask is None else f"shape {tuple(mask.shape)}"
        raise ValueError(f"`attention_mask` must have shape (batch, keys) for offset-bias attention, got {got}")
    mask = mask[:, 0, 0]
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"`attention_mask` of four axes must be bool or additive, got {mask.dtype}")
    if mask.dtype != torch.bool:
        is_attended = mask == 0
        if not bool((is_attended | (mask <= torch.finfo(mask.dtype).min)).all()):
            raise ValueError("`attention_mask` must hold 0 or the lowest number for offset-bias attention, got others")
        mask = is_attended
    return mask.expand(batch_size, -1)


AttentionMaskInterface.register(PLAIN, key_mask)
AttentionMaskInterface.register(TABLE, key_mask)
AttentionMaskInterface.register(NUMBERED, numbered_key_mask)
AttentionMaskInterface.register(SLIDING, sliding_key_mask)
