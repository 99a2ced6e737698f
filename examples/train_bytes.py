"""Trains a small byte-level language model on the source of Python's standard library and shows what it learned.

    python examples/train_bytes.py            # 2 to 3 minutes on two CPU cores; nothing is downloaded
    python examples/train_bytes.py --quick    # about half a minute, too short to learn much

Two models start equal and see the same bytes. The first has a learned bias per offset (`OffsetBias`, initially 0, one
table for all layers). The second knows nothing of positions except the causal order. Then a training step of the first
model is compared with a step of the same model on torch's SDPA, which gets the bias of every query-key pair.

A few hundred thousand bytes are far too few for either model to converge. The curves compare how fast the models learn,
not where they would end. The same seed gives the same losses on one machine's CPU, and on CUDA up to rounding.
"""

import argparse
import multiprocessing
import os
import re
import resource
import statistics
import sys
import sysconfig
import time
from pathlib import Path

# On a machine that does other work too, OpenMP's threads waiting in a loop for one another make a step 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import psutil
import torch
from _byte_model import ByteTransformer, draw_windows, read_text
from _byte_plot import plot_run
from torch import Tensor
from tqdm import tqdm

from triton_offset_bias.modules import OffsetBias

LEARNED = "learned offset bias"
NUM_HEADS, NUM_LAYERS = 8, 4
LEARNING_RATE, TABLE_LEARNING_RATE = 4e-3, 4e-2  # the table's entries have to travel several nats from 0
HELD_OUT_WINDOWS, EVALUATIONS = 32, 6


def build_model(args: argparse.Namespace, with_bias: bool) -> ByteTransformer:
    """The model of `args`. All parameters but the bias's start with the same values, with or without a bias."""
    torch.manual_seed(args.seed)
    bias = OffsetBias(NUM_HEADS, args.length, bidirectional=False) if with_bias else None
    return ByteTransformer(args.width, NUM_HEADS, NUM_LAYERS, bias).to(args.device)


def build_optimizer(model: ByteTransformer) -> torch.optim.AdamW:
    """AdamW; the table has a learning rate of its own and does not decay."""
    tables = [p for name, p in model.named_parameters() if name == "bias.weight"]
    others = [p for name, p in model.named_parameters() if name != "bias.weight"]
    groups = [{"params": others, "lr": LEARNING_RATE}]
    if tables:
        groups.append({"params": tables, "lr": TABLE_LEARNING_RATE, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(model: ByteTransformer, windows: Tensor) -> float:
    """Bits per byte on `windows`."""
    return statistics.fmean(model.bits_per_byte(window).item() for window in windows.split(1))


def train(
    name: str, model: ByteTransformer, text: Tensor, held_out: Tensor, args: argparse.Namespace
) -> tuple[pd.DataFrame, float]:
    """Trains `model` on windows of `text`; returns its losses, as `plot_run` takes them, and its tokens per second."""
    optimizer = build_optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=args.steps + 1, pct_start=0.07, anneal_strategy="linear", cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(args.seed)
    step_tokens = args.batch * args.length
    evaluate_every = args.steps if args.quick else max(1, args.steps // EVALUATIONS)
    rows, seconds = [], 0.0
    progress = tqdm(total=args.steps * step_tokens, desc=f"{name:19}", unit="tokens", unit_scale=True)
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        loss = model.bits_per_byte(draw_windows(text, args.batch, args.length, generator).to(args.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        rows.append({"training": loss.item(), "held out": float("nan")})
        seconds += time.perf_counter() - start
        if step == args.steps or step % evaluate_every == 0:
            rows[-1]["held out"] = evaluate(model, held_out)
        recent = statistics.fmean(row["training"] for row in rows[-50:])
        progress.set_postfix_str(f"{recent:.3f} bits/byte", refresh=False)
        progress.update(step_tokens)
    progress.close()
    seen = pd.RangeIndex(step_tokens, (args.steps + 1) * step_tokens, step_tokens)
    return pd.DataFrame(rows, index=seen), args.steps * step_tokens / seconds


def time_steps(model: ByteTransformer, windows: Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of forward and backward, by the package and by SDPA in turn; checks first that they agree."""
    losses = [model.bits_per_byte(windows, materialised=materialised) for materialised in (False, True)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    del losses
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):  # the first round is a warm-up
        for materialised, taken in enumerate(seconds):
            model.zero_grad()
            start = time.perf_counter()
            model.bits_per_byte(windows, materialised=bool(materialised)).backward()
            if windows.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def peak_resident() -> int:
    """The peak memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at what the parent process held
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_memory(args: argparse.Namespace, length: int, materialised: bool) -> int:
    """Bytes by which a process's first training step, at its peak, exceeds the memory with the model built.

    Call it in a fresh process: a peak is never forgotten.
    """
    model = build_model(args, with_bias=True)
    optimizer = build_optimizer(model)
    windows = torch.randint(256, (args.batch, length + 1), device=args.device)
    on_cuda = windows.is_cuda
    before = torch.cuda.memory_allocated() if on_cuda else psutil.Process().memory_info().rss
    model.bits_per_byte(windows, materialised=materialised).backward()
    optimizer.step()
    return (torch.cuda.max_memory_allocated() if on_cuda else peak_resident()) - before


def measure_costs(model: ByteTransformer, text: Tensor, args: argparse.Namespace) -> pd.DataFrame:
    """Step time and peak memory of the package and of SDPA, a row per sequence length."""
    lengths = [args.length] if args.quick else [args.length, 4 * args.length]
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        jobs = [(args, length, materialised) for length in lengths for materialised in (False, True)]
        peaks = pool.starmap(step_memory, jobs, chunksize=1)
    for length, *peak in zip(lengths, peaks[::2], peaks[1::2], strict=True):
        windows = draw_windows(text, args.batch, length, torch.Generator().manual_seed(args.seed)).to(args.device)
        ours, sdpa = time_steps(model, windows, rounds=3 if args.quick else max(3, 15 * args.length // length))
        memory = [size / 2**20 for size in peak]
        rows.append([length, ours * 1e3, sdpa * 1e3, sdpa / ours, *memory, memory[1] / memory[0]])
    columns = ["length", "time, ms", "SDPA's, ms", "time ratio", "memory, MiB", "SDPA's, MiB", "memory ratio"]
    return pd.DataFrame(rows, columns=columns)


def parse_args() -> argparse.Namespace:
    """The command line's arguments, checked."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_path("stdlib"))
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(__file__).parent / "out"
    add(
        "--text-dir",
        type=Path,
        default=stdlib,
        help="folder of .py files to learn from (default: the standard library)",
    )
    add("--length", type=int, default=512, help="bytes per sequence, and entries of the table per head (default: 512)")
    add("--batch", type=int, default=1, help="sequences per step (default: 1)")
    add("--width", type=int, default=128, help=f"size of the hidden state, a multiple of {NUM_HEADS} (default: 128)")
    add("--steps", type=int, help="training steps of each run (default: 500; with --quick: 40)")
    add("--seed", type=int, default=0, help="seed of the initial values and of the order of the text (default: 0)")
    add("--device", choices=("cpu", "cuda"), default=default_device, help="device (default: cuda if there is one)")
    add("--output-dir", type=Path, default=out, help="folder to write train_bytes.png into (default: examples/out)")
    add("--quick", action="store_true", help="take few steps at one length, to check that everything works")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 40 if args.quick else 500
    for name, minimum in {"length": 2, "batch": 1, "width": NUM_HEADS, "steps": 1, "seed": 0}.items():
        if getattr(args, name) < minimum:
            parser.error(f"`--{name}` must be at least {minimum}, got {getattr(args, name)}")
    if args.width % NUM_HEADS:
        parser.error(f"`--width` must be a multiple of {NUM_HEADS}, got {args.width}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a CUDA device and a torch built for it; there is none here")
    return args


def main() -> None:
    """Trains both models, prints the tables and writes the picture."""
    args = parse_args()
    try:
        text, held_out = read_text(args.text_dir, min_bytes=4 * args.length + 1)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    print(
        f"{len(text) / 1e6:.1f} MB of text from {args.text_dir}, {len(held_out) / 1e6:.1f} MB of other files held out"
    )
    windows = draw_windows(held_out, HELD_OUT_WINDOWS, args.length, torch.Generator().manual_seed(args.seed))
    models = {name: build_model(args, name == LEARNED) for name in (LEARNED, "no positions")}
    losses, quality = {}, []
    for name, model in models.items():
        losses[name], speed = train(name, model, text, windows.to(args.device), args)
        training = losses[name]["training"].tail(max(1, args.steps // 10)).mean()
        parameters = sum(p.numel() for p in model.parameters())
        quality.append([name, parameters, losses[name]["held out"].iloc[-1], training, round(speed)])
    print("measuring step time and memory ...", flush=True)
    costs = measure_costs(models[LEARNED], text, args)
    columns = ["model", "parameters", "held-out bits/byte", "training bits/byte (last 10 %)", "tokens/s"]
    print(f"\n{pd.DataFrame(quality, columns=columns).to_string(index=False, float_format='{:.2f}'.format)}")
    print("\nA training step with the learned bias, by the package and by SDPA with the bias of every pair written out")
    print(
        "(time: median of forward + backward, in turn; memory: peak of a fresh process's first step above its model):"
    )
    print(costs.to_string(index=False, float_format="{:.1f}".format))
    plot_run(args.output_dir / "train_bytes.png", models[LEARNED].state_dict()["bias.weight"].cpu(), losses)
    print(f"\nthe picture: {args.output_dir / 'train_bytes.png'}")


if __name__ == "__main__":
    main()
