"""Processes that are the ranks of a world, with gloo on this machine."""

import faulthandler
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

# Ranks are forked by a process that has imported this already.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "triton_offset_bias"])
HANGS_AFTER = 900  # seconds; a rank that is stuck then says where, and ends


def run_ranks(work: Callable, world: int, folder: Path, *arguments: object, timeout: float = 60.0) -> None:
    """Runs ``work(rank, world, *arguments)`` in `world` processes. Messages fail after `timeout` seconds."""
    store = folder / f"world of {world}"
    multiprocessing.start_processes(
        _rank, (work, world, str(store), timeout, arguments), nprocs=world, start_method="forkserver"
    )


def _rank(rank: int, work: Callable, world: int, store: str, timeout: float, arguments: tuple) -> None:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")  # ranks meet on this machine, whatever its name is
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    try:
        work(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive their group, and a process that ends by itself would then abort
