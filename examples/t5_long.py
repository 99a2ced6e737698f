"""Trains a Hugging Face T5 on sequences whose biases would not fit into memory, with `enable_offset_bias`.

    python examples/t5_long.py            # some minutes on two CPU cores; nothing is downloaded
    python examples/t5_long.py --quick    # about half a minute, too short to learn much

The task is span corruption of the source of Python's standard library, a byte a token. At a short length the same model
trains twice, on its eager attention and on this package, from the same start and on the same text. The losses are the
same. Then each model takes single steps at growing lengths, and trains at the longest. It does so in a process whose
memory the operating system limits to a budget above the memory of the built model.
"""

import argparse
import multiprocessing
import os
import re
import resource
import statistics
import sys
import sysconfig
import threading
from pathlib import Path

# On a machine that does other work too, OpenMP's threads waiting in a loop for one another make a step 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import torch
from _byte_model import draw_windows, read_text
from _span_corruption import SENTINELS, build_model, corrupt, num_spans
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import T5ForConditionalGeneration

from triton_offset_bias.integrations.transformers import enable_offset_bias

EAGER, OURS = "eager attention", "this package"
COLOURS = {EAGER: "#cc6677", OURS: "#332288"}
LEARNING_RATE, HELD_OUT_BATCHES = 3e-3, 8
OUT_OF_MEMORY = float("nan")


def build(name: str, seed: int) -> T5ForConditionalGeneration:
    """The model on eager attention or on this package; its parameters are the same."""
    model = build_model(seed)
    if name == OURS:
        enable_offset_bias(model)
    return model


def draw(text: Tensor, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of corrupted windows of `length` bytes."""
    return corrupt(draw_windows(text, batch, length - 1, generator), generator)


def train(
    model: T5ForConditionalGeneration, text: Tensor, name: str, batch: int, length: int, steps: int, seed: int
) -> list[float]:
    """Trains on `steps` batches; gives their losses, in nats per target token."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with tqdm(total=steps * batch * length, desc=f"{name}, {length} bytes", unit="bytes", unit_scale=True) as progress:
        for _ in range(steps):
            loss = model(**draw(text, batch, length, generator)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix_str(f"loss {statistics.fmean(losses[-20:]):.3f}", refresh=False)
            progress.update(batch * length)
    return losses


@torch.no_grad()
def evaluate(model: T5ForConditionalGeneration, text: Tensor, batch: int, length: int, seed: int) -> float:
    """The mean loss on batches of held-out files."""
    generator = torch.Generator().manual_seed(seed)
    return statistics.fmean(model(**draw(text, batch, length, generator)).loss.item() for _ in range(HELD_OUT_BATCHES))


def compare_at_short_length(text: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Trains the model both ways and prints how alike the losses are."""
    batch = max(1, args.length // args.short_length)
    losses, rows = {}, []
    for name in (EAGER, OURS):
        model = build(name, args.seed)
        losses[name] = train(model, text, name, batch, args.short_length, args.steps, args.seed)
        last = statistics.fmean(losses[name][-max(1, args.steps // 10) :])
        rows.append([name, losses[name][0], last, evaluate(model, held_out, batch, args.short_length, args.seed)])
    columns = ["attention", "loss, first step", "loss, last 10 %", "loss, held out"]
    print(f"\nThe same training at {args.short_length} bytes, {args.steps} steps of {batch} windows:")
    print(pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="{:.5f}".format))
    apart = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    first = min(10, args.steps)
    print(
        f"the losses of a step differ by {max(apart[:first]):.1e} at most in the first {first} steps, by "
        f"{max(apart):.1e} in all: training lets rounding grow\n",
        flush=True,
    )
    return losses


def status_bytes(field: str) -> int:
    """A size of this process in bytes: "VmSize" (its address space), "VmRSS" (its memory), "VmHWM" (its peak)."""
    return int(re.findall(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def under_budget(name: str, text: Tensor, length: int, steps: int, budget: int, seed: int) -> tuple[list[float], float]:
    """Trains on single windows with no more than `budget` bytes above what the process holds with its model built.

    For a fresh process: neither a limit nor a peak is ever forgotten.

    Returns:
        The losses, and the bytes by which memory grew at its peak; no losses and NaN if the budget was not enough.
    """
    torch.set_num_threads(1)  # the address space of another thread would count as the training's
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, left over when the pool ends this process
    model = build(name, seed)
    size, held = status_bytes("VmSize"), status_bytes("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (size + budget, size + budget))
    try:
        losses = train(model, text, name, 1, length, steps, seed)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        return [], OUT_OF_MEMORY
    return losses, status_bytes("VmHWM") - held


def compare_under_budget(text: Tensor, args: argparse.Namespace) -> tuple[pd.DataFrame, list[float]]:
    """Measures and prints memory of a step over the length, both ways, and losses of training at the longest length."""
    lengths = [args.length // 2**i for i in range(1 if args.quick else 3, -1, -1)]
    budget = args.budget * 2**20
    jobs = [(name, text, length, 1, budget, args.seed) for length in lengths for name in (EAGER, OURS)]
    jobs.append((OURS, text, args.length, args.long_steps, budget, args.seed))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pandas", "matplotlib.figure", "triton_offset_bias.integrations.transformers.t5"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        results = pool.starmap(under_budget, jobs, chunksize=1)
    peaks = [peak / 2**20 for _, peak in results]
    table = pd.DataFrame({EAGER: peaks[:-1:2], OURS: peaks[1::2]}, index=pd.Index(lengths, name="bytes"))
    print(f"\nMiB that the first training step takes above its model, of {args.budget} MiB that it may take:")
    print(table.to_string(na_rep="out of memory", float_format="{:.0f}".format))
    losses = results[-1][0]
    if losses:
        last = statistics.fmean(losses[-max(1, len(losses) // 10) :])
        print(
            f"\n{len(losses)} steps with {OURS} at {args.length} bytes: {peaks[-1]:.0f} MiB, "
            f"loss {losses[0]:.3f} at first, {last:.3f} in the last 10 %"
        )
    return table, losses


def plot(path: Path, short: dict[str, list[float]], memory: pd.DataFrame, long: list[float], budget: int) -> None:
    """Writes a PNG: the losses at the short length, memory over the length, the losses at the longest."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, losses), style in zip(short.items(), ("-", "--"), strict=True):
        left.plot(range(1, len(losses) + 1), losses, style, color=COLOURS[name], linewidth=1.6, label=name)
    left.set_title("Same training, same losses")
    for name, marker in ((EAGER, "s"), (OURS, "o")):
        middle.plot(memory.index, memory[name], f"{marker}-", color=COLOURS[name], label=name)
        failed = memory.index[memory[name].isna()]
        middle.plot(failed, [budget] * len(failed), "x", color=COLOURS[name], ms=11, mew=3, label=None)
    middle.axhline(budget, color="black", linestyle=":", label=f"the budget, {budget} MiB (x: out of memory)")
    middle.set_xscale("log", base=2)
    middle.set_yscale("log")
    middle.set_xticks(memory.index, [str(length) for length in memory.index])
    middle.set_ylim(top=3 * budget)
    middle.yaxis.set_major_formatter("{x:.0f}")
    middle.yaxis.set_minor_formatter("{x:.0f}")
    middle.set(xlabel="length (bytes)", ylabel="memory of a step above its model (MiB)")
    middle.set_title("Memory of a training step")
    right.plot(range(1, len(long) + 1), long, color=COLOURS[OURS], linewidth=1.6, label=OURS)
    right.set_title(f"Training at {memory.index[-1]} bytes within the budget")
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="loss (nats per target token)")
    for axes in (left, middle, right):
        axes.legend(frameon=False, loc="upper left" if axes is middle else "upper right")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse_args() -> argparse.Namespace:
    """The command line's arguments, checked."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_path("stdlib"))
    add("--text-dir", type=Path, default=stdlib, help="folder of .py files (default: the standard library)")
    add("--length", type=int, default=4096, help="bytes per window of the long training (default: 4096)")
    add("--short-length", type=int, default=256, help="bytes per window of the comparison (default: 256)")
    add("--budget", type=int, default=512, help="MiB that training may take above its model (default: 512)")
    add("--steps", type=int, help="steps of each short training (default: 100; with --quick: 6)")
    add("--long-steps", type=int, help="steps of the long training (default: 40; with --quick: 3)")
    add("--seed", type=int, default=0, help="seed of the initial values and of the order of the text (default: 0)")
    out = Path(__file__).parent / "out"
    add("--output-dir", type=Path, default=out, help="folder to write t5_long.png into (default: examples/out)")
    add("--quick", action="store_true", help="take few steps, to check that everything works")
    args = parser.parse_args()
    args.steps = (6 if args.quick else 100) if args.steps is None else args.steps
    args.long_steps = (3 if args.quick else 40) if args.long_steps is None else args.long_steps
    minima = {"length": 64, "short_length": 8, "budget": 1, "steps": 1, "long_steps": 1, "seed": 0}
    for name, minimum in minima.items():
        if getattr(args, name) < minimum:
            parser.error(f"`--{name.replace('_', '-')}` must be at least {minimum}, got {getattr(args, name)}")
    for length in (args.length, args.short_length):
        if num_spans(length) > SENTINELS:
            parser.error(f"windows must have at most {SENTINELS} spans, got {num_spans(length)} at {length} bytes")
    if sys.platform != "linux":
        parser.error("the memory budget needs Linux")
    return args


def main() -> None:
    """Compares, prints the tables and writes the picture."""
    args = parse_args()
    try:
        text, held_out = read_text(args.text_dir, min_bytes=4 * args.length)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    short = compare_at_short_length(text, held_out, args)
    memory, long = compare_under_budget(text, args)
    path = args.output_dir / "t5_long.png"
    plot(path, short, memory, long, args.budget)
    print(f"\nthe picture: {path}")


if __name__ == "__main__":
    main()
