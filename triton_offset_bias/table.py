"""The layout of a bias table: the column of every offset, for all code but the kernels.

A table is a tensor whose last axis has one column per offset. `origin` is the column of offset 0, so offset `o` lives
in column `o + origin`. `beyond` decides the bias of offsets outside of the table: the number at the table's nearest end
("clamp"), 0 ("zero"), or an error, which `check_reach` raises ("error").
"""

import torch
from torch import Tensor

BEYOND = ("clamp", "zero", "error")
CAUSAL_BY = ("position", "index")

# Offsets are bounded by tensor lengths, so this is out of reach and still far from the ends of int64.
UNLIMITED = 2**61


def default_origin(num_columns: int) -> int:
    """The column of offset 0 in a symmetric table."""
    return (num_columns - 1) // 2


def reachable_offsets(len_q: int, len_k: int, query_start: int) -> tuple[int, int]:
    """The smallest and the largest offset between any query and any key of contiguous positions."""
    return query_start - (len_k - 1), query_start + len_q - 1


def attended_interval(is_causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """The offsets that `is_causal` and `window_size` allow, as one closed interval."""
    left, right = window_size
    min_offset = -UNLIMITED if right < 0 else -right
    max_offset = UNLIMITED if left < 0 else left
    return (max(min_offset, 0) if is_causal else min_offset), max_offset


def attended_interval_by(
    is_causal: bool, causal_by: str, window_size: tuple[int, int], has_positions: bool
) -> tuple[int, int, bool]:
    """`attended_interval`, and whether causality goes by the indices, from which only positions differ."""
    is_by_index = is_causal and causal_by == "index" and has_positions
    return *attended_interval(is_causal and not is_by_index, window_size), is_by_index


def per_offset(bias: Tensor, lo: int, hi: int, origin: int) -> Tensor:
    """The clamped table's value at every offset from `lo` to `hi`, both included: (..., hi - lo + 1). Differentiable.

    One look-up: no branch depends on the range, which tracing may not know.
    """
    columns = torch.arange(lo + origin, hi + origin + 1, device=bias.device)
    return bias[..., columns.clamp(0, bias.shape[-1] - 1)]


def dense_offsets(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The offset of every pair: (Lq,) and (Lk,) give (Lq, Lk); a batch axis on either is kept."""
    return query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)


def dense_bias(bias: Tensor, offsets: Tensor, origin: int, beyond: str) -> Tensor:
    """The bias of every pair: a (B or 1, H, N) table at (Lq, Lk) or (B, Lq, Lk) offsets gives (B or 1, H, Lq, Lk)."""
    columns = offsets + origin
    inside = (columns >= 0) & (columns < bias.shape[-1])
    columns = columns.clamp(0, bias.shape[-1] - 1)
    if offsets.dim() == 2:
        dense = bias[..., columns]
    else:
        batch, len_q, len_k = offsets.shape
        rows = bias.expand(batch, *bias.shape[1:])
        index = columns.reshape(batch, 1, len_q * len_k).expand(-1, bias.shape[1], -1)
        dense = rows.gather(-1, index).view(batch, bias.shape[1], len_q, len_k)
        inside = inside.unsqueeze(1)
    return dense.where(inside, 0.0) if beyond == "zero" else dense


def dense_gated_bias(bias: Tensor, gate: Tensor, offsets: Tensor, origin: int, beyond: str) -> Tensor:
    """The bias of every pair: (B or 1, H, R, N) tables and a (B, H, Lq, R) gate give (B, H, Lq, Lk).

    Offsets are (Lq, Lk) or (B, Lq, Lk). Every query sees a table of its own, gate @ bias.
    """
    columns = offsets + origin
    inside = (columns >= 0) & (columns < bias.shape[-1])
    columns = columns.clamp(0, bias.shape[-1] - 1)
    columns, inside = (x if x.dim() == 2 else x.unsqueeze(1) for x in (columns, inside))
    dense = (gate @ bias).gather(-1, columns.expand(*gate.shape[:3], columns.shape[-1]))
    return dense.where(inside, 0.0) if beyond == "zero" else dense


def columns_seen(num_columns: int, origin: int, lowest: int, highest: int) -> tuple[int, int]:
    """The first column that the offsets [lowest, highest] see, and the column behind the last: at least one column."""
    first, last = (min(max(offset + origin, 0), num_columns - 1) for offset in (lowest, max(lowest, highest)))
    return first, last + 1


def exact_constants(bias: Tensor) -> Tensor:
    """The constant that each row of a table may be counted from, (..., 1): its finite number of least magnitude, or 0.

    It is 0 unless all finite numbers of the row have one sign and lie within a factor of 2 of one another. The
    subtraction is then exact (Sterbenz 1974). Scores keep the digits that a large bias would take from them.
    """
    is_finite = bias.isfinite()
    low = bias.masked_fill(~is_finite, float("inf")).amin(-1, keepdim=True)
    high = bias.masked_fill(~is_finite, float("-inf")).amax(-1, keepdim=True)
    is_above, is_below = (low > 0) & (low <= high) & (high <= 2 * low), (high < 0) & (low <= high) & (low >= 2 * high)
    return torch.where(is_above, low, torch.where(is_below, high, 0.0))


def check_reach(num_columns: int, origin: int, lowest: int, highest: int) -> None:
    """Raises if the attended offsets [lowest, highest] leave the table, as `beyond="error"` asks."""
    first, last = -origin, num_columns - 1 - origin
    if lowest < first or highest > last:
        raise ValueError(
            f"`bias` must cover every attended offset when beyond='error': it holds offsets {first} to {last}, "
            f"but offsets {lowest} to {highest} are attended to"
        )


def attended_extremes(
    key_padding_mask: Tensor, len_q: int, query_start: int, min_offset: int, max_offset: int
) -> tuple[int, int] | None:
    """The smallest and largest offset that some query attends to under a (B, Lk) mask; None if there is none."""
    keys = torch.arange(key_padding_mask.shape[-1], device=key_padding_mask.device)
    lowest = (query_start - keys).clamp(min=min_offset)
    highest = (query_start + len_q - 1 - keys).clamp(max=max_offset)
    used = key_padding_mask.any(0) & (lowest <= highest)
    if not bool(used.any()):
        return None
    return int(lowest[used].min()), int(highest[used].max())


def attended_extremes_of_positions(
    query_positions: Tensor, key_positions: Tensor, key_padding_mask: Tensor | None, min_offset: int, max_offset: int
) -> tuple[int, int] | None:
    """`attended_extremes` for (Lq,) or (B, Lq) and (Lk,) or (B, Lk) int64 positions."""
    queries, keys = query_positions, key_positions
    if key_padding_mask is not None:
        keys = keys.expand(key_padding_mask.shape)
    if queries.dim() == 2 or keys.dim() == 2:
        batch = max(x.shape[0] for x in (queries, keys) if x.dim() == 2)
        queries, keys = (x.expand(batch, x.shape[-1]).contiguous() for x in (queries, keys))
    queries = queries.sort().values
    # The first and the last of the sorted queries that may attend to a key, for every key.
    first = torch.searchsorted(queries, keys + min_offset)
    last = torch.searchsorted(queries, keys + max_offset, right=True) - 1
    used = first <= last
    if key_padding_mask is not None:
        used = used & key_padding_mask
    if not bool(used.any()):
        return None
    lowest = queries.gather(-1, first.clamp(max=queries.shape[-1] - 1)) - keys
    highest = queries.gather(-1, last.clamp(min=0)) - keys
    return int(lowest[used].min()), int(highest[used].max())


def attended_extremes_by_index(
    query_positions: Tensor,
    key_positions: Tensor,
    key_padding_mask: Tensor | None,
    query_start: int,
    min_offset: int,
    max_offset: int,
) -> tuple[int, int] | None:
    """`attended_extremes_of_positions` where query i attends to no key behind index query_start + i.

    Looks at the pairs of one query after the other, in O(Lk) memory.
    """
    extremes: list[int] = []
    for i in range(query_positions.shape[-1]):
        last = min(query_start + i + 1, key_positions.shape[-1])
        if last <= 0:
            continue
        offsets = query_positions[..., i : i + 1] - key_positions[..., :last]
        used = (offsets >= min_offset) & (offsets <= max_offset)
        if key_padding_mask is not None:
            used = used & key_padding_mask[:, :last]
        found = offsets.expand(used.shape)[used]
        extremes += [int(x) for x in found.aminmax()] if found.numel() else []
    return (min(extremes), max(extremes)) if extremes else None


def extended(bias: Tensor, origin: int, beyond: str) -> tuple[Tensor, int]:
    """The table that stands for `bias` under "clamp", and the offset of its first column.

    Under "zero" it has a column of zeros more at each end.
    """
    if beyond != "zero":
        return bias, -origin
    return torch.nn.functional.pad(bias, (1, 1)), -origin - 1


def trimmed(grad: Tensor, beyond: str) -> Tensor:
    """The transpose of `extended`: the gradient without the added columns, in memory of its own."""
    return grad[..., 1:-1].clone(memory_format=torch.contiguous_format) if beyond == "zero" else grad
