"""Views of a bias: a dense tensor, and a picture."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from triton_offset_bias import table
from triton_offset_bias.checks.arguments import check_offset_range, checked_count, checked_int

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LABELLED_HEADS = 16


def dense_bias(module: nn.Module, len_q: int, len_k: int, query_start: int | None = None) -> Tensor:
    """The bias of every pair of a query and a key, which attention itself never builds.

        dense[h, i, j] = bias[h, query_start + i - j]

    Args:
        module: gives a table, ``module(min_offset, max_offset) -> (H, offsets)``, such as `OffsetBias`.
        len_q: number of queries.
        len_k: number of keys.
        query_start: position of query 0 counted from key 0; default ``len_k - len_q``, as in `offset_bias_attention`.

    Returns:
        (H, len_q, len_k) float32, differentiable: an `attn_mask` for torch's ``scaled_dot_product_attention``.

    Raises:
        TypeError: a number is no int.
        ValueError: a length is below 1, or the module has no bias for an offset.
    """
    start = checked_count("len_k", len_k) - checked_count("len_q", len_q)
    start = start if query_start is None else checked_int("query_start", query_start)
    min_offset, max_offset = table.reachable_offsets(len_q, len_k, start)
    bias = module(min_offset, max_offset)
    queries, keys = (torch.arange(length, device=bias.device) for length in (len_q, len_k))
    return bias[:, table.dense_offsets(start + queries, keys) - min_offset]


def plot_bias(module: nn.Module, min_offset: int, max_offset: int, ax: "Axes | None" = None) -> "Axes":
    """Draws the bias over the offset, one line per head.

    Args:
        module: gives a table, ``module(min_offset, max_offset) -> (H, offsets)``, such as `OffsetBias`.
        min_offset: first offset (query minus key).
        max_offset: last offset, at least `min_offset`.
        ax: matplotlib axes to draw into; by default the axes of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `max_offset` is below `min_offset`, or the module has no bias for an offset.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_bias needs matplotlib: pip install matplotlib") from error
    check_offset_range(min_offset, max_offset)
    with torch.no_grad():
        rows = module(min_offset, max_offset).tolist()
    ax = plt.subplots()[1] if ax is None else ax
    for head, row in enumerate(rows):
        ax.plot(range(min_offset, max_offset + 1), row, label=f"head {head}")
    ax.set_xlabel("offset (query minus key)")
    ax.set_ylabel("bias (nats)")
    if len(rows) <= MOST_LABELLED_HEADS:
        ax.legend()
    return ax
