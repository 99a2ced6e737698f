"""Attention under the masks of transformers, which the adapters share."""

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
        bias_origin: int | None = None,
        is_causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """`offset_bias_attention` under the mask that reached this layer.

        Args:
            query: (B, Hq, Lq, D).
            key: (B, Hkv, Lk, D). A causal mask may be shorter than Lk. The keys beyond its end do not exist yet.
            value: (B, Hkv, Lk, Dv).
            bias: the table, or None.
            mask: what `padding_of` takes.
            scale, dropout_p, bias_origin, is_causal, window_size: as in `offset_bias_attention`.

        Returns:
            (B, Lq, Hq * Dv).
        """
        padding = padding_of(mask, query.shape[0], is_causal)
        query_positions = key_positions = None
        if padding is not None and is_causal:
            key, value = key[:, :, : padding.shape[1]], value[:, :, : padding.shape[1]]
        if padding is not None and padding.dtype != torch.bool:
            key_positions, padding = padding, padding > 0
            # The number of a padded query is that of the last attended token before it.
            query_positions = padding.cumsum(-1)[:, -query.shape[2] :]
        return self.attention(
            query,
            key,
            value,
            bias,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
            bias_origin=bias_origin,
            window_size=window_size,
            key_padding_mask=padding,
            query_positions=query_positions,
            key_positions=key_positions,
        )


def refuse_attentions(output_attentions: object) -> None:
    """Raises NotImplementedError if attention weights are asked for, because they are never stored."""
    if output_attentions:
        raise NotImplementedError(
            "`output_attentions` must be False: offset-bias attention never stores attention weights; "
            "call `disable_offset_bias(model)` to see them"
        )
