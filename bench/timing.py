"""Interleaved timing: in every round each task runs once, so that all of them meet the same weather."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from bench.steps import Step

SHORTEST_SAMPLE = 0.005  # seconds: shorter calls are repeated
FEWEST_ROUNDS = 3

Clock = Callable[[], float]


@dataclass(frozen=True)
class Task:
    """A step, and the threads that it runs with."""

    step: Step
    threads: int


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds` rounds, or as many (at least `FEWEST_ROUNDS`) as begin within `limit` seconds."""

    rounds: int
    limit: float


def clock_for(device: str, threads: int) -> Clock:
    """The clock of a device: the one place that knows how to time there.

    One thread on a CPU is timed in CPU time, which a busy neighbour disturbs less; it counts every thread of the
    process, so that a provider with helpers pays for them. More threads are timed in wall time.
    """
    if device == "cpu":
        return time.process_time if threads == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def interleave(tasks: dict[str, Task], clock: Clock, effort: Effort, about: str) -> dict[str, np.ndarray]:
    """Seconds a call of every task, one number a round; each round begins with the next task.

    The arrays belong together: element r of all of them is from round r.
    """
    names = list(tasks)
    calls = {name: _calls(task, clock) for name, task in tasks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + effort.limit
    with _no_collection():
        for turn in tqdm(range(effort.rounds), desc=about, leave=False, unit="round"):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_sample(tasks[name], clock, calls[name]))
            if turn + 1 >= FEWEST_ROUNDS and time.perf_counter() > end:
                break
    return {name: np.array(values) for name, values in seconds.items()}


def _calls(task: Task, clock: Clock) -> int:
    """How many calls make a sample; warms the task up."""
    _sample(task, clock, 1)
    return max(1, round(SHORTEST_SAMPLE / max(_sample(task, clock, 1), 1e-6)))


def _sample(task: Task, clock: Clock, calls: int) -> float:
    if torch.get_num_threads() != task.threads:
        torch.set_num_threads(task.threads)
        task.step.timed(task.step.before())  # the other threads start here
    total = 0.0
    for _ in range(calls):
        state = task.step.before()
        start = clock()
        task.step.timed(state)
        total += clock() - start
    return total / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
