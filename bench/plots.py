"""Draws the plots of the benchmark from a CSV, and from nothing else: ``python -m bench.plots FILE``."""

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.cases import BACKWARD, BOTH, FORWARD, GPU_CASES, GPU_CLAMP, MODES
from bench.providers import PROVIDERS
from bench.report import read_results
from bench.rows import ROOT

mpl.use("Agg")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.dpi": 150,
}
OURS, PLAIN, DENSE, ELSE = "#c8442a", "#e3a08f", "#34618f", "#7c8894"  # ours, ours without bias, SDPA, the others
COLORS = {
    "ours": OURS,
    "ours_no_bias": PLAIN,
    "sdpa_no_bias": "#8fb0d0",
    "sdpa_flash": "#3f7d4e",
    "sdpa_cudnn": "#76b041",
    "sdpa_efficient": DENSE,
    "sdpa_index": DENSE,
    "sdpa_strided": "#5585b5",
    "sdpa_strided_copy": "#234668",
    "ours_atomics": "#b98a1e",
    "flash_attn": "#3f7d4e",
    "flex_compiled": "#8556a6",
    "flex_no_bias": "#c3a6d8",
}
MODE_COLORS = {FORWARD: OURS, BACKWARD: DENSE, BOTH: ELSE}


def main() -> None:
    """Writes one PNG for each kind of measurement that the CSV holds."""
    parser = argparse.ArgumentParser("python -m bench.plots", description=__doc__)
    parser.add_argument(
        "csv",
        type=Path,
        nargs="?",
        default=ROOT / "bench" / "out" / "cpu.csv",
        help="a CSV of `python -m bench` (default: bench/out/cpu.csv)",
    )
    parser.add_argument("--output", type=Path, help="folder to write the plots into (default: the folder of the CSV)")
    options = parser.parse_args()
    if not options.csv.exists():
        parser.error(f"argument csv: {options.csv} does not exist; `python -m bench` makes it")
    folder = options.output or options.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    results = read_results(options.csv)
    plt.rcParams.update(STYLE)
    for (metric, name), draw in DRAWINGS.items():
        rows = results[results.metric == metric]
        shapes = rows.case.str.removesuffix("_causal") if metric == "ratio" else rows.metric
        for (shape, device), chosen in rows.groupby([shapes, "device"], sort=False):
            parts = [options.csv.stem, name, *([shape] if metric == "ratio" else [])]
            if rows.device.nunique() > 1:
                parts.append(device.rpartition(", ")[2].replace(" ", ""))
            path = folder / f"{'_'.join(parts)}.png"
            figure = draw(chosen)
            _add_origin(figure, chosen)
            figure.savefig(path)
            plt.close(figure)
            print(f"wrote {path}")


def draw_ratios(rows: pd.DataFrame) -> Figure:
    """Bars of every provider's time over this package's: a row of panels for each mode, a column for each mask."""
    modes = [mode for mode in MODES if mode in set(rows["mode"])]
    masks = sorted(rows.causal.unique())
    most = rows.groupby("mode").provider.nunique()
    figure, axes = plt.subplots(
        len(modes),
        len(masks),
        figsize=(2.4 + 3.6 * len(masks), 1.0 + 0.27 * sum(most[mode] + 2 for mode in modes)),
        squeeze=False,
        sharey="row",
        layout="constrained",
        gridspec_kw={"height_ratios": [most[mode] for mode in modes]},
    )
    for line, mode in zip(axes, modes, strict=True):
        order = rows[rows["mode"] == mode].groupby("provider").p50.max().sort_values(ascending=False).index
        for ax, causal in zip(line, masks, strict=True):
            _bars(ax, rows[(rows["mode"] == mode) & (rows.causal == causal)].set_index("provider"), list(order))
            ax.set_title(f"{mode}, {'causal' if causal else 'not causal'}")
    for ax in axes[-1]:
        ax.set_xlabel("time / time of ours  (median, 20 % to 80 % of the rounds)")
    figure.suptitle(f"How many times longer than ours: {_shape(rows)}", x=0.01, ha="left", fontsize=11)
    return figure


def _bars(ax: Axes, rows: pd.DataFrame, order: list[str]) -> None:
    shown = rows.reindex(order)
    spread = [(shown.p50 - shown.p20).clip(lower=0), (shown.p80 - shown.p50).clip(lower=0)]
    colors = [COLORS.get(name, ELSE) for name in order]
    ax.barh(
        [PROVIDERS[name].label for name in order], shown.p50, color=colors, xerr=spread, ecolor="#555555", height=0.72
    )
    for y, (p50, p80) in enumerate(zip(shown.p50, shown.p80, strict=True)):
        if pd.notna(p50):
            weight = "bold" if order[y] == "ours" else "normal"
            ax.annotate(
                f"{p50:.2f}x", (max(p50, p80), y), (4, 0), textcoords="offset points", va="center", weight=weight
            )
    ax.axvline(1, color=OURS, linewidth=0.8, linestyle=":")
    ax.set_xlim(0, 1.15 * shown.p80.max())
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)


def draw_memory(rows: pd.DataFrame) -> Figure:
    """The growth of the peak memory over the length, both axes logarithmic."""
    masks = sorted(rows.causal.unique())
    figure, axes = plt.subplots(
        1, len(masks), figsize=(2.5 + 3.4 * len(masks), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    lengths = sorted(rows.M.unique())
    for ax, causal in zip(axes[0], masks, strict=True):
        for name, line in rows[rows.causal == causal].groupby("provider", sort=False):
            line = line.sort_values("M")
            color = COLORS.get(str(name), ELSE)
            ax.plot(line.M, line.p50, marker="o", color=color, linewidth=2, label=PROVIDERS[str(name)].label)
            place = (0, -14) if name == "ours" else (0, 7)
            end = (line.M.iloc[-1], line.p50.iloc[-1])
            ax.annotate(f"{end[1]:,.0f}", end, place, textcoords="offset points", ha="center", color=color)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.margins(y=0.12)
        ax.set_xticks(lengths, [str(length) for length in lengths])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        ax.set_title("causal" if causal else "not causal")
        ax.set_xlabel("sequence length L")
        ax.grid()
    axes[0][0].set_ylabel("growth of peak memory [MiB]")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    title = f"Memory of a training step: {_shape(rows, with_length=False)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def draw_gemm_fraction(rows: pd.DataFrame) -> Figure:
    """Bars of the rate of floating point operations as a fraction of a large matmul's."""
    figure = _grouped(rows.assign(group=rows.provider.map(lambda name: PROVIDERS[name].label) + _causal(rows)))
    ax = figure.axes[0]
    ax.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
    ax.set_ylabel("rate / rate of sgemm")
    ax.set_title(f"Fraction of sgemm's FLOP/s: {_shape(rows)}")
    return figure


def draw_thread_speedup(rows: pd.DataFrame) -> Figure:
    """Bars of the time with one thread over the time with more threads."""
    rows = rows[rows.provider == "ours"]
    figure = _grouped(rows.assign(group=[f"BH={r.B * r.H} L={r.M}" for r in rows.itertuples()] + _causal(rows)))
    ax = figure.axes[0]
    ax.set_ylabel("time with 1 thread / with more")
    ax.set_title(f"Speed-up of ours by threads: {rows.device.iloc[0].rpartition(', ')[2]} against 1")
    return figure


def draw_throughput(rows: pd.DataFrame) -> Figure:
    """Lines of the rate over the length, by provider: a row of panels a mode, a column for each head dim and mask."""
    modes = [mode for mode in MODES if mode in set(rows["mode"])]
    rows = rows[rows.case.isin([case.name for case in GPU_CASES])]
    rows = rows.assign(clamp=rows.case.str.contains(f"_c{GPU_CLAMP}"))
    columns = sorted({(row.D, row.clamp, row.causal) for row in rows.itertuples()})
    size = (1.6 + 2.7 * len(columns), 0.9 + 2.4 * len(modes))
    figure, axes = plt.subplots(
        len(modes), len(columns), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for row, (line, mode) in enumerate(zip(axes, modes, strict=True)):
        for ax, (dim, clamp, causal) in zip(line, columns, strict=True):
            chosen = rows[(rows["mode"] == mode) & rows.D.eq(dim) & rows.clamp.eq(clamp) & rows.causal.eq(causal)]
            for name, points in chosen.groupby("provider", sort=False):
                points = points.sort_values("M")
                color = COLORS.get(str(name), ELSE)
                ax.plot(points.M, points.p50, marker="o", markersize=3, color=color, label=PROVIDERS[str(name)].label)
            ax.set_xscale("log", base=2)
            ax.grid()
            if row == 0:
                ax.set_title(f"D={dim}{f', table of +-{GPU_CLAMP}' * clamp}{_causal_of(causal)}")
            if row == len(axes) - 1:
                ax.set_xlabel("sequence length L")
        line[0].set_ylabel(f"{mode}\nTFLOP/s")
        line[0].set_ylim(bottom=0)
    lines = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right center")
    return figure


def _grouped(rows: pd.DataFrame) -> Figure:
    groups, modes = list(rows.group.unique()), [mode for mode in MODES if mode in set(rows["mode"])]
    figure, ax = plt.subplots(figsize=(3.5 + 1.1 * len(groups), 3.4), layout="constrained")
    width = 0.8 / len(modes)
    for turn, mode in enumerate(modes):
        line = rows[rows["mode"] == mode].set_index("group").reindex(groups)
        x = [place + (turn - (len(modes) - 1) / 2) * width for place in range(len(groups))]
        spread = [(line.p50 - line.p20).clip(lower=0), (line.p80 - line.p50).clip(lower=0)]
        ax.bar(x, line.p50, width * 0.94, label=mode, color=MODE_COLORS[mode], yerr=spread, ecolor="#555555")
        for place, p50 in zip(x, line.p50, strict=True):
            ax.annotate(f"{p50:.2f}", (place, 0), (0, 4), textcoords="offset points", ha="center", color="white")
    ax.set_xticks(range(len(groups)), [group.replace(", causal", "\ncausal") for group in groups])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


def _causal(rows: pd.DataFrame) -> pd.Series:
    return rows.causal.map(_causal_of)


def _causal_of(causal: bool) -> str:
    return ", causal" if causal else ""


def _shape(rows: pd.DataFrame, with_length: bool = True) -> str:
    row = rows.iloc[0]
    length = f"L={row.M} " if with_length else ""
    return f"B={row.B} H={row.H} {length}D={row.D}, {row['dtype']}"


def _add_origin(figure: Figure, rows: pd.DataFrame) -> None:
    row = rows.iloc[-1]
    text = f"{row.device} | torch {row.torch} | commit {row.commit} | {row.date[:10]}"
    figure.supxlabel(text, x=0.99, ha="right", fontsize=7, color="#888888")


DRAWINGS = {
    ("ratio", "speed"): draw_ratios,
    ("memory", "memory"): draw_memory,
    ("gemm_fraction", "gemm"): draw_gemm_fraction,
    ("thread_speedup", "threads"): draw_thread_speedup,
    ("throughput", "gpu"): draw_throughput,
}

if __name__ == "__main__":
    main()
