"""The public functions: `offset_bias_attention` of a sequence that is spread over ranks, and its packed form."""

from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack  # comes with torch; typing's from Python 3.11 on

from triton_offset_bias.checks.arguments import check_flag, checked_int
from triton_offset_bias.checks.call import Options, checked_attention, checked_varlen, with_autocast
from triton_offset_bias.distributed import checking
from triton_offset_bias.distributed.collective import attend, plan_for
from triton_offset_bias.distributed.plan import Plan
from triton_offset_bias.distributed.world import Group, World
from triton_offset_bias.problem import Problem


class _SharedOptions(Options, total=False):
    group: Group
    layout: str
    method: str
    backend: str
    bias_gate: Tensor | None


class _PaddedOptions(_SharedOptions, total=False):
    lengths: tuple[int, int] | None
    query_start: int | None
    key_padding_mask: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None


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
    bias_gate: Tensor | None = None,
    group: Group = None,
    layout: str = "contiguous",
    method: str = "gather",
    lengths: tuple[int, int] | None = None,
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
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`triton_offset_bias.offset_bias_attention` of one sequence that is spread over the ranks of `group`.

    Every rank calls the function with its own part of queries, keys and values, and gets the output of its own queries.
    All ranks call in the same order, forward and backward. A rank whose loss does not depend on its output still has to
    go backward, or the others wait until the group's timeout: add ``0 * out.sum()`` to such a loss.

    Arguments that are not named here are those of the whole sequence, as in `triton_offset_bias.offset_bias_attention`.
    Offsets are those of the whole sequence.

    Args:
        query: (B, Hq, Lq / R, D), this rank's part, `shard` of the whole. R is the number of ranks.
        key: (B, Hkv, Lk / R, D), this rank's part.
        value: (B, Hkv, Lk / R, Dv), this rank's part.
        bias: the whole table, equal on all ranks. Its gradient is this rank's share. The shares of all ranks add up to
            the gradient of the sum of all ranks' losses, as the gradients of other replicated parameters do. DDP and
            FSDP over the group do the rest. Without them, add up: ``dist.all_reduce(bias.grad, group=group)``.
        bias_gate: (B, Hq, Lq / R) or (B, Hq, Lq / R, rank), this rank's part. So is its gradient.
        group: process group, or DeviceMesh; default all ranks. A mesh with the dimensions "ring" and "heads" combines
            both: ranks of a heads group trade heads as in "all_to_all", ranks of a ring group send keys by `method`.
        layout: the positions that a rank holds. "contiguous": one span. "zigzag": two spans, so that causality leaves
            all ranks the same work. Contiguous, the last rank would have 2 - 1 / R times the mean. With a window,
            "contiguous" is balanced and sends least. `positions` tells the positions. Any other arrangement takes
            `query_positions` and `key_positions`.
        method: the way in which keys come to queries. "gather": each rank collects all keys that its queries reach,
            then attends once. "ring": keys travel while a rank attends to others. It takes memory for the keys of three
            ranks. "all_to_all": ranks trade parts of the sequence for parts of the heads, whose number R must divide.
            The number of key heads may also divide R. On a mesh "all_to_all" counts as "gather".
        lengths: the whole's (Lq, Lk), where ranks do not divide them; default R times this rank's. See `spans_of`.
        dropout_p: as in one process, which drops the same weights if its seed is that of rank 0.
        key_padding_mask: (B, Lk / R) bool, this rank's part.
        query_positions: (Lq / R,) or (B, Lq / R) integers, this rank's part. Every rank then gets all keys.
        key_positions: (Lk / R,) or (B, Lk / R) integers, this rank's part.

    Returns:
        The output of this rank's queries, (B, Hq, Lq / R, Dv). With `return_lse` a pair: the output and the log-sum-exp
        in nats, (B, Hq, Lq / R), differentiable too.

    Raises:
        TypeError, ValueError, NotImplementedError: as `triton_offset_bias.offset_bias_attention` does, and for lengths
            or heads that do not fit the ranks.
        RuntimeError: another rank failed, or has other arguments.

    Source: "ring": Liu et al. 2023 (arXiv:2310.01889). "all_to_all": Jacobs et al. 2023 (arXiv:2309.14509). Both at
    once: Fang and Zhao 2024 (arXiv:2405.07719). "gather": Llama 3 (arXiv:2407.21783), section 3.3.2.
    """
    options: Options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "bias_origin": bias_origin,
        "beyond": beyond,
        "window_size": window_size,
        "deterministic": deterministic,
    }
    query, key, value = with_autocast(query, key, value)
    masks = {"key_padding_mask": key_padding_mask, "query_positions": query_positions, "key_positions": key_positions}

    def check(world: World) -> tuple[Problem, Plan]:
        checking.check_plain(query=query, key=key, value=value, bias=bias, bias_gate=bias_gate, **masks)
        problem = checked_attention(
            query, key, value, bias, query_start=None if query_positions is None else query_start,
            **masks, key_lengths=None, causal_by="position", bias_gate=bias_gate, options=_clamped(options),
        )  # fmt: skip
        whole = checking.checked_lengths(lengths, query, key, world)
        start = whole[1] - whole[0] if query_start is None else checked_int("query_start", query_start)
        return problem, plan_for(problem, world, layout, whole, start, None)

    check_flag("return_lse", return_lse)
    return attend((query, key, value), check, (group, method), backend, beyond, return_lse)


@overload
def offset_bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, return_lse: Literal[False] = ..., **options: Unpack[_SharedOptions],
) -> Tensor: ...  # fmt: skip
@overload
def offset_bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, return_lse: Literal[True], **options: Unpack[_SharedOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def offset_bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, return_lse: bool, **options: Unpack[_SharedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def offset_bias_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias_gate: Tensor | None = None,
    group: Group = None,
    layout: str = "contiguous",
    method: str = "gather",
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias_origin: int | None = None,
    beyond: str = "clamp",
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`triton_offset_bias.offset_bias_attention_varlen` of packed sequences that are spread over the ranks of `group`.

    The tokens of all sequences, one after another, are the whole that is spread. Ranks may cut sequences anywhere.

    Args:
        query: (total_q / R, Hq, D), this rank's part, `shard` of the whole along axis 0.
        key: (total_k / R, Hkv, D), this rank's part.
        value: (total_k / R, Hkv, Dv), this rank's part.
        bias: the whole table, see `offset_bias_attention` here.
        bias_gate: (total_q / R, Hq) or (total_q / R, Hq, rank), this rank's part.
        cu_seqlens_q: (B + 1,) int32 or int64, the bounds of all sequences, equal on all ranks. The numbers are read.
        cu_seqlens_k: (B + 1,) int32 or int64: the same for keys.
        max_seqlen_q: the longest query length of the whole, or more.
        max_seqlen_k: the longest key length of the whole, or more.
        group: see `offset_bias_attention` here.
        layout: likewise.
        method: likewise.
        dropout_p: above 0 it needs ``method="all_to_all"``.

    Returns:
        The output of this rank's queries, (total_q / R, Hq, Dv). With `return_lse` also the log-sum-exp,
        (Hq, total_q / R).

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `offset_bias_attention` here.
    """
    options: Options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "bias_origin": bias_origin,
        "beyond": beyond,
        "window_size": window_size,
        "deterministic": deterministic,
    }
    query, key, value = with_autocast(query, key, value)

    def check(world: World) -> tuple[Problem, Plan]:
        checking.check_plain(query=query, key=key, value=value, bias=bias, bias_gate=bias_gate)
        problem = checked_varlen(
            query, key, value, bias, cu_seqlens_q, cu_seqlens_k,
            checked_int("max_seqlen_q", max_seqlen_q), checked_int("max_seqlen_k", max_seqlen_k),
            bias_gate=bias_gate, options=_clamped(options),
        )  # fmt: skip
        bounds = checking.checked_bounds(cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        return problem, plan_for(problem, world, layout, (bounds[0][-1], bounds[1][-1]), 0, bounds)

    check_flag("return_lse", return_lse)
    tensors = _as_padded(query), _as_padded(key), _as_padded(value)
    results = attend(tensors, check, (group, method), backend, beyond, return_lse)
    if isinstance(results, Tensor):
        return results.squeeze(0).transpose(0, 1)
    out, lse = results
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


def _as_padded(x: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D); anything else is an error that the checks raise."""
    return x.transpose(0, 1).unsqueeze(0) if isinstance(x, Tensor) and x.dim() == 3 else x


def _clamped(options: Options) -> Options:
    """The options of parts: `beyond="error"` is asked of the whole."""
    return {**options, "beyond": "clamp"} if options["beyond"] == "error" else options
