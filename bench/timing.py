"""Interleaved timing: in every round each task runs once, so that the machine's state is the same for all of them."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from bench.steps import Step

SHORTEST_SAMPLE = 0.005  # seconds: shorter calls are repeated
GPU_WARM_UP, GPU_SAMPLE = 5, 30  # milliseconds
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Task:
    """A step, and the number of threads that it runs with."""

    step: Step
    threads: int


Sampler = Callable[[Task], float]  # seconds a call


@dataclass(frozen=True)
class Effort:
    """The length of a measurement in rounds of one call per task.

    It takes `rounds` rounds, or as many (at least `FEWEST_ROUNDS`) as begin within `limit` seconds.
    """

    rounds: int
    limit: float


def sampler_for(device: str, threads: int) -> Sampler:
    """The function that times tasks on a device.

    One thread on a CPU is timed in CPU time, which a busy neighbour disturbs less; it counts every thread of the
    process, so that a provider with helpers pays for them. More threads are timed in wall time. A GPU is timed by its
    own events, with an empty L2 cache, by `triton.testing.do_bench`.
    """
    if device != "cpu":
        return _GpuSampler(device)
    return _CpuSampler(time.process_time if threads == 1 else time.perf_counter)


class _CpuSampler:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._calls: dict[int, int] = {}  # of a task, in a sample

    def __call__(self, task: Task) -> float:
        if id(task) not in self._calls:
            self._mean(task, 1)  # warms it up
            self._calls[id(task)] = max(1, round(SHORTEST_SAMPLE / max(self._mean(task, 1), 1e-6)))
        return self._mean(task, self._calls[id(task)])

    def _mean(self, task: Task, calls: int) -> float:
        if torch.get_num_threads() != task.threads:
            torch.set_num_threads(task.threads)
            task.step.timed(task.step.before())  # the other threads start here
        total = 0.0
        for _ in range(calls):
            state = task.step.before()
            start = self._clock()
            task.step.timed(state)
            total += self._clock() - start
        return total / calls


class _GpuSampler:
    def __init__(self, device: str) -> None:
        from triton.testing import do_bench  # Triton is where GPUs are

        self._do_bench = partial(do_bench, warmup=GPU_WARM_UP, rep=GPU_SAMPLE, return_mode="median")
        self._device = torch.device(device)

    def __call__(self, task: Task) -> float:
        with torch.cuda.device(self._device):  # whose events are recorded
            state = task.step.before()
            return self._do_bench(lambda: task.step.timed(state)) / 1e3


def interleave(tasks: dict[str, Task], sample: Sampler, effort: Effort, about: str) -> dict[str, np.ndarray]:
    """Seconds per call of every task, one number a round; each round begins with the next task.

    Element r of every array is from round r. A peer that fails to warm up is left out.
    """
    tasks = _warm(tasks, sample, about)
    names = list(tasks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + effort.limit
    with _no_collection():
        for turn in tqdm(range(effort.rounds), desc=about, leave=False, unit="round"):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(sample(tasks[name]))
            if turn + 1 >= FEWEST_ROUNDS and time.perf_counter() > end:
                break
    return {name: np.array(values) for name, values in seconds.items()}


def _warm(tasks: dict[str, Task], sample: Sampler, about: str) -> dict[str, Task]:
    """The tasks that can run. This package's must."""
    warm = {}
    for name, task in tasks.items():
        try:
            sample(task)
            warm[name] = task
        except RuntimeError as error:  # for example because memory is too small for what backward keeps
            if name.startswith("ours"):
                raise
            tqdm.write(f"{about}: {name} is absent: {str(error).strip().partition(chr(10))[0]}")
    return warm


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
