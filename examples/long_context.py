"""Trains a byte-level language model with a bias per offset on sequences that are spread over several processes.

    python examples/long_context.py            # some minutes on two CPU cores; nothing is downloaded
    python examples/long_context.py --quick    # about a minute, too short to learn much
    torchrun --nproc-per-node 2 examples/long_context.py    # the same; without torchrun the program starts it

The text is the source of Python's standard library. At a short length the model trains twice from the same start: in
one process, and spread over all. The losses are the same. Then one process alone tries a step at a long length, within
a memory budget that the operating system enforces, and fails. With the sequence spread over all processes, each within
the same budget, the model trains at that length. Sequences are spread by `parallelize_context`, parameters are copied
by DDP, or sharded by FSDP with `--fsdp`. With `--data-parallel N`, N groups of processes have different sequences.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has a core
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _byte_model import ByteTransformer, draw_windows, read_text
from _byte_plot import COLOURS, plot_bias
from _training import Descent
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from triton_offset_bias import distributed
from triton_offset_bias.modules import OffsetBias

NUM_HEADS, NUM_LAYERS, WIDTH = 4, 2, 64
LAYOUT = "zigzag"
RATE, BIAS_RATE = 4e-3, 4e-2
REFUSED = 3  # exit status of the process that tries alone


def build_model(args: argparse.Namespace, length: int) -> ByteTransformer:
    """The model, with the same numbers in every process."""
    torch.manual_seed(args.seed)
    return ByteTransformer(WIDTH, NUM_HEADS, NUM_LAYERS, OffsetBias(NUM_HEADS, length, bidirectional=False))


def build_descent(model: nn.Module, steps: int) -> Descent:
    """The optimiser of all parameters."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias.weight") and p.shape[0] == NUM_HEADS]
    return Descent(model, biases, rate=RATE, bias_rate=BIAS_RATE, steps=steps, weight_decay=0.01)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of some positions, in bits per byte."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / torch.tensor(2.0).log().item()


def wrap(model: ByteTransformer, mesh: DeviceMesh, args: argparse.Namespace) -> nn.Module:
    """The model spread over the ranks of the mesh: sequences over "context", parameters over all."""
    distributed.parallelize_context(model, mesh["context"], layout=LAYOUT, method=args.method)
    return fully_shard(model, mesh=mesh._flatten()) if args.fsdp else DistributedDataParallel(model)


def train(
    model: nn.Module,
    text: Tensor,
    length: int,
    steps: int,
    mesh: DeviceMesh | None,
    args: argparse.Namespace,
    name: str,
) -> list[float]:
    """Trains on windows of `length` bytes, as many as there are data-parallel groups; the losses of all processes."""
    descent = build_descent(model, steps)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    is_quiet = mesh is not None and dist.get_rank() > 0
    with tqdm(total=steps * length, desc=name, unit="bytes", unit_scale=True, disable=is_quiet) as progress:
        for _ in range(steps):
            windows = draw_windows(text, args.data_parallel, length, generator)
            tokens, targets = windows[:, :-1], windows[:, 1:]
            if mesh is not None:
                mine = mesh.get_local_rank("data")
                tokens, targets = (
                    distributed.shard(x[mine : mine + 1], 1, mesh["context"], LAYOUT) for x in (tokens, targets)
                )
            loss = torch.tensor(descent.step(loss_of(model, tokens, targets)))
            if mesh is not None:
                dist.all_reduce(loss)
                loss /= dist.get_world_size()
            losses.append(loss.item())
            progress.set_postfix_str(f"{statistics.fmean(losses[-20:]):.3f} bits/byte", refresh=False)
            progress.update(length)
    return losses


@contextlib.contextmanager
def limited_memory(budget: int) -> Iterator[None]:
    """A context in which this process has at most `budget` MiB of data above what it has now; 0 is no limit."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if budget:
        size = int((status_mib("VmData") + budget) * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def status_mib(field: str) -> float:
    """A size of this process in MiB: "VmData" (its data), "VmRSS" (its memory), "VmHWM" (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def try_alone(text: Tensor, args: argparse.Namespace) -> None:
    """One step at the long length in this process alone, within the budget; ends the process."""
    model = build_model(args, args.length)
    held = status_mib("VmRSS")
    try:
        with limited_memory(args.budget):
            train(model, text, args.length, 1, None, args, "one process")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(REFUSED)
    print(f"{status_mib('VmHWM') - held:.0f}", flush=True)


def alone(args: argparse.Namespace, budget: int) -> float:
    """The MiB that a step takes in a fresh process by itself; NaN if the budget refuses it."""
    kept = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, __file__, "--alone", "--length", str(args.length), "--budget", str(budget)]
    command += ["--text-dir", str(args.text_dir), "--seed", str(args.seed)]
    found = subprocess.run(command, env=kept, capture_output=True, text=True)
    if found.returncode not in (0, REFUSED):
        raise RuntimeError(f"the process that trains alone failed: {found.stderr}")
    return float("nan") if found.returncode else float(found.stdout)


def plot(path: Path, short: dict[str, list[float]], long: list[float], table: Tensor, args: argparse.Namespace) -> None:
    """Writes a PNG: the losses both ways, the losses at the long length, the learned bias."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, losses), colour, style in zip(short.items(), (COLOURS[6], COLOURS[0]), ("-", "--"), strict=True):
        left.plot(range(1, len(losses) + 1), losses, style, color=colour, linewidth=1.8, label=name)
    left.set_title(f"{args.short_length} bytes: the same training, the same losses")
    middle.plot(range(1, len(long) + 1), long, color=COLOURS[0], linewidth=1.8)
    middle.set_title(f"{args.length} bytes: spread over {dist.get_world_size()} processes")
    for axes in (left, middle):
        axes.set(xlabel="step", ylabel="loss (bits per byte)")
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    plot_bias(right, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def compare_at_short_length(text: Tensor, mesh: DeviceMesh, args: argparse.Namespace) -> dict[str, list[float]]:
    """Trains both ways, and prints how alike the losses are."""
    length, steps = args.short_length, args.steps
    losses = {}
    if dist.get_rank() == 0:
        losses["one process"] = train(build_model(args, length), text, length, steps, None, args, "one process")
    dist.barrier()
    ranks = dist.get_world_size()
    spread = wrap(build_model(args, length), mesh, args)
    losses[f"{ranks} processes"] = train(spread, text, length, steps, mesh, args, f"{ranks} processes")
    if dist.get_rank() == 0:
        apart = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
        rows = [[name, x[0], statistics.fmean(x[-max(1, steps // 10) :])] for name, x in losses.items()]
        print(f"\nThe same training at {length} bytes, {steps} steps:")
        print(pd.DataFrame(rows, columns=["", "loss, first step", "loss, last 10 %"]).to_string(index=False))
        print(f"the losses of a step differ by {max(apart[:10]):.1e} at most in the first 10 steps\n", flush=True)
    return losses


def run(text: Tensor, args: argparse.Namespace) -> None:
    """The whole comparison, in every process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = (args.data_parallel, ranks // args.data_parallel)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "context"))
    short = compare_at_short_length(text, mesh, args)
    needed = [alone(args, 0), alone(args, args.budget)] if rank == 0 else [0.0, 0.0]
    dist.barrier()
    model = build_model(args, args.length)
    spread = wrap(model, mesh, args)
    held = status_mib("VmRSS")
    with limited_memory(args.budget):
        long = train(spread, text, args.length, args.long_steps, mesh, args, f"{ranks} processes")
    peak = torch.tensor(status_mib("VmHWM") - held)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    table = model.bias.weight.detach()
    table = table.full_tensor() if hasattr(table, "full_tensor") else table
    if rank == 0:
        refused = "refused" if pd.isna(needed[1]) else "granted"
        print(f"\nMiB that training at {args.length} bytes takes above its model, of {args.budget} that it may take:")
        print(
            f"  one process    {needed[0]:6.0f}    {refused}\n  {ranks} processes, each {peak.item():4.0f}    granted"
        )
        print(f"loss {long[0]:.3f} at first, {statistics.fmean(long[-max(1, len(long) // 10) :]):.3f} in the last 10 %")
        path = args.output_dir / "long_context.png"
        plot(path, short, long, table, args)
        print(f"\nthe picture: {path}")


def parse_args() -> argparse.Namespace:
    """The command line's arguments, checked."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_path("stdlib"))
    add("--text-dir", type=Path, default=stdlib, help="folder of .py files (default: the standard library)")
    add("--ranks", type=int, default=2, help="processes, where torchrun does not say (default: 2)")
    add("--data-parallel", type=int, default=1, help="groups of processes with sequences of their own (default: 1)")
    add("--method", choices=("gather", "ring", "all_to_all"), default="ring", help="see docs/distributed.md (ring)")
    add("--fsdp", action="store_true", help="shard parameters by FSDP (default: copy them by DDP)")
    add("--length", type=int, default=8192, help="bytes of a long sequence (default: 8192)")
    add("--short-length", type=int, default=512, help="bytes of a short sequence (default: 512)")
    add("--budget", type=int, default=100, help="MiB that a process may take above its model (default: 100)")
    add("--steps", type=int, help="steps of each short training (default: 100; with --quick: 5)")
    add("--long-steps", type=int, help="steps of the long training (default: 60; with --quick: 2)")
    add("--seed", type=int, default=0, help="seed of the initial values and of the order of the text (default: 0)")
    add("--output-dir", type=Path, default=Path(__file__).parent / "out", help="folder of the picture (examples/out)")
    add("--quick", action="store_true", help="take few steps, to check that everything works")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = (5 if args.quick else 100) if args.steps is None else args.steps
    args.long_steps = (2 if args.quick else 60) if args.long_steps is None else args.long_steps
    ranks = int(os.environ.get("WORLD_SIZE", args.ranks))
    for name in ("ranks", "data_parallel", "steps", "long_steps", "length", "short_length"):
        if getattr(args, name) < 1:
            parser.error(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(args, name)}")
    if ranks % args.data_parallel:
        parser.error(f"`--data-parallel` must divide the {ranks} processes, got {args.data_parallel}")
    for length in (args.length, args.short_length):
        if length % ranks:
            parser.error(f"lengths must be multiples of the {ranks} processes, got {length}")
    if sys.platform != "linux":
        parser.error("the memory budget needs Linux")
    return args


def main() -> None:
    """Starts the processes, or is one of them."""
    args = parse_args()
    try:
        text, _ = read_text(args.text_dir, min_bytes=2 * args.length)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    torch.set_num_threads(1)
    if args.alone:
        try_alone(text, args)
    elif "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        os.execv(sys.executable, [*launcher, *sys.argv])
    else:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
        run(text, args)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
