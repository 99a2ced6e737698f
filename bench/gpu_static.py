"""``python -m bench.gpu_static``: the GPU kernels' code, measured without a GPU.

All figures are modelled cycles, never timings. A tool disassembles the compiled kernels. It converts the instructions
of their inner loops into cycles that a streaming multiprocessor needs for 4096 scores: once by the slowest pipe, and
once with matrix products and all other instructions one after another ("serial"). Kinds of tiles are `floor` (the same
kernel without a bias), `far`, `near`, and `naive` (near, with one atomic add for every score). With an emulator it also
counts executed instructions and atomic adds. "Whole pass" weighs near and far tiles as they occur at L = 8192 with a
table of 257 columns.

It measures the kernels of the Triton that it runs with, and keeps the rows of other versions. The picture shows the
version in `SHOWN`. The tables in docs/gpu.md are written anew from the rows of all versions.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
import triton
from matplotlib import pyplot as plt
from tqdm import tqdm

from bench.kernel_variants import Variant
from bench.plots import DENSE, ELSE, OURS, STYLE
from bench.rows import ROOT

mpl.use("Agg")
TARGETS = ("sm_80", "sm_90")
HEAD_DIMS = (64, 128)
ONE_KERNEL, TWO_KERNELS = "backward", "backward, two kernels"
PASSES = {"forward": ("forward",), ONE_KERNEL: ("backward",), TWO_KERNELS: ("dquery", "dkey_dvalue")}
LENGTH, CLAMP = 1024, 128  # of the executed counts
WHOLE_LENGTH = 8192
SHOWN = "3.8.0"  # what torch 2.14 ships
DOCS = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- from bench/results/gpu_static.csv -->", "<!-- end -->"
COLORS = {"far": ELSE, "near": OURS, "naive": DENSE}
PIPES = {"max": "slowest pipe", "ser": "serial"}


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the CSV, the plot and the tables in the documentation, and prints the ratios to the floor."""
    parser = argparse.ArgumentParser("python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--sassmeter", default="../shared/tools/sassmeter", help="folder of sassmeter.py")
    parser.add_argument("--ptxemu", default="../shared/tools/ptxemu", help="folder of the emulator (optional)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu_static.csv", help="the CSV")
    options = parser.parse_args(arguments)
    if not (Path(options.sassmeter) / "sassmeter.py").exists():
        raise SystemExit(f"`--sassmeter` must be the folder of sassmeter.py, got {options.sassmeter}")
    sys.path.append(options.sassmeter)
    variants = list(_variants())
    rows = [row for kind, v in tqdm(variants, desc="modelled", unit="kernel") for row in _modelled(kind, v)]
    if (Path(options.ptxemu) / "triton_offline.py").exists():
        sys.path.append(options.ptxemu)
        rows += [row for target in tqdm(TARGETS, desc="executed") for row in _executed(target)]
    table = pd.DataFrame(rows)
    print(summary(table).to_string())
    print(f"\nwhole pass, L = {WHOLE_LENGTH}\n{whole_pass(table).to_string(index=False)}")
    if options.output.exists():
        before = pd.read_csv(options.output)
        table = pd.concat([before[before.triton != triton.__version__], table]).sort_values("triton", kind="stable")
    table.to_csv(options.output, index=False)
    if SHOWN in set(table.triton):
        draw(table[table.triton == SHOWN], options.output.with_suffix(".png"))
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + "\n" + docs_tables(table) + END + rest.partition(END)[2])
    print(f"\nwrote {options.output}, {options.output.with_suffix('.png')} and {DOCS}")


def _variants() -> Iterator[tuple[str, Variant]]:
    for target in TARGETS:
        for head_dim in HEAD_DIMS:
            for kernel in ("forward", "dquery", "dkey_dvalue"):
                yield "floor", Variant(kernel, target, torch.bfloat16, head_dim, "none")
                yield "clamped", Variant(kernel, target, torch.bfloat16, head_dim, "clamped")
            whole = {"IS_WHOLE": True}
            yield "floor", Variant("dkey_dvalue", target, torch.bfloat16, head_dim, "none", whole)
            yield "clamped", Variant("dkey_dvalue", target, torch.bfloat16, head_dim, "clamped", whole)
            naive = {"DBIAS": "elements"}
            yield "naive", Variant("dquery", target, torch.bfloat16, head_dim, "clamped", naive)


def _modelled(kind: str, variant: Variant) -> list[dict[str, Any]]:
    """Cycles for 4096 scores in each of a kernel's loops."""
    config = variant.launch
    tile = (config.block_m, config.block_n, variant.head_dim)
    meter = importlib.import_module("sassmeter")
    meter.compile_spec = lambda spec, arch: variant.compile()
    spec = {"name": variant.kernel, "num_warps": config.num_warps, "num_stages": config.num_stages, "tile": tile}
    loops = meter.measure(spec, int(variant.target[3:]))
    # With a bias the loops are far, near, far again.
    found = {"floor": {"floor": 0}, "clamped": {"far": 0, "near": 1}, "naive": {"naive": 1}}[kind]
    rows = []
    for tiles, index in found.items():
        values = {f"modelled cycles, {name}": loops[index]["cyc"][pipe] for pipe, name in PIPES.items()}
        values["spills in the loop"] = loops[index]["cnt"].get("spill", 0)
        kernel = "backward" if variant.is_whole else variant.kernel
        rows += [_row(variant.target, kernel, variant.head_dim, tiles, *value) for value in values.items()]
    return rows


def _executed(target: str) -> Iterator[dict[str, Any]]:
    """Warp instructions, and atomic adds per score, of every kernel at L = 1024, in the emulator."""
    emulator = importlib.import_module("triton_offline")
    emulator.install(arch=int(target[3:]))
    from triton_offset_bias import offset_bias_attention

    q, k, v = (torch.randn(1, 1, LENGTH, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    table, dout = torch.randn(1, 2 * CLAMP + 1, requires_grad=True), torch.randn_like(q)
    for kind, bias in (("floor", None), ("clamped", table)):
        emulator.LAUNCHES.clear()
        offset_bias_attention(q, k, v, bias, backend="triton").backward(dout)
        for name, stats in emulator.LAUNCHES:
            kernel = name.removesuffix("_kernel")
            yield _row(target, kernel, 64, kind, "executed warp instructions", stats.warp_insts)
            atomics = sum(n for what, n in stats.lanes_by_class.items() if what.startswith(("red", "atom")))
            yield _row(target, kernel, 64, kind, "atomic adds per score", atomics / LENGTH**2)


def _row(target: str, kernel: str, head_dim: int, kind: str, metric: str, value: float) -> dict[str, Any]:
    versions = {"dtype": "bfloat16", "triton": triton.__version__}
    return {
        "target": target,
        "kernel": kernel,
        "D": head_dim,
        "tile": kind,
        "metric": metric,
        "value": value,
        **versions,
    }


def docs_tables(table: pd.DataFrame) -> str:
    """The ratios to the floor as Markdown: for a tile, and for a whole pass; by the slowest pipe / in series."""
    columns = [(target, head_dim) for target in TARGETS for head_dim in HEAD_DIMS]
    header = "".join(f"| {target} D={head_dim} " for target, head_dim in columns)
    lines = [f"| Triton | pass, tile {header}|", "|---" * (2 + len(columns)) + "|"]
    for version, rows in table.groupby("triton", sort=False):
        tiles = summary(rows)["over floor"]
        whole = whole_pass(rows).set_index(["target", "D", "pass", "metric"])["whole pass over floor"]
        metrics = [f"modelled cycles, {pipe}" for pipe in PIPES.values()]
        for name in PASSES:
            for tile in ("near", "far"):
                cells = ([tiles[(*column, name, metric, tile)] for metric in metrics] for column in columns)
                lines.append(_docs_line(version, f"{name}, {tile}", cells))
            cells = ([whole[(*column, name, metric)] for metric in metrics] for column in columns)
            lines.append(_docs_line(version, f"{name}, whole pass", cells))
        for tile in ("floor", "near", "far"):
            total = summary(rows).total
            cells = (
                [
                    total[(*column, ONE_KERNEL, metric, tile)] / total[(*column, TWO_KERNELS, metric, tile)]
                    for metric in metrics
                ]
                for column in columns
            )
            name = "without a bias" if tile == "floor" else tile
            lines.append(_docs_line(version, f"one kernel over two, {name}", cells))
    return "\n".join([*lines, ""])


def _docs_line(version: str, what: str, cells: Iterable[list[float]]) -> str:
    ratios = (" / ".join(f"{ratio:.2f}" for ratio in cell) for cell in cells)
    return f"| {version} | {what} | " + " | ".join(ratios) + " |"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Sums over the kernels of each pass, and their ratios to the floor."""
    lines = []
    for (target, head_dim), rows in table.groupby(["target", "D"]):
        for name, kernels in PASSES.items():
            chosen = rows[rows.kernel.isin(kernels)]
            for metric, values in chosen.groupby("metric", sort=False):
                totals = values.groupby("tile").value.sum()
                if "naive" in totals:  # only dQ differs
                    totals["naive"] += values[(values.kernel == "dkey_dvalue") & (values.tile == "near")].value.sum()
                for kind, total in totals.items():
                    ratio = total / totals["floor"] if totals.get("floor") else float("nan")
                    lines.append((target, head_dim, name, metric, kind, round(total, 4), round(ratio, 3)))
    columns = ["target", "D", "pass", "metric", "tile", "total", "over floor"]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:5])


def whole_pass(table: pd.DataFrame) -> pd.DataFrame:
    """The ratio of modelled cycles of all tiles, with a bias over without, at L = WHOLE_LENGTH, not causal."""
    lines = []
    for (target, head_dim), rows in table.groupby(["target", "D"]):
        for name, kernels in PASSES.items():
            for metric in (f"modelled cycles, {pipe}" for pipe in PIPES.values()):
                cost = rows[rows.metric == metric].set_index(["kernel", "tile"]).value
                with_bias = sum(_mean_cycles(cost[kernel], kernel, target, head_dim) for kernel in kernels)
                floor = sum(cost[kernel, "floor"] for kernel in kernels)
                lines.append((target, head_dim, name, metric, round(with_bias / floor, 4)))
    return pd.DataFrame(lines, columns=["target", "D", "pass", "metric", "whole pass over floor"])


def _mean_cycles(cost: pd.Series, kernel: str, target: str, head_dim: int) -> float:
    """Mean cycles of a kernel's tiles, weighed by the share of near tiles."""
    changes, kernel = ({"IS_WHOLE": True}, "dkey_dvalue") if kernel == "backward" else ({}, kernel)
    config = Variant(kernel, target, torch.bfloat16, head_dim, changes=changes).launch
    rows, columns = torch.arange(0, WHOLE_LENGTH, config.block_m), torch.arange(0, WHOLE_LENGTH, config.block_n)
    shift = rows[:, None] - columns[None, :]
    is_near = (shift + config.block_m - 1 > -CLAMP) & (shift - (config.block_n - 1) < CLAMP)
    near = float(is_near.float().mean())
    return near * cost["near"] + (1 - near) * cost["far"]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draws bars of the modelled cycles of a tile beyond the cycles without a bias."""
    plt.rcParams.update(STYLE)
    lines = summary(table).reset_index().sort_values(["pass", "target", "D"], ascending=[False, True, True])
    figure, axes = plt.subplots(1, len(PIPES), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, pipe in zip(axes, PIPES.values(), strict=True):
        chosen = lines[(lines.metric == f"modelled cycles, {pipe}") & (lines.tile != "floor")]
        labels = chosen["pass"] + ", " + chosen.target + ", D=" + chosen.D.astype(str)
        percent = chosen.assign(label=labels, percent=100 * (chosen["over floor"] - 1))
        wide = percent.pivot(index="label", columns="tile", values="percent").loc[labels.unique()]
        wide[["far", "near", "naive"]].plot.barh(ax=axis, width=0.8, ylabel="", color=COLORS, legend=axis is axes[0])
        axis.invert_yaxis()
        axis.set_title(f"modelled, {pipe}")
        axis.set_xlabel("cycles above those without a bias, %")
    figure.savefig(path)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the model compiles by itself
    main()
