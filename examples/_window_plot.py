"""The picture of `swin_windows.py`."""

from pathlib import Path

import pandas as pd
from _byte_plot import COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from triton_offset_bias.modules import OffsetBias2d


def plot_run(path: Path, curves: pd.DataFrame, image: Tensor, window: int, biases: list[OffsetBias2d]) -> None:
    """Writes a PNG: windows of an image, accuracy while learning, and the learned bias of every layer and head.

    Args:
        path: the file.
        curves: test accuracy in percent, indexed by epoch, a column per (model, seed).
        image: (S, S) grey levels, to draw windows on.
        window: height and width of a window.
        biases: the biases of one model, one per layer.
    """
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(2.3, 5, 5), wspace=0.02)
    for axes, shift in zip(left.subplots(2, 1), (0, window // 2), strict=True):
        plot_windows(axes, image, window, shift)
    plot_curves(middle.subplots(), curves)
    plot_biases(right, biases)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_windows(axes: Axes, image: Tensor, window: int, shift: int) -> None:
    """Draws the image and the edges of its windows."""
    side = len(image)
    axes.imshow(image.numpy(), cmap="Greys", extent=(0, side, side, 0))
    edges = sorted({0, side, *range(shift, side, window)})
    for edge in edges:
        axes.plot([0, side], [edge, edge], [edge, edge], [0, side], color=COLOURS[6], linewidth=2.5, clip_on=False)
    axes.set_axis_off()
    axes.set_title("windows, shifted" if shift else "windows")


def plot_curves(axes: Axes, curves: pd.DataFrame) -> None:
    """Draws every seed as a thin line and the mean over seeds as a thick line, with its last value."""
    for (name, runs), colour in zip(curves.T.groupby(level=0, sort=False), (COLOURS[0], COLOURS[6]), strict=True):
        axes.plot(runs.T, color=colour, linewidth=0.8, alpha=0.4)
        mean = runs.mean()
        label = f"{name}: {mean.iloc[-1]:.1f} % in the end"
        axes.plot(mean, "o-", color=colour, mec="white", ms=7, linewidth=1.8, label=label)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("The same model with and without the bias\n(thin: each seed; thick: their mean)")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)


def plot_biases(figure: SubFigure, biases: list[OffsetBias2d]) -> None:
    """Draws a square per layer and head: the bias by the key's place around the query, minus the mean of all."""
    rows = figure.subplots(len(biases), biases[0].num_heads, squeeze=False)
    maps = [bias.state_dict()["relative_position_bias_table"].cpu().T for bias in biases]
    maps = [table - table.mean(1, keepdim=True) for table in maps]  # a constant per head cancels in the softmax
    largest = max(float(table.abs().max()) for table in maps) or 1.0
    for layer, (bias, table, axes_of_layer) in enumerate(zip(biases, maps, rows, strict=True)):
        for head, axes in enumerate(axes_of_layer):
            # Offsets are query minus key: turned around, they tell where the key is.
            squares = table[head].unflatten(0, (2 * bias.height - 1, 2 * bias.width - 1)).flip(0, 1)
            image = axes.imshow(squares.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
            axes.plot(bias.width - 1, bias.height - 1, "k.", ms=4)
            axes.set(xticks=[], yticks=[])
            if layer == 0:
                axes.set_title(f"head {head}", fontsize="medium")
        axes_of_layer[0].set_ylabel(f"layer {layer}")
    figure.colorbar(image, ax=rows, shrink=0.8, label="bias, less the head's mean (nats)")
    figure.suptitle("Where each head has learned to look\n(dot: the query's own pixel)")
