"""Attention under the masks of transformers, which the adapters share."""

from typing import Any

import torch
from torch import Tensor

from triton_offset_bias.integrations.replacement import ReplacedAttention
from triton_offset_bias.integrations.transformers.masks import padding_of


class MaskedAttention(ReplacedAttention):
    """An attention that takes masks of keys."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        *,
        scale: float,
        dropout_p: float,
        bias_gate: Tensor | None = None,
        bias_origin: int | None = None,
        beyond: str = "clamp",
        is_causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """`offset_bias_attention` under the mask that reached this layer.

        Args:
            query: (B, Hq, Lq, D).
            key: (B, Hkv, Lk, D). A causal mask may be shorter than Lk. The keys beyond its end do not exist yet.
            value: (B, Hkv, Lk, Dv).
            bias: the table, or None.
            mask: what `masked_call` takes.
            scale, dropout_p, bias_gate, bias_origin, beyond, is_causal, window_size: as in `offset_bias_attention`.

        Returns:
            (B, Lq, Hq * Dv).
        """
        key, value, options = masked_call(query, key, value, mask, is_causal)
        return self.attention(
            query,
            key,
            value,
            bias,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            bias_gate=bias_gate,
            bias_origin=bias_origin,
            beyond=beyond,
            window_size=window_size,
            **options,
        )


def masked_call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The keys and values that exist, and the options of the attention under a mask.

    Args:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lk, D).
        value: (B, Hkv, Lk, Dv).
        mask: what `padding_of` takes, or the bounds of packed sequences, (sequences + 1,) int32.
        is_causal: whether a query attends to earlier keys alone.

    Returns:
        key, value, and options of `offset_bias_attention`; or `bounds` for `packed_attention`.
    """
    options: dict[str, Any] = {"enable_gqa": key.shape[1] != query.shape[1]}
    if mask is not None and mask.dim() == 1:
        return key, value, options | {"bounds": mask}
    padding = padding_of(mask, query.shape[0], is_causal)
    if padding is None:
        return key, value, options
    if is_causal:
        key, value = key[:, :, : padding.shape[1]], value[:, :, : padding.shape[1]]
    if padding.dtype != torch.bool:
        options["key_positions"], padding = padding, padding > 0
        # The number of a padded query is that of the last attended token before it.
        options["query_positions"] = padding.cumsum(-1)[:, -query.shape[2] :]
    return key, value, options | {"key_padding_mask": padding}


def refuse_attentions(output_attentions: object) -> None:
    """Raises NotImplementedError if attention weights are asked for, because they are never stored."""
    if output_attentions:
        raise NotImplementedError(
            "`output_attentions` must be False: offset-bias attention never stores attention weights; "
            "call `disable_offset_bias(model)` to see them"
        )
