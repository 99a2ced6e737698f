"""Part 1: compiles in parallel processes what the later parts measure, so that they find it in caches on disk."""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch._inductor.config
import triton

from bench.cases import BACKWARD, FORWARD, GPU_CLAMP, Case, make_inputs
from bench.gpu_report import search, speed
from bench.gpu_report.part import DEVICE, IS_DRY, case_of, first_line
from bench.providers import PROVIDERS
from bench.steps import make_step
from triton_offset_bias.backends.triton import configs, launch, plan
from triton_offset_bias.backends.triton.target import current_target

LENGTH = 1024  # kernels do not depend on it; what torch.compile makes does
MOST_PROCESSES = 12


class Task(NamedTuple):
    """What one process compiles at a time: a provider of a case, or the candidates of all kernels with an index."""

    case: Case
    provider: str = ""
    candidate: int = 0


def main() -> None:
    """Compiles all tasks, and says how long each took."""
    context = multiprocessing.get_context("spawn")  # a fork has no CUDA
    count = 2 if IS_DRY else min(MOST_PROCESSES, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(count, context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(compile_task, task) for task in tasks()]):
            print(future.result())


def tasks() -> Iterator[Task]:
    """The slowest to compile first, then by what is measured first."""
    for dim in speed.HEAD_DIMS:
        for name in speed.COMPILED:
            yield Task(case_of(speed.SLOW_LENGTH, dim, GPU_CLAMP, True), name)
    for dim in speed.HEAD_DIMS:
        for clamp, is_causal in ((GPU_CLAMP, True), (None, True), (GPU_CLAMP, False)):
            names = ("ours", "ours_no_bias", "ours_atomics") if clamp else ("ours",)
            for name in names:
                yield Task(case_of(LENGTH, dim, clamp, is_causal), name)
    if not IS_DRY:
        for dim in search.HEAD_DIMS:
            for index in range(max(map(len, configs.CANDIDATES.values()))):
                yield Task(case_of(LENGTH, dim, GPU_CLAMP, True), candidate=index)


def compile_task(task: Task) -> str:
    """Runs what has to be compiled, and returns a line about it."""
    start = time.monotonic()
    try:
        run_provider(task) if task.provider else run_candidates(task)
        state = "compiled"
    except Exception as error:
        state = first_line(error)
    what = task.provider or f"candidate {task.candidate} of every kernel"
    return f"{task.case.name}: {what}: {state} in {time.monotonic() - start:.1f} s"


def run_provider(task: Task) -> None:
    """Runs a provider forward and backward."""
    inputs, provider = make_inputs(task.case, DEVICE), PROVIDERS[task.provider]
    torch._inductor.config.compile_threads = 1  # processes enough are at work
    run = provider.prepare(inputs)
    for mode in (FORWARD, BACKWARD):
        if DEVICE != "cpu" or mode in provider.cpu_modes:
            step = make_step(provider, run, inputs, mode)
            step.timed(step.before())


def run_candidates(task: Task) -> None:
    """Runs a pass in which every kernel has one candidate, which therefore is not measured."""
    every = configs.CANDIDATES
    configs.CANDIDATES = {kernel: [_candidate(kernel, task)] for kernel in every}
    launch._tuned.cache_clear()  # of the candidates before
    plan._plans.clear()
    try:
        search.run_tuned(task.case)
    finally:
        configs.CANDIDATES = every


def _candidate(kernel: str, task: Task) -> configs.Config:
    """The task's candidate of a kernel, among those that may fit; the first ones again where there are fewer."""
    kind = current_target(), getattr(torch, task.case.dtype), triton.next_power_of_2(task.case.head_dim)
    fitting = [config for config in configs.CANDIDATES[kernel] if configs.may_fit(kernel, config, *kind)]
    return fitting[task.candidate % len(fitting)]


if __name__ == "__main__":
    main()
