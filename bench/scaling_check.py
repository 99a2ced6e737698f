"""The model of `bench.scaling` against gloo ranks on this machine: bytes, and the share of the work."""

import tempfile
import time

import torch
import torch.distributed as dist
from torch import multiprocessing

from bench.scaling import steps_of
from bench.spread import DIM, HEADS, join, step
from triton_offset_bias import distributed
from triton_offset_bias.distributed.plan import Layout, Plan
from triton_offset_bias.table import UNLIMITED

LENGTH, RANKS = 2048, (2, 4)
LAYOUTS = ("contiguous", "zigzag")


def _run(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    for layout in LAYOUTS:
        inputs = [torch.randn(1, HEADS, LENGTH // world, DIM, requires_grad=True) for _ in range(3)]
        table = torch.zeros(HEADS, 2 * LENGTH - 1, requires_grad=True)

        def attend(*leaves: torch.Tensor, layout: str = layout) -> torch.Tensor:
            return distributed.offset_bias_attention(*leaves, is_causal=True, layout=layout, method="ring")

        seconds, sent = [], (0, 0)
        for _ in range(4):  # the first is a warm-up
            begin = time.process_time()
            sent = step(attend, [*inputs, table])
            seconds.append(time.process_time() - begin)
        found: list = [None] * world
        dist.all_gather_object(found, (sent, min(seconds[1:])))
        if rank == 0:
            _compare(world, layout, [sum(x[i] for x, _ in found) for i in range(2)], [x for _, x in found])
    dist.destroy_process_group()


def _compare(world: int, layout: str, sent: list[int], seconds: list[float]) -> None:
    plan = Plan(Layout((LENGTH, LENGTH), world, 1, layout, 0, 0, UNLIMITED, None, False))
    everyone = [list(steps_of(plan, rank)) for rank in range(world)]
    travelling = sum(step.keys for steps in everyone for step in steps[1:])
    bytes_modelled = 2 * travelling * HEADS * DIM * 4, 4 * travelling * HEADS * DIM * 4
    work = [sum(step.pairs for step in steps) for steps in everyone]
    print(
        f"{world} ranks, {layout}: sent {sent[0]} and {sent[1]} bytes, modelled {bytes_modelled[0]} and "
        f"{bytes_modelled[1]}; busiest rank over mean: processor time {world * max(seconds) / sum(seconds):.2f}, "
        f"modelled {world * max(work) / sum(work):.2f}",
        flush=True,
    )
    if list(bytes_modelled) != sent:
        raise SystemExit("the model sends other bytes than the package")


def check() -> None:
    """Prints measured and modelled numbers; a difference in bytes is an error."""
    for world in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_run, (world, folder), nprocs=world)
