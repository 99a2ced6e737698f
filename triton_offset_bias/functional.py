"""The two public functions."""

from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack  # comes with torch; typing's from Python 3.11 on

from triton_offset_bias import ops
from triton_offset_bias.checks.arguments import check_flag, checked_length
from triton_offset_bias.checks.call import Options, checked_attention, checked_varlen, with_autocast
from triton_offset_bias.checks.tensors import check_sink
from triton_offset_bias.dispatch import select_backend
from triton_offset_bias.sink import with_sink


# All keywords but `return_lse`. The overloads would otherwise repeat them three times.
class _SharedOptions(Options, total=False):
    bias_gate: Tensor | None
    sink: Tensor | None
    backend: str


class _PaddedOptions(_SharedOptions, total=False):
    query_start: int | None
    key_padding_mask: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    key_lengths: Tensor | None
    causal_by: str


@overload
def offset_bias_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    *, return_lse: Literal[False] = ..., **options: Unpack[_PaddedOptions],
) -> Tensor: ...  # fmt: skip
@overload
def offset_bias_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    *, return_lse: Literal[True], **options: Unpack[_PaddedOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def offset_bias_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    *, return_lse: bool, **options: Unpack[_PaddedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def offset_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias_origin: int | None = None,
    beyond: str = "clamp",
    query_start: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    key_padding_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    bias_gate: Tensor | None = None,
    sink: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_by: str = "position",
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact attention with a learnable bias per query-key offset, in O(Lq + Lk) memory, forward and backward.

    The pair of query i and key j has ``offset = i - j``, where i counts from ``query_start`` and j from 0:

        S[b,h,i,j] = scale * <query[b,h,i], key[b,h,j]> + bias[h, offset]        out = softmax(S) @ value

    With a gate the bias has a factor from the query, ``sum over r of bias_gate[b,h,i,r] * bias[h, r, offset]``.

    A query with no key to attend to gives output 0, log-sum-exp -inf and zero gradients, whatever its incoming
    gradients are. Elsewhere NaN and +inf are never hidden. A row with NaN or +inf among its attended scores has a NaN
    output and log-sum-exp. A NaN or infinity in an attended value reaches the output. Neither reaches another head or
    sequence. Keys and values that are masked for a row must be finite, because 0 * NaN is NaN: a NaN in them may reach
    the row.

    Args:
        query: (B, Hq, Lq, D), float16, bfloat16, float32 or float64. Any strides.
        key: (B, Hkv, Lk, D), dtype and device of `query`.
        value: (B, Hkv, Lk, Dv), dtype and device of `query`.
        bias: (N,), (H, N) or (B, H, N) with H in {1, Hq}: the table, one column per offset, in nats (natural log
            units), of any float dtype. The table is used in float32 (float64 when `query` is float64), and its gradient
            is accumulated in the same dtype. -inf forbids its offset. None: attention without a bias.
        dropout_p: probability of dropping an attention weight, as in SDPA.
        is_causal: attend only where offset >= 0. With the default `query_start` this is bottom-right aligned.
        scale: factor on the dot products; default ``D ** -0.5``. It may be 0 or negative.
        enable_gqa: allow Hkv to be a divisor of Hq; head h of `query` then uses head ``h // (Hq // Hkv)`` of `key`.
        bias_origin: column of `bias` that holds offset 0; default ``(N - 1) // 2``, as in a symmetric table. It may lie
            outside the table.
        beyond: the bias of offsets outside the table. "clamp" gives them the number at the table's nearest end. "zero"
            gives them no bias. "error" raises if any such offset is attended to.
        query_start: position of query 0 counted from key 0; default ``Lk - Lq``: the last query is on the last key.
        window_size: (left, right), as in flash-attn: attend only where -right <= offset <= left; -1 sets no limit.
        key_padding_mask: (B, Lk) bool, True = attend.
        query_positions: (Lq,) or (B, Lq) integers. The offset is then ``query_positions[i] - key_positions[j]``. With
            positions a GPU computes every tile of scores, even if causality or a window masks the whole tile. The CPU
            engine skips such tiles if the positions are contiguous. For contiguous positions, pass ``query_start``
            instead.
        key_positions: (Lk,) or (B, Lk) integers.
        bias_gate: (B, Hq, Lq): query i of a head multiplies the numbers of the table by ``bias_gate[b, h, i]``. Or
            (B, Hq, Lq, R), with `bias` of shape (R, N), (H, R, N) or (B, H, R, N): the bias of a pair is the sum over r
            of ``bias_gate[b, h, i, r]`` times the number of table r. It is used in the table's dtype, may have any
            float dtype, and is differentiable. Gate and table must be finite, because 0 * inf is NaN.
        sink: (Hq,) or (B, Hq), finite, of any float dtype: a logit in nats that takes part in the softmax's sum of each
            row and has no value, as in GPT-OSS. Differentiable. A query with no key then still has output 0, and its
            log-sum-exp is the sink.
        key_lengths: (B,) int32 or int64, from 0 to Lk. Sequence b attends only to its first ``key_lengths[b]`` keys,
            and its last query lies on the last of them, as with flash-attn's ``cache_seqlens``. Other keys and values
            may hold any numbers, NaN included. Their gradients are 0. A GPU call does not wait for the lengths. A
            length out of range then counts as the nearest length in range. ``beyond="error"`` is checked as if every
            sequence had Lk keys. `key_lengths` cannot be combined with `query_start` or positions.
        causal_by: the numbers that `is_causal` compares. "position": the positions, so tokens with one position see
            each other. "index": the places in the tensors, whatever the positions are; query i attends to the keys up
            to ``Lk - Lq + i``. Use it where several tokens share a position, such as events in one bucket of time: by
            position the earlier of them would see the later ones. Both are the same without positions.
        deterministic: whether repeated runs give bitwise equal gradients. None follows
            ``torch.are_deterministic_algorithms_enabled()``. The CPU engine is always deterministic. On a GPU,
            determinism costs two more matrix products in the backward pass. Without it the table's gradient may
            differ from run to run by rounding; all other results are equal.
        return_lse: also return the log-sum-exp of every row of scores.
        backend: "auto", "triton", "cpp" or "reference". "auto" takes the first of "cpp", "triton" and "reference" that
            can serve the call, and shows a `DenseFallbackWarning` where this is "reference". A named backend serves the
            call or raises an error.

    Returns:
        The output, (B, Hq, Lq, Dv), in `query`'s dtype (the autocast dtype under autocast). With `return_lse` a pair:
        the output, and the log-sum-exp in nats, (B, Hq, Lq), float32 (float64 for float64 input), differentiable too.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value; or `beyond` is "error" and an attended offset lies
            outside the table.
        NotImplementedError: the backend cannot serve this call; the message lists the reasons.

    Source:
        Shaw et al. 2018, "Self-Attention with Relative Position Representations" (arXiv:1803.02155); Raffel et al. 2020
        (T5, arXiv:1910.10683), section 2.1, for a scalar per offset; Dao 2023, "FlashAttention-2" (arXiv:2307.08691),
        algorithms 1 and 2, for the tiling. The gate: Chen et al. 2022 (WavLM, arXiv:2110.13900), equation 3; Dai et
        al. 2019 (Transformer-XL, arXiv:1901.02860), section 3.3, for one of rank D. The sink: Xiao et al. 2024
        (arXiv:2309.17453), equation 2.
    """
    query, key, value = with_autocast(query, key, value)
    problem = checked_attention(
        query,
        key,
        value,
        bias,
        query_start=query_start,
        key_padding_mask=key_padding_mask,
        query_positions=query_positions,
        key_positions=key_positions,
        bias_gate=bias_gate,
        key_lengths=key_lengths,
        causal_by=causal_by,
        options={
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "bias_origin": bias_origin,
            "beyond": beyond,
            "window_size": window_size,
            "deterministic": deterministic,
        },
    )
    check_flag("return_lse", return_lse)
    if sink is not None:
        check_sink(sink, query, problem.num_sequences, query.shape[1])
    out, lse = ops.attention(problem, select_backend(problem, backend))
    if sink is not None:
        out, lse = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


@overload
def offset_bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    *, return_lse: Literal[False] = ..., **options: Unpack[_SharedOptions],
) -> Tensor: ...  # fmt: skip
@overload
def offset_bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    *, return_lse: Literal[True], **options: Unpack[_SharedOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def offset_bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor,
    *, return_lse: bool, **options: Unpack[_SharedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def offset_bias_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias_origin: int | None = None,
    beyond: str = "clamp",
    window_size: tuple[int, int] = (-1, -1),
    bias_gate: Tensor | None = None,
    sink: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`offset_bias_attention` over sequences of different lengths packed one after another (flash-attn's convention).

    Sequence s has the queries ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` and the keys ``cu_seqlens_k[s]`` to
    ``cu_seqlens_k[s + 1]``. Queries attend only to keys of their own sequence. Each sequence counts positions from its
    own first key, and its last query lies on its last key.

    Args:
        query: (total_q, Hq, D).
        key: (total_k, Hkv, D).
        value: (total_k, Hkv, Dv).
        bias: (N,), (H, N) or (B, H, N) with B the number of sequences; see `offset_bias_attention`.
        cu_seqlens_q: (B + 1,) int32 or int64: 0, then the running sum of the sequences' query lengths.
        cu_seqlens_k: (B + 1,) int32 or int64: the same for keys.
        max_seqlen_q: the longest query length, or more: an int, or a tensor with one integer such as ``lengths.max()``.
            The call reads the integer in a tensor. On a GPU it waits for the device. Under `torch.compile` the graph
            breaks there, unless ``fullgraph=True`` or ``torch._dynamo.config.capture_scalar_outputs`` is set.
        max_seqlen_k: the longest key length, or more: an int or a tensor, as `max_seqlen_q`.
        bias_gate: (total_q, Hq), or (total_q, Hq, R) with `bias` of shape (R, N), (H, R, N) or (B, H, R, N).
        sink: (Hq,), or (B, Hq) with B the number of sequences.
        return_lse: also return the log-sum-exp, (Hq, total_q).

    `offset_bias_attention` documents the other keywords.

    Returns:
        The output, (total_q, Hq, Dv); with `return_lse` a pair, see `offset_bias_attention`.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `offset_bias_attention`.
    """
    # Lengths come first. Compiled code may break its graph here, and then keeps nothing but the caller's tensors.
    longest_q, longest_k = checked_length("max_seqlen_q", max_seqlen_q), checked_length("max_seqlen_k", max_seqlen_k)
    query, key, value = with_autocast(query, key, value)
    problem = checked_varlen(
        query,
        key,
        value,
        bias,
        cu_seqlens_q,
        cu_seqlens_k,
        longest_q,
        longest_k,
        bias_gate=bias_gate,
        options={
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "bias_origin": bias_origin,
            "beyond": beyond,
            "window_size": window_size,
            "deterministic": deterministic,
        },
    )
    check_flag("return_lse", return_lse)
    if sink is not None:
        check_sink(sink, query, problem.num_sequences, query.shape[1])
    out, lse = ops.attention(problem, select_backend(problem, backend))
    if sink is not None:
        out, lse = with_sink(out, lse, sink, cu_seqlens_q)
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out
