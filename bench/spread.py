"""Attention over ranks against one process, with gloo on this machine: ``python -m bench.spread``.

Efficiency is the processor time of one process over R times that of the busiest rank, where each has one thread. Ranks
and one process are measured in turn; the table has medians. Memory is the growth of a fresh process's peak by one step,
over its inputs. The last columns are the bytes that all ranks send, in units of the whole keys and values.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from tqdm import tqdm

from bench.memory import ALLOCATOR
from triton_offset_bias import distributed, offset_bias_attention
from triton_offset_bias.distributed import travel

HEADS, DIM = 4, 64
# Name: is it causal, and the layout that balances it.
KINDS = {"causal": (True, "zigzag"), "full": (False, "contiguous")}
METHODS = ("gather", "ring", "all_to_all")


def _inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM) for _ in range(3)]


def step(attend: Callable, leaves: list[Tensor]) -> tuple[int, int]:
    """Runs forward and backward. The result is the bytes that this rank has sent in each."""
    before = travel.sent_bytes
    out = attend(*leaves)
    middle = travel.sent_bytes
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return middle - before, travel.sent_bytes - middle


def _call(length: int, kind: str, method: str | None) -> tuple[Callable, list[Tensor]]:
    """The function of this rank's tensors, and these; by one process where there is no method."""
    is_causal, layout = KINDS[kind]
    whole, table = _inputs(length), torch.zeros(HEADS, 2 * length - 1, requires_grad=True)
    if method is None:
        leaves = [x.requires_grad_() for x in whole]
        return lambda *inputs: offset_bias_attention(*inputs, is_causal=is_causal), [*leaves, table]
    leaves = [distributed.shard(x, 2, layout=layout).requires_grad_() for x in whole]
    options = {"is_causal": is_causal, "layout": layout, "method": method}
    return lambda *inputs: distributed.offset_bias_attention(*inputs, **options), [*leaves, table]


def join(rank: int, world: int, folder: str) -> None:
    """Makes this process a rank, with one thread."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")  # ranks meet on this machine, whatever its name is
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)


def _time(rank: int, world: int, folder: str, length: int, kind: str, rounds: int) -> None:
    join(rank, world, folder)
    calls = {None: _call(length, kind, None) if rank == 0 else None}
    calls |= {method: _call(length, kind, method) for method in METHODS}
    seconds: dict[str | None, list[float]] = {method: [] for method in calls}
    sent: dict[str | None, tuple[int, int]] = {}
    for _ in tqdm(range(rounds + 1), desc=f"{kind}, {world} ranks", disable=rank > 0):  # the first is a warm-up
        for method, call in calls.items():
            dist.barrier()
            if call is not None:
                begin = time.process_time()
                sent[method] = step(*call)
                seconds[method].append(time.process_time() - begin)
    found: list = [None] * world
    dist.all_gather_object(found, (seconds, sent))
    if rank == 0:
        unit = 2 * HEADS * length * DIM * 4
        alone = statistics.median(seconds[None][1:])
        print(f"{kind}, L={length}: one process takes {alone:.3f} s of processor time")
        for method in METHODS:
            busiest = max(statistics.median(theirs[method][1:]) for theirs, _ in found)
            bytes_sent = [sum(theirs[method][i] for _, theirs in found) / unit for i in range(2)]
            print(
                f"  {method:10} {KINDS[kind][1]:10} busiest rank {busiest:.3f} s, "
                f"efficiency {alone / world / busiest:.2f}, "
                f"sent forward {bytes_sent[0]:.2f}, backward {bytes_sent[1]:.2f}"
            )
    dist.destroy_process_group()


def _status(field: str) -> float:
    """A number of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _memory(rank: int, world: int, folder: str, length: int, method: str | None) -> None:
    join(rank, world, folder)
    for size in (64 * world, length):  # the first is a warm-up
        attend, leaves = _call(size, "causal", method)
        gc.collect()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
        before = _status("VmRSS")
        step(attend, leaves)
        growth = _status("VmHWM") - before
        dist.barrier()
    found: list = [None] * world
    dist.all_gather_object(found, growth)
    if rank == 0:
        print(f"  {method or 'one process':11} on {world} ranks: {max(found):6.1f} MiB", flush=True)
    dist.destroy_process_group()


def _run(work: Callable, world: int, *arguments: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (work, world, folder, *arguments), nprocs=world)


def _rank(rank: int, work: Callable, *arguments: object) -> None:
    """One process: does its work and ends. gloo's threads may outlive their group, and would abort a usual end."""
    tqdm.set_lock(threading.RLock())  # the lock that tqdm makes is a semaphore, which only a usual end gives back
    work(rank, *arguments)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        "python -m bench.spread", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--length", type=int, default=8192, help="positions of the whole sequence (default: 8192)")
    add("--ranks", type=int, nargs="*", default=[2], help="numbers of ranks to time (default: 2)")
    add("--rounds", type=int, default=5, help="measurements of each, after a warm-up (default: 5)")
    add("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="what to time (default: all)")
    add("--memory-ranks", type=int, nargs="*", default=[2, 4], help="numbers of ranks to weigh (default: 2 4)")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32, {HEADS} heads of {DIM}")
    for world in args.ranks:
        for kind in args.kinds:
            _run(_time, world, args.length, kind, args.rounds)
    if args.memory_ranks:
        os.environ.update(ALLOCATOR)  # freed memory goes back to the system, in the ranks
        print(f"growth of the peak by a step, causal, L={args.length}:", flush=True)
        _run(_memory, 1, args.length, None)
        for world in args.memory_ranks:
            for method in METHODS:
                _run(_memory, world, args.length, method)


if __name__ == "__main__":
    main()
