"""Runs encoders and decoders of x-transformers with any bias module of this package, in O(L) memory."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softmax
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import AlibiPositionalBias, Attention, AttentionLayers

from triton_offset_bias.checks.arguments import INTEGERS, shape
from triton_offset_bias.functional import offset_bias_attention

ASTRAY = "`Attend` must run through triton_offset_bias, as `use_offset_bias` has set it up, got a `forward` that uses"


class OffsetTable:
    """The bias that `RelativePositionTable` gives. Only `TableAttend` can read it. Any other attention raises.

    Args:
        table: (H, offsets).
        origin: the column of offset 0.
        positions: (len_k,) or (B, len_k) integers: where the keys lie. The queries lie on the last of them. None:
            positions count up by one.
    """

    def __init__(self, table: Tensor, origin: int, positions: Tensor | None = None) -> None:
        self.table = table
        self.origin = origin
        self.positions = positions

    @classmethod
    def __torch_function__(cls, func: Callable, types: object, args: tuple = (), kwargs: object = None) -> object:
        """Returns the table where `Attention` pads it by 0 memory keys. Any other use raises TypeError."""
        if func is pad and not any(args[1]):
            return args[0]
        raise TypeError(f"{ASTRAY} the table of offsets in `{getattr(func, '__name__', func)}`")

    def __getattr__(self, name: str) -> object:
        """Raises AttributeError for any attribute that another attention asks a tensor for."""
        raise AttributeError(f"{ASTRAY} `{name}` of the table of offsets")


class TableAttend(Attend):
    """x-transformers' `Attend`, with an `OffsetTable` as its `attn_bias` instead of a tensor (H, len_q, len_k)."""

    def flash_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: OffsetTable | None = None,
        flash_pack_seq_kwargs: dict | None = None,
        causal: bool | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Attends with a table.

        Args:
            q: (B, H, len_q, D).
            k, v: (B, Hkv, len_k, D), or (B, len_k, D) if all query heads share one head.
            mask: (B or 1, 1, 1, len_k) bool, True = attend, or None.
            attn_bias: the table, or None.
            flash_pack_seq_kwargs, causal: not used. Packed layers are refused, and a layer knows whether it is causal.

        Returns:
            (B, H, len_q, D), and no intermediate results.

        Raises:
            TypeError: `attn_bias` is no table.
            ValueError: `mask` differs between queries; the table does not have one column per offset; there is not one
                position per key; or positions do not rise in causal attention.
        """
        if mask is not None and mask.shape[1:3] != (1, 1):
            raise ValueError(f"`mask` must mask keys alone, (B, 1, 1, len_k), got shape {shape(mask)}")
        k, v = (x.unsqueeze(1) if x.dim() == 3 else x for x in (k, v))
        table, origin, positions = (None, None, None) if attn_bias is None else self._read(attn_bias, q, k)
        out = offset_bias_attention(
            q,
            k,
            v,
            table,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=True,
            bias_origin=origin,
            key_padding_mask=None if mask is None else mask[:, 0, 0].expand(q.shape[0], -1),
            query_positions=None if positions is None else positions[..., -q.shape[2] :],
            key_positions=positions,
        )
        return out, Intermediates()

    def _read(self, attn_bias: OffsetTable, q: Tensor, k: Tensor) -> tuple[Tensor, int, Tensor | None]:
        """The table, its origin and the positions on the queries' device, checked against queries and keys."""
        if not isinstance(attn_bias, OffsetTable):
            raise TypeError(f"`attn_bias` must be the table of `use_offset_bias`, got {type(attn_bias).__name__}")
        table, positions = attn_bias.table.to(q.device), attn_bias.positions
        len_q, len_k = q.shape[2], k.shape[2]
        if positions is None:
            if table.shape[-1] != len_q + len_k - 1:
                raise ValueError(
                    f"`attn_bias` must have {len_q + len_k - 1} columns for {len_q} queries and {len_k} keys, "
                    f"got shape {shape(table)}"
                )
            return table, attn_bias.origin, None
        if positions.shape[-1] != len_k:
            raise ValueError(f"`pos` must have a position for each of {len_k} keys, got shape {shape(positions)}")
        if self.causal and not bool((positions.diff(dim=-1) > 0).all()):
            raise ValueError("`pos` must rise from token to token in a Decoder, got positions that do not")
        return table, attn_bias.origin, positions.to(q.device)


class RelativePositionTable(AlibiPositionalBias):
    """A module that takes the place of x-transformers' `rel_pos`. Its parameters have the names that they have there.

    It derives from ALiBi's class, because x-transformers allows custom positions only with ALiBi. It has nothing else
    in common with ALiBi.

    Args:
        bias: a module that gives a table, ``bias(min_offset, max_offset) -> (H, offsets)``.
        scale: factor on the table.
    """

    def __init__(self, bias: nn.Module, scale: float) -> None:
        nn.Module.__init__(self)
        self.relative_attention_bias = bias
        self.scale = scale

    def forward(self, len_q: int, len_k: int) -> OffsetTable:
        """The table for `len_q` queries and `len_k` keys. The last query lies on the last key."""
        return OffsetTable(self.scale * self.relative_attention_bias(1 - len_q, len_k - 1), len_q - 1)

    def forward_custom_pos(self, pos_i: Tensor) -> OffsetTable:
        """The table for tokens at the positions `pos_i`, (L,) or (B, L) integers.

        The table has a column for each offset within the positions' span. On a GPU the call waits for the device to
        read the positions.

        Raises:
            TypeError: `pos_i` holds no integers.
            ValueError: `pos_i` has another shape.
        """
        if pos_i.dtype not in INTEGERS:
            raise TypeError(f"`pos` must hold integers, got {pos_i.dtype}")
        if pos_i.dim() not in (1, 2) or pos_i.numel() == 0:
            raise ValueError(f"`pos` must have shape (L,) or (B, L), got shape {shape(pos_i)}")
        span = int(pos_i.max() - pos_i.min())
        return OffsetTable(self.scale * self.relative_attention_bias(-span, span), span, pos_i)


def use_offset_bias(layers: AttentionLayers, bias: nn.Module, scale: float = 1.0) -> None:
    """Makes an Encoder or a Decoder attend through `offset_bias_attention`, with a bias module as its `rel_pos`.

    Key padding masks, grouped key and value heads, rotary and polar embeddings, dropout and decoding with a cache work
    as before. So do the positions of ``layers(x, pos=...)``; in a Decoder they must rise. As in x-transformers' own
    flash attention, ``layers(x, causal=...)`` has no effect. Wrappers around the `forward` of a module stay, whether
    they come before this call or after it. If a wrapper leads a call past `TableAttend`, the call raises.

    Args:
        layers: built with ``attn_flash=True``, for plain softmax attention without a position bias of its own.
        bias: such as `T5Bias` (``rel_pos_bias=True`` in x-transformers) or `ALiBiBias` (``alibi_pos_bias=True``).
        scale: factor on the bias's table. For ``rel_pos_bias``, x-transformers has a factor of ``dim_head ** 0.5``.

    Raises:
        TypeError: `layers` is no Encoder, Decoder or CrossAttender, but for example a whole TransformerWrapper.
        ValueError: the layers are built in another way; or they have a position bias, for example from an earlier call
            of this function; or they have memory keys, which have no position; or one of them attends by code of its
            own.
    """
    if not isinstance(layers, AttentionLayers):
        raise TypeError(f"`layers` must be an Encoder or a Decoder of x-transformers, got {type(layers).__name__}")
    if layers.rel_pos is not None:
        raise ValueError(f"`layers` must have no position bias of their own, got {type(layers.rel_pos).__name__}")
    for name, module in layers.named_modules():
        if isinstance(module, Attention):
            _check_attention(module)
        elif isinstance(module, Attend):
            _check_attend(name, module)
    attends = {name: module for name, module in layers.named_modules() if isinstance(module, Attend)}
    for attend in attends.values():
        attend.__class__ = TableAttend
    astray = [name for name, attend in attends.items() if not _reaches_the_table(attend)]
    if astray:
        for attend in attends.values():
            attend.__class__ = Attend
        raise ValueError(f"`layers` must attend by x-transformers' own `Attend.forward`, got another in {astray[0]}")
    layers.rel_pos = RelativePositionTable(bias, scale)
    layers.register_forward_pre_hook(_with_embeddings, with_kwargs=True)


def _check_attention(attention: Attention) -> None:
    if attention.num_mem_kv:
        raise ValueError("`layers` must have no memory keys and values, because these have no position")
    if attention.data_dependent_alibi is not None or attention.rel_proj_pos_bias is not None:
        raise ValueError("`layers` must have no bias that depends on the content")
    if attention.max_attend_past is not None:
        raise ValueError(f"`layers` must attend to all keys, got max_attend_past={attention.max_attend_past}")


def _check_attend(name: str, attend: Attend) -> None:
    if attend.add_zero_kv:
        raise ValueError("`layers` must have no memory keys and values, because these have no position")
    if type(attend) is not Attend or "flash_attn" in vars(attend):
        raise ValueError(f"`layers` must attend by x-transformers' own `Attend`, got another in {name}")
    # x-transformers' flash path ignores or refuses everything else.
    is_softmax = isinstance(attend.attn_fn, partial) and attend.attn_fn.func is softmax
    if not is_softmax or not attend.flash or attend.flash_pack_seq or attend.l2_distance:
        raise ValueError("`layers` must attend by a plain softmax, unpacked, and must be built with attn_flash=True")


class _Reached(Exception):
    """Raised when `TableAttend` asks a `_Probe` for its table."""


class _Probe(OffsetTable):
    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        raise _Reached if name == "table" else AttributeError(name)


def _reaches_the_table(attend: Attend) -> bool:
    """Whether a call of the module reaches the `forward` of its class, also if hooks have put one on the module."""
    if "forward" in vars(attend):
        try:
            attend(*torch.zeros(3, 1, 1, 1, 1), attn_bias=_Probe())
        except Exception as error:
            return isinstance(error, _Reached)
    return "forward" not in vars(attend)


def _with_embeddings(layers: AttentionLayers, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Adds, before a call without `pos`, the rotary or polar embeddings that `layers` would make.

    If `layers` made them, it would also hand its positions to `rel_pos`. They count up by one, but `rel_pos` cannot
    know that.
    """
    if len(args) > 1 or kwargs.get("pos") is not None:
        return None
    x, cache, mems = args[0] if args else kwargs["x"], kwargs.get("cache"), kwargs.get("mems")
    first = kwargs.get("seq_pos_offset")
    if first is None:
        first = 0 if cache is None else cache.cache_length
    for name in ("rotary_pos_emb", "polar_pos_emb"):
        embedding = getattr(layers, name)
        if embedding is not None and kwargs.get(name) is None:
            memory = mems[0].shape[1] if mems and mems[0] is not None and name == "rotary_pos_emb" else 0
            positions = torch.arange(-memory, x.shape[1] + first, device=x.device)
            kwargs = {**kwargs, name: embedding(positions)}
    return args, kwargs
