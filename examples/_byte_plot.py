"""The picture of `train_bytes.py`."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Paul Tol's "muted" colours: told apart with every kind of colour vision.
COLOURS = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255"]
BINS_PER_OCTAVE = 4


def plot_run(path: Path, table: Tensor, losses: dict[str, pd.DataFrame]) -> None:
    """Writes a PNG: every head's bias over the offset, from `table` (H, L), beside the loss curves.

    `losses`: by name of run, bits per byte in columns "training" and "held out" (NaN where not evaluated), indexed by
    bytes seen.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_bias(left, table)
    plot_losses(right, losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_bias(axes: Axes, table: Tensor) -> None:
    """Draws the bias of each offset thinly, and its mean over bins of equal width on the log axis as a thick line."""
    table = table - table.max(dim=1, keepdim=True).values  # a constant per head cancels in the softmax
    octaves = table.shape[1].bit_length()
    edges = sorted({-1.0, 0.0} | {2 ** (i / BINS_PER_OCTAVE) for i in range(octaves * BINS_PER_OCTAVE + 1)})
    for head, bias in enumerate(table.tolist()):
        offsets = pd.DataFrame({"offset": range(len(bias)), "bias": bias})
        bins = offsets.groupby(pd.cut(offsets["offset"], edges), observed=True).mean()
        colour = COLOURS[head % len(COLOURS)]
        axes.plot(offsets["offset"], offsets["bias"], color=colour, linewidth=0.4, alpha=0.25)
        axes.plot(bins["offset"], bins["bias"], color=colour, linewidth=1.8, label=f"head {head}")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(0, table.shape[1] - 1)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="offset (bytes back)", ylabel="bias, relative to the head's favourite offset (nats)")
    axes.set_title("The distance penalty each head has learned\n(thin: every offset; thick: mean of neighbours)")
    axes.legend(ncols=2, frameon=False)
    axes.grid(alpha=0.3)


def plot_losses(axes: Axes, losses: dict[str, pd.DataFrame]) -> None:
    """Draws training steps faintly, their running mean as a line, and held-out files as points."""
    for (name, run), colour, marker in zip(losses.items(), (COLOURS[0], COLOURS[6]), "os", strict=True):
        seen = run.index / 1000
        smooth = run["training"].ewm(span=max(2, len(run) // 25)).mean()
        axes.plot(seen, run["training"], color=colour, linewidth=0.4, alpha=0.25)
        axes.plot(seen, smooth, color=colour, linewidth=1.8, label=f"{name}: training (running mean)")
        axes.plot(seen, run["held out"], marker, color=colour, mec="white", ms=9, label=f"{name}: held-out files")
    axes.set(xlabel="training text seen (thousand bytes)", ylabel="loss (bits per byte)")
    axes.set_title("What it is worth: the same model with and without it")
    axes.set_ylim(0, 8)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
