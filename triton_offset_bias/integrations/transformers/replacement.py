"""What all adapters share: how a class takes another's place, and how its attention is called."""

import torch
from torch import Tensor

from triton_offset_bias.functional import offset_bias_attention
from triton_offset_bias.integrations.transformers.masks import padding_of


class Replacement:
    """Base of the classes that instances of a model's own classes are turned into.

    The last base of such a class is the class it replaces. It adds no parameters, buffers or submodules, so that an
    instance changes its class, and changes it back, without any change of its state.

    Attributes:
        offset_bias_backend: the backend that `offset_bias_attention` is asked for.
    """

    offset_bias_backend: str

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
            key: (B, Hkv, Lk, D); a causal mask may be shorter than this, then later keys do not exist yet.
            value: (B, Hkv, Lk, Dv).
            bias: the table, or None.
            mask: what `padding_of` takes.
            scale, dropout_p, bias_origin, is_causal, window_size: as in `offset_bias_attention`.

        Returns:
            (B, Lq, Hq * Dv).
        """
        padding = padding_of(mask, query.shape[0], is_causal)
        if padding is not None and is_causal:
            key, value = key[:, :, : padding.shape[1]], value[:, :, : padding.shape[1]]
        numbers = None
        if padding is not None and padding.dtype != torch.bool:
            numbers, padding = padding, padding >= 0
        out = offset_bias_attention(
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
            # A padded query counts as the last attended token before it.
            query_positions=None if numbers is None else numbers.cummax(-1).values[:, -query.shape[2] :],
            key_positions=numbers,
            backend=self.offset_bias_backend,
        )
        return out.transpose(1, 2).flatten(2)


def refuse_attentions(output_attentions: object) -> None:
    """Raises NotImplementedError if attention weights are asked for: they are never stored."""
    if output_attentions:
        raise NotImplementedError(
            "`output_attentions` must be False: offset-bias attention never stores attention weights; "
            "call `disable_offset_bias(model)` to see them"
        )
