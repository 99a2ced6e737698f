"""The suites: each measures one case in one mode and gives rows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch._functorch import config as functorch_config
from tqdm import tqdm

from bench.cases import BACKWARD, FORWARD, Case, Inputs, ModelCase, make_inputs
from bench.floors import Floors
from bench.memory import measure_growth
from bench.models import model_steps
from bench.provider import AbsentError, Run
from bench.providers import PROVIDERS
from bench.rows import Row, RowMaker
from bench.steps import Checker, Step, make_step
from bench.timing import Effort, Task, interleave, sampler_for

GEMM_SIZE = 2048
THREADED_GEMM_SIZE = 1024  # takes about as long as the attention beside it
COPIED = 2**26  # numbers of float32: far more than caches hold


@dataclass(frozen=True)
class Plan:
    """The measurements of one case in one suite.

    Attributes:
        suite: one of `SUITES`.
        modes: some of `MODES`.
        providers: some of `PROVIDERS`, or of `ATTENTIONS` for models.
    """

    suite: str
    case: Case
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    device: str
    threads: int
    effort: Effort


def measure(plan: Plan, maker: RowMaker) -> Iterator[Row]:
    """Measures according to the plan. Providers that cannot run are left out, with a line that says why."""
    torch.set_num_threads(plan.threads)
    if plan.suite in ("memory", "gate_memory"):
        yield from _memory(plan, maker)
        return
    if isinstance(plan.case, ModelCase):
        for mode, steps in model_steps(plan.case, plan.providers, plan.modes).items():
            yield from _speed(plan, mode, steps, maker)
        return
    torch._dynamo.reset()  # else the shapes of earlier cases count towards the limit of recompilations
    inputs = make_inputs(plan.case, plan.device)
    runs = _checked_runs(plan, inputs)
    measure_mode = _MEASURES[plan.suite]
    for mode in plan.modes:
        able = [name for name in runs if _can_run(plan, name, mode)]
        repeats = plan.device != "cpu" and mode == BACKWARD
        steps = {
            name: make_step(PROVIDERS[name], runs[name], PROVIDERS[name].seen(inputs), mode, repeats) for name in able
        }
        yield from measure_mode(plan, mode, steps, maker)


def _speed(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    tasks = {name: Task(step, plan.threads) for name, step in steps.items()}
    seconds = interleave(tasks, sampler_for(plan.device, plan.threads), plan.effort, _about(plan, mode))
    for name, values in seconds.items():
        yield maker.make(plan.case, name, mode, "time", "ms", 1e3 * values, plan.threads)
        if "ours" in seconds:
            yield maker.make(plan.case, name, mode, "ratio", "x", values / seconds["ours"], plan.threads)


def _gpu(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    tasks = {name: Task(step, plan.threads) for name, step in steps.items()}
    seconds = interleave(tasks, sampler_for(plan.device, plan.threads), plan.effort, _about(plan, mode))
    for name, values in seconds.items():
        yield maker.make(plan.case, name, mode, "time", "ms", 1e3 * values, plan.threads)
        rate = plan.case.flops(mode) / values
        yield maker.make(plan.case, name, mode, "throughput", "TFLOP/s", rate / 1e12, plan.threads)


def _gemm(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    gemm = _sgemm(GEMM_SIZE, plan.device)
    tasks = {name: Task(step, plan.threads) for name, step in {**steps, "sgemm": gemm}.items()}
    seconds = interleave(tasks, sampler_for(plan.device, plan.threads), plan.effort, _about(plan, mode))
    gemm_rate = 2 * GEMM_SIZE**3 / seconds.pop("sgemm")
    yield maker.make(plan.case, "sgemm", mode, "rate", "GFLOP/s", gemm_rate / 1e9, plan.threads)
    for name, values in seconds.items():
        rate = plan.case.flops(mode) / values
        yield maker.make(plan.case, name, mode, "rate", "GFLOP/s", rate / 1e9, plan.threads)
        yield maker.make(plan.case, name, mode, "gemm_fraction", "1", rate / gemm_rate, plan.threads)


def _sgemm(size: int, device: str) -> Step:
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return Step(lambda _: torch.mm(a, b, out=out))


def _floors(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    """Rows of the share of the processor's peak, and of the share of the floors: products at the peak, then powers.

    The peak and the rate of powers are measured beside the attention.
    """
    try:
        floors = Floors(plan.case.dtype)
    except RuntimeError as error:
        tqdm.write(f"{_about(plan, mode)}: the floors are absent: {error}")
        return
    tasks = {name: Task(step, plan.threads) for name, step in steps.items()}
    tasks |= {"peak": Task(floors.products, plan.threads), "powers": Task(floors.powers, plan.threads)}
    seconds = interleave(tasks, sampler_for(plan.device, plan.threads), plan.effort, _about(plan, mode))
    peak, powers = floors.operations / seconds.pop("peak"), floors.count / seconds.pop("powers")
    yield maker.make(plan.case, "peak", mode, "rate", "GFLOP/s", peak / 1e9, plan.threads)
    yield maker.make(plan.case, "powers", mode, "powers", "G/s", powers / 1e9, plan.threads)
    for name, values in seconds.items():
        products = plan.case.flops(mode) / peak
        yield maker.make(plan.case, name, mode, "peak_fraction", "1", products / values, plan.threads)
        floor = products + plan.case.powers(mode) / powers
        yield maker.make(plan.case, name, mode, "floor_fraction", "1", floor / values, plan.threads)


def _threads(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    """Rows of the speed-up by threads. sgemm runs beside it as a measure of the machine.

    Two CPUs of a virtual machine may share a core at times.
    """
    many = max(2, plan.threads)
    steps = {**steps, "sgemm": _sgemm(THREADED_GEMM_SIZE, plan.device)}
    tasks = {f"{name}, {threads}": Task(step, threads) for name, step in steps.items() for threads in (1, many)}
    seconds = interleave(tasks, sampler_for(plan.device, many), plan.effort, _about(plan, mode))
    for name in steps:
        speedup = seconds[f"{name}, 1"] / seconds[f"{name}, {many}"]
        yield maker.make(plan.case, name, mode, "thread_speedup", "x", speedup, many)


def _decode(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    source = torch.randn(COPIED, device=plan.device)
    target = torch.empty_like(source)
    copy = Step(lambda _: target.copy_(source))
    tasks = {name: Task(step, plan.threads) for name, step in {**steps, "copy": copy}.items()}
    seconds = interleave(tasks, sampler_for(plan.device, plan.threads), plan.effort, _about(plan, mode))
    copy_rate = 2 * source.nbytes / seconds.pop("copy")
    yield maker.make(plan.case, "copy", mode, "bandwidth", "GB/s", copy_rate / 1e9, plan.threads)
    for name, values in seconds.items():
        rate = plan.case.cache_bytes / values
        yield maker.make(plan.case, name, mode, "bandwidth", "GB/s", rate / 1e9, plan.threads)
        yield maker.make(plan.case, name, mode, "copy_fraction", "1", rate / copy_rate, plan.threads)


def _window(plan: Plan, mode: str, steps: dict[str, Step], maker: RowMaker) -> Iterator[Row]:
    whole = make_inputs(replace(plan.case, window=-1), plan.device)
    for name, step in steps.items():
        whole_step = make_step(PROVIDERS[name], PROVIDERS[name].prepare(whole), whole, mode)
        tasks = {"window": Task(step, plan.threads), "whole": Task(whole_step, plan.threads)}
        seconds = interleave(tasks, sampler_for(plan.device, plan.threads), plan.effort, f"{_about(plan, mode)} {name}")
        speedup = seconds["whole"] / seconds["window"]
        yield maker.make(plan.case, name, mode, "window_speedup", "x", speedup, plan.threads)


_MEASURES = {
    "speed": _speed,
    "plain": _speed,
    "gate": _speed,
    "grid": _speed,
    "floors": _floors,
    "gemm": _gemm,
    "threads": _threads,
    "decode": _decode,
    "window": _window,
    "gpu": _gpu,
}


def _memory(plan: Plan, maker: RowMaker) -> Iterator[Row]:
    for mode in plan.modes:
        for name in tqdm(plan.providers, desc=_about(plan, mode), leave=False, unit="process"):
            if not _can_run(plan, name, mode):
                continue
            try:
                growth = measure_growth(plan.case, name, mode, plan.threads)
            except (RuntimeError, MemoryError, OSError) as error:
                _say_absent(plan, name, mode, str(error))
                continue
            yield maker.make(plan.case, name, mode, "memory", "MiB", np.array([growth / 2**20]), plan.threads)


def _checked_runs(plan: Plan, inputs: Inputs) -> dict[str, Run]:
    """The providers that can run and agree with the reference. This package's must."""
    checker = Checker(inputs)
    runs = {}
    for name in tqdm(plan.providers, desc=f"{plan.suite} {plan.case.name}: compile and check", leave=False):
        provider = PROVIDERS[name]
        modes = [mode for mode in plan.modes if plan.device != "cpu" or mode in provider.cpu_modes]
        if not modes:
            _say_absent(plan, name, "every mode", provider.why_not)
            continue
        try:
            seen = provider.seen(inputs)
            run = provider.prepare(seen)
            with functorch_config.patch(donated_buffer=False):  # backward alone is repeated from one forward
                (checker if seen is inputs else Checker(seen)).check(
                    provider, run, needs_gradients=any(mode != FORWARD for mode in modes)
                )
            runs[name] = run
        except Exception as error:
            if name.startswith("ours") and not isinstance(error, AbsentError):
                raise
            _say_absent(plan, name, "every mode", str(error).strip().partition("\n")[0])
        if plan.device != "cpu":
            torch.cuda.empty_cache()  # a dense provider's scores
    return runs


def _can_run(plan: Plan, name: str, mode: str) -> bool:
    provider = PROVIDERS[name]
    if plan.device != "cpu" or mode in provider.cpu_modes:
        return True
    _say_absent(plan, name, mode, provider.why_not)
    return False


def _say_absent(plan: Plan, name: str, mode: str, why: str) -> None:
    tqdm.write(f"{plan.suite} {plan.case.name}: {name} is absent from {mode}: {why}")


def _about(plan: Plan, mode: str) -> str:
    return f"{plan.suite} {plan.case.name} {mode}"
