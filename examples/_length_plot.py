"""The picture of `length_generalization.py`."""

import math
from pathlib import Path

import pandas as pd
from _byte_plot import COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

LOWEST_BIAS = -30.0  # nats; below it a key weighs nothing, and ALiBi's straight line goes on to some -100
LABEL_GAP = 0.055  # between the middles of two labels, in heights of the axes


def plot_run(path: Path, perplexity: pd.DataFrame, parameters: pd.Series, tables: dict[str, Tensor]) -> None:
    """Writes a PNG: perplexity over the length, with the number of parameters, beside the biases.

    Args:
        path: the file.
        perplexity: per byte, indexed by the bias's name, a column per length; the first is the length trained at.
        parameters: number of parameters of each bias, indexed in the same way.
        tables: the bias (H, L) of each offset from 0 on, indexed in the same way.
    """
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(6, 5))
    colours = dict(zip(perplexity.index, COLOURS, strict=False))
    plot_perplexity(left, perplexity, parameters, colours)
    plot_tables(right, tables, colours, perplexity.columns[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_perplexity(axes: Axes, perplexity: pd.DataFrame, parameters: pd.Series, colours: dict[str, str]) -> None:
    """Draws a curve for each bias, with its name at its end."""
    lengths = list(perplexity.columns)
    for name, row in perplexity.iterrows():
        axes.plot(lengths, row, "o-", color=colours[name], mec="white", ms=8, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.yaxis.set_major_locator(MaxNLocator(15))  # whole numbers, where decades would leave one label or none
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.set(xlabel="bytes of text that the model sees", ylabel="perplexity per byte on held-out files (log scale)")
    axes.set_title(f"Trained at length {lengths[0]}, evaluated beyond:\nthe same bytes predicted from more text")
    axes.grid(alpha=0.3)
    ends = perplexity[lengths[-1]]
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    heights = [(math.log(end) - bottom) / (top - bottom) for end in ends]
    for (name, end), height in zip(ends.items(), spread(heights), strict=True):
        axes.annotate(
            f"{name} ({parameters[name]} parameters)",
            (lengths[-1], end),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 1.0, "shrinkB": 5, "relpos": (0, 0.5)},
        )


def spread(heights: list[float]) -> list[float]:
    """`heights` moved apart, in their order and only a little, so that any two differ by `LABEL_GAP` or more."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[tuple[float, int]] = []  # middle and size of each run of labels that touch
    for index in order:
        middle, size = kept_inside(heights[index], 1), 1
        while groups and middle - groups[-1][0] < LABEL_GAP * (size + groups[-1][1]) / 2:
            other, other_size = groups.pop()
            middle = (middle * size + other * other_size) / (size + other_size)
            size += other_size
            middle = kept_inside(middle, size)
        groups.append((middle, size))
    moved = [middle + LABEL_GAP * (i - (size - 1) / 2) for middle, size in groups for i in range(size)]
    return [moved[order.index(index)] for index in range(len(heights))]


def kept_inside(middle: float, size: int) -> float:
    """`middle`, moved so that a run of `size` labels around it stays within the axes' height."""
    return min(max(middle, size * LABEL_GAP / 2), 1 - size * LABEL_GAP / 2)


def plot_tables(axes: Axes, tables: dict[str, Tensor], colours: dict[str, str], trained: int) -> None:
    """Draws the mean over heads of each bias, minus its value at offset 1."""
    for drawn, (name, table) in enumerate(tables.items()):
        mean = table.mean(0)
        linewidth = 3.2 - 0.3 * drawn  # where curves coincide, those below are seen on both sides
        axes.plot((mean - mean[1]).tolist(), color=colours[name], linewidth=linewidth, label=name)
    axes.axvline(trained - 1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(0, max(table.shape[1] for table in tables.values()) - 1)
    lowest, highest = axes.dataLim.intervaly
    axes.set_ylim(max(LOWEST_BIAS, lowest - 1), highest + 1)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="offset (bytes back)", ylabel="mean bias of all heads, minus the mean at offset 1 (nats)")
    axes.set_title("What the biases say\n(dotted: the longest offset in training)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
