"""The picture of `gated_bytes.py`."""

import itertools
from pathlib import Path

import pandas as pd
from _byte_plot import COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def plot_run(path: Path, curves: pd.DataFrame, gates: pd.DataFrame, tables: list[Tensor]) -> None:
    """Writes a PNG: bits per byte while learning, the learned tables, and the mean gates.

    Args:
        path: the file.
        curves: bits per byte on held-out text, indexed by the bytes seen, a column per model.
        gates: the mean gate by kind of byte, a column per head of every layer.
        tables: the table of every layer of the gated model, (heads, offsets), offset 0 first.
    """
    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 5))
    plot_curves(left, curves)
    plot_tables(middle, tables)
    plot_gates(right, gates)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_curves(axes: Axes, curves: pd.DataFrame) -> None:
    """Draws a line per model, with its last value."""
    for (name, run), colour in zip(curves.items(), (COLOURS[6], COLOURS[0]), strict=True):
        axes.plot(run.index / 1e3, run, "o-", color=colour, mec="white", label=f"{name}: {run.iloc[-1]:.3f}")
    axes.set(xlabel="bytes seen (thousands)", ylabel="bits per byte, held out")
    axes.set_title("The same model with and without gates")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def plot_tables(axes: Axes, tables: list[Tensor]) -> None:
    """Draws the bias of every head over the distance, less its mean; long distances as means of neighbours."""
    styles = ("-", "--", ":")
    length = tables[0].shape[1]
    edges = sorted({round(2 ** (step / 3)) for step in range(40) if 2 ** (step / 3) < length} | {0, length})
    places = [(low + high - 1) / 2 for low, high in itertools.pairwise(edges)]
    for layer, table in enumerate(tables):
        for head, row in enumerate(table - table.mean(1, keepdim=True)):
            means = [row[low:high].mean().item() for low, high in itertools.pairwise(edges)]
            label = f"layer {layer}, head {head}"
            axes.plot(places, means, styles[layer % 3], color=COLOURS[2 * head], lw=1.5, label=label)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set(xlabel="distance to the key (bytes)", ylabel="bias, less the head's mean (nats)")
    axes.set_title("The tables that gates multiply")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="x-small", ncols=len(tables), loc="upper right")


def plot_gates(axes: Axes, gates: pd.DataFrame) -> None:
    """Draws the mean gates as a map, with their numbers."""
    image = axes.imshow(gates.to_numpy(), cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
    for row, column in ((r, c) for r in range(gates.shape[0]) for c in range(gates.shape[1])):
        axes.text(column, row, f"{gates.iat[row, column]:.1f}", ha="center", va="center", fontsize="x-small")
    axes.set_xticks(range(gates.shape[1]), gates.columns, rotation=60, ha="right", fontsize="small")
    axes.set_yticks(range(gates.shape[0]), gates.index)
    axes.set_title("Mean gate of the byte that attends (1 at the start)")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
