"""Which method and mesh at which length, on up to 4096 GPUs: a simulation, not a measurement.

    python -m bench.scaling              # the table and the plot of docs/distributed.md
    python -m bench.scaling --check      # the model's bytes and work against runs on gloo ranks

Each rank is a timeline of events. A kernel waits for the keys that it needs, and for the kernel before it. A message
waits for the link, and takes a latency and its bytes over the bandwidth. Who needs which keys comes from the package's
own `Plan`. A time is that of the slowest rank, for forward and backward of one causal attention layer in bfloat16. The
plot and the table show overhead: time over the time of the kernels alone, if all ranks had the same work.
Kernel rates are what FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) reaches on an H100 at head dim 128, 650
TFLOP/s forward and 500 backward, times `--share`, because a bias costs some of it. Nothing here was measured on a GPU.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt

from bench.rows import ROOT
from triton_offset_bias.distributed.plan import Layout, Plan
from triton_offset_bias.distributed.spans import Span
from triton_offset_bias.table import UNLIMITED

mpl.use("Agg")
LENGTHS = [2**i for i in range(15, 23)]
GPUS = [8, 32, 128, 512, 1024, 4096]
WAYS = ("gather", "ring", "all_to_all", "mesh, gather", "mesh, ring")
NO_TABLE_COLUMN = "-"


@dataclass(frozen=True)
class Machine:
    """Links, kernels and the model's attention. Rates are bytes, or operations, a second; times are seconds."""

    node: int = 8  # GPUs that NVLink connects
    nvlink: float = 450e9  # of one GPU, in one direction
    network: float = 50e9
    nvlink_latency: float = 5e-6
    network_latency: float = 15e-6
    forward_rate: float = 650e12
    backward_rate: float = 500e12
    launch: float = 20e-6  # of the kernels of one part
    heads: int = 32
    key_heads: int = 8
    dim: int = 128
    memory: float = 30e9  # bytes for the keys of one layer and their gradients

    def link(self, ranks: int) -> tuple[float, float]:
        """Bandwidth and latency among neighbouring ranks, as many as given."""
        if ranks <= self.node:
            return self.nvlink, self.nvlink_latency
        return self.network, self.network_latency


def pairs_of(queries: Span, keys: Span) -> int:
    """The pairs of a query and a key at or before it."""
    shared = Span(max(queries.start, keys.start), queries.stop)

    def below(count: int) -> int:  # the sum of 1 to count
        return count * (count + 1) // 2

    if not shared.size or not keys.size:
        return 0
    first, last = shared.start - keys.start + 1, shared.stop - keys.start  # keys that the first and last query reach
    full = max(0, last - keys.size)  # queries that reach all keys
    partial_last = min(last, keys.size)
    return (
        below(partial_last)
        - below(min(first, partial_last + 1) - 1)
        + keys.size * (full - max(0, first - keys.size - 1))
    )


@dataclass
class Step:
    """The keys that a rank gets from one other rank: pairs to compute, kernels to launch, keys to receive."""

    pairs: int
    parts: int
    keys: int


def steps_of(plan: Plan, rank: int) -> Iterator[Step]:
    """The steps of a rank of the ring, its own keys first."""
    ring = plan.layout.ring
    for distance in range(ring):
        spans = plan.needed(rank, (rank - distance) % ring)
        work = [pairs_of(q, k.cut(plan.reached(q))) for q in plan.queries[rank] for k in spans]
        yield Step(sum(work), sum(count > 0 for count in work), sum(span.size for span in spans))


def _pass_time(
    steps: list[Step], machine: Machine, way: str, share: float, ring: int, trading: int, *, back: bool
) -> float:
    """The time of one pass of one rank: `trading` ranks share the heads, `ring` ranks the keys."""
    heads, key_heads = machine.heads / trading, max(machine.key_heads / trading, 1)
    rate = share * (machine.backward_rate if back else machine.forward_rate)
    flops = (10 if back else 4) * machine.dim * heads
    bandwidth, latency = machine.link(ring * trading)
    key_bytes = 2 * key_heads * machine.dim * 2  # K and V of one position, bfloat16
    gradient_bytes = 2 * key_bytes if back else 0  # float32
    kernels = [step.pairs * flops / rate + step.parts * machine.launch for step in steps]
    if way == "gather":
        received = sum(step.keys for step in steps[1:])
        travel = (received * key_bytes / bandwidth + latency) if ring > 1 else 0.0
        home = (received * gradient_bytes / bandwidth + latency) if ring > 1 and back else 0.0
        return travel + sum(kernels) - (len(kernels) - 1) * machine.launch + home
    kernel_end, link_end, arrived = 0.0, 0.0, 0.0
    for index, kernel in enumerate(kernels):
        begin = max(kernel_end, arrived)
        if index + 1 < len(steps) and steps[index + 1].keys:  # the next step's keys set out when this step begins
            link_end = max(link_end, begin) + latency + steps[index + 1].keys * key_bytes / bandwidth
            arrived = link_end
        kernel_end = begin + kernel
        if back and index and steps[index].keys:
            link_end = max(link_end, kernel_end) + latency + steps[index].keys * gradient_bytes / bandwidth
    return max(kernel_end, link_end)


def overhead(length: int, gpus: int, way: str, machine: Machine, share: float) -> float | None:
    """Time of a step over its kernels' time at perfect balance; None where it is impossible."""
    mesh, _, method = way.partition(", ")
    trading = gpus if way == "all_to_all" else min(machine.node, gpus) if mesh == "mesh" else 1
    ring = gpus // trading
    if machine.heads % trading or (mesh == "mesh" and ring == 1) or length < 2 * gpus:
        return None
    method = method or ("gather" if way == "all_to_all" else way)
    held = length / (1 if method == "gather" else ring / 3) * 2 * max(machine.key_heads / trading, 1) * machine.dim
    if held * (2 + 4) > machine.memory:  # keys in bfloat16, their gradients in float32
        return None
    plan = Plan(Layout((length, length), ring, trading, "zigzag", 0, 0, UNLIMITED, None, False))
    slowest = 0.0
    for rank in sorted({0, ring // 2, ring - 1}):
        steps = list(steps_of(plan, rank))
        both = (_pass_time(steps, machine, method, share, ring, trading, back=back) for back in (False, True))
        slowest = max(slowest, sum(both))
    bandwidth, latency = machine.link(trading)
    tokens = length / gpus * (trading - 1) / trading
    traded = 2 * (2 * machine.heads + 2 * machine.key_heads) * machine.dim * tokens * 2  # q, k, v, out; their gradients
    trades = traded / bandwidth + 8 * latency if trading > 1 else 0.0
    pairs = length * (length + 1) / 2 / gpus * machine.heads * machine.dim
    ideal = pairs * (4 / machine.forward_rate + 10 / machine.backward_rate) / share
    return (slowest + trades) / ideal


def simulated(machine: Machine, share: float) -> pd.DataFrame:
    """The overhead of every way, a row for each length and number of GPUs."""
    rows = []
    for length, gpus in itertools.product(LENGTHS, GPUS):
        row = {way: overhead(length, gpus, way, machine, share) for way in WAYS}
        rows.append({"length": length, "gpus": gpus, **row})
    return pd.DataFrame(rows)


def advice(results: pd.DataFrame) -> str:
    """A Markdown table: the best way at each length and number of GPUs, and its overhead."""
    lines = ["| length | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |", "|---" * (len(GPUS) + 1) + "|"]
    for length, rows in results.groupby("length"):
        cells = []
        for _, row in rows.sort_values("gpus").iterrows():
            found = {way: row[way] for way in WAYS if not pd.isna(row[way])}
            best = min(found, key=lambda way: found[way], default=None)
            cells.append(NO_TABLE_COLUMN if best is None else f"{best} {found[best]:.2f}")
        lines.append(f"| {int(length) // 1024}k | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: pd.DataFrame, path: Path) -> None:
    """One panel for each number of GPUs: overhead over length, a line for each way."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained")
    for axis, gpus in zip(axes.flat, GPUS, strict=True):
        rows = results[results.gpus == gpus]
        for way, style in zip(WAYS, ("-", "-", "-", "--", "--"), strict=True):
            axis.plot(rows.length / 1024, rows[way], style, marker="o", markersize=3, label=way)
        axis.set(title=f"{gpus} GPUs", xscale="log", yscale="log", ylim=(0.95, 20))
        axis.set_xticks([32, 128, 512, 2048], ["32k", "128k", "512k", "2M"])
        axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.grid(color="#e4e4e4")
    axes[0, 0].legend(frameon=False)
    figure.supxlabel("positions of the whole sequence")
    figure.supylabel("time / kernels alone at perfect balance")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Writes the CSV and the plot, and prints the table."""
    parser = argparse.ArgumentParser(
        "python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--share", type=float, default=0.8, help="share of FlashAttention-3's rates that kernels reach (default: 0.8)")
    add("--csv", type=Path, default=ROOT / "bench" / "out" / "scaling.csv", help="default: bench/out/scaling.csv")
    add("--plot", type=Path, default=ROOT / "bench" / "out" / "scaling.png", help="default: bench/out/scaling.png")
    add("--check", action="store_true", help="compare bytes and work with runs on gloo ranks, and simulate nothing")
    args = parser.parse_args()
    if args.check:
        from bench.scaling_check import check

        check()
        return
    results = simulated(Machine(), args.share)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    results.to_csv(args.csv, index=False, float_format="%.4g")
    draw(results, args.plot)
    print(advice(results))
    print(f"wrote {args.csv} and {args.plot}")


if __name__ == "__main__":
    main()
