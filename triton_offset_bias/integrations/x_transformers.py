"""x-transformers: its encoders and decoders with any bias module of this package, in O(L) memory."""

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import softmax
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention, AttentionLayers

from triton_offset_bias.functional import offset_bias_attention


class TableAttend(Attend):
    """x-transformers' `Attend`, whose `attn_bias` is a table, (H, len_q + len_k - 1), instead of (H, len_q, len_k)."""

    def flash_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        flash_pack_seq_kwargs: dict | None = None,
        causal: bool | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Attention with a table.

        Args:
            q: (B, H, len_q, D).
            k, v: (B, Hkv, len_k, D), or (B, len_k, D) for one head that all queries share.
            mask: (B or 1, 1, 1, len_k) bool, True = attend, or None.
            attn_bias: the table, (H, len_q + len_k - 1), from offset ``1 - len_q`` on; or None.
            flash_pack_seq_kwargs: not used; `use_offset_bias` refuses layers that pack sequences.
            causal: not used; the layer knows.

        Returns:
            (B, H, len_q, D), and no intermediate results.

        Raises:
            ValueError: `mask` says something else of different queries, or there is not one column per offset.
        """
        columns = q.shape[2] + k.shape[-2] - 1
        if attn_bias is not None and attn_bias.shape[-1] != columns:
            raise ValueError(
                f"`attn_bias` must have {columns} columns for {q.shape[2]} queries and {k.shape[-2]} keys, "
                f"got shape {tuple(attn_bias.shape)}"
            )
        if mask is not None and mask.shape[1:3] != (1, 1):
            raise ValueError(f"`mask` must mask keys alone, (B, 1, 1, len_k), got shape {tuple(mask.shape)}")
        k, v = (x.unsqueeze(1) if x.dim() == 3 else x for x in (k, v))
        out = offset_bias_attention(
            q,
            k,
            v,
            attn_bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=True,
            bias_origin=q.shape[2] - 1,
            key_padding_mask=None if mask is None else mask[:, 0, 0].expand(q.shape[0], -1),
        )
        return out, Intermediates()


class RelativePositionTable(nn.Module):
    """Stands for x-transformers' `rel_pos`, with the parameter under its name there.

    Args:
        bias: gives a table, ``bias(min_offset, max_offset) -> (H, offsets)``.
        scale: factor on the table.
    """

    def __init__(self, bias: nn.Module, scale: float) -> None:
        super().__init__()
        self.relative_attention_bias = bias
        self.scale = scale

    def forward(self, len_q: int, len_k: int) -> Tensor:
        """(H, len_q + len_k - 1), from offset ``1 - len_q`` on."""
        return self.scale * self.relative_attention_bias(1 - len_q, len_k - 1)


def use_offset_bias(layers: AttentionLayers, bias: nn.Module, scale: float = 1.0) -> None:
    """Makes an Encoder or a Decoder attend through `offset_bias_attention`, with a bias module as its `rel_pos`.

    Key padding masks, key and value heads that queries share, dropout and decoding with a cache work as before. As in
    x-transformers' own flash attention, ``layers(x, causal=...)`` has no effect.

    Args:
        layers: built with ``attn_flash=True``, for plain softmax attention without a position bias of its own.
        bias: such as `T5Bias` (``rel_pos_bias=True`` in x-transformers) or `ALiBiBias` (``alibi_pos_bias=True``).
        scale: factor on its table; x-transformers multiplies that of ``rel_pos_bias`` by ``dim_head ** 0.5``.

    Raises:
        TypeError: `layers` is no Encoder, Decoder or CrossAttender, but for example a whole TransformerWrapper.
        ValueError: the layers are built in another way, have a position bias, as after a first call of this, or have
            memory keys, which are at no position.
    """
    if not isinstance(layers, AttentionLayers):
        raise TypeError(f"`layers` must be an Encoder or a Decoder of x-transformers, got {type(layers).__name__}")
    if layers.rel_pos is not None:
        raise ValueError(f"`layers` must have no position bias of their own, got {type(layers.rel_pos).__name__}")
    for module in layers.modules():
        if isinstance(module, Attention) and (module.num_mem_kv or module.attend.add_zero_kv):
            raise ValueError("`layers` must have no memory keys and values, for these are at no position")
        if isinstance(module, Attend) and not _is_plain(module):
            raise ValueError("`layers` must attend by a plain softmax, unpacked, and be built with attn_flash=True")
    for module in layers.modules():
        if isinstance(module, Attend):
            module.__class__ = TableAttend
    layers.rel_pos = RelativePositionTable(bias, scale)


def _is_plain(attend: Attend) -> bool:
    """Whether it is softmax attention by x-transformers' flash path, which ignores or refuses everything else."""
    is_softmax = isinstance(attend.attn_fn, partial) and attend.attn_fn.func is softmax
    return is_softmax and attend.flash and not (attend.flash_pack_seq or attend.l2_distance)
