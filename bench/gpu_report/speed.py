"""Part 3: times and rates of this package beside other ways to compute the same attention; and calls by CUDA graphs.

The most telling cases are first, and every row is written as soon as it is measured. TFLOP/s count 4 D operations for
each attended pair forward, and 10 D backward, as flash-attention does.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch._functorch import config as functorch_config

from bench.cases import BACKWARD, BOTH, FORWARD, GPU_CLAMP, Case, Inputs, make_inputs
from bench.gpu_report.part import (
    DEVICE,
    FOLDER,
    IS_DRY,
    case_of,
    first_line,
    has_time,
    sampled,
    stop_if_the_device_failed,
)
from bench.provider import Provider
from bench.providers import PROVIDERS
from bench.rows import RowMaker, append_rows
from bench.steps import Checker, make_step

LENGTHS, HEAD_DIMS = ((4096,), (64,)) if IS_DRY else ((4096, 1024, 16384, 2048, 8192), (128, 64))
WITHOUT_TABLE = ("ours_no_bias", "sdpa_flash", "sdpa_cudnn")
ATOMIC_OR_DENSE = ("ours_atomics", "sdpa_efficient")
COMPILED = () if IS_DRY else ("flex_compiled", "flex_no_bias")  # for long
SLOW_LENGTH = 4096
SHORT_LENGTHS = (256, 512, 1024)
CALLS = 50


def main() -> None:
    """Measures; `plan` says what."""
    maker = RowMaker(DEVICE)
    wrong = wrong_providers(("ours", *WITHOUT_TABLE, *ATOMIC_OR_DENSE))
    for case, names in plan():
        measure(case, [name for name in names if name not in wrong], maker, "speed.csv")
    for length in SHORT_LENGTHS[: 1 if IS_DRY else None]:
        measure_short_calls(length, maker)


def plan() -> Iterator[tuple[Case, tuple[str, ...]]]:
    """The cases with their providers: at every length, then the slow providers at one length, then without a mask."""
    for length, dim in itertools.product(LENGTHS, HEAD_DIMS):
        yield case_of(length, dim, GPU_CLAMP, True), ("ours", *WITHOUT_TABLE)
        yield case_of(length, dim, None, True), ("ours",)
        if length == SLOW_LENGTH:
            yield case_of(length, dim, GPU_CLAMP, False), ("ours", *WITHOUT_TABLE)
    for dim in HEAD_DIMS:
        yield case_of(SLOW_LENGTH, dim, GPU_CLAMP, True), (*COMPILED, *ATOMIC_OR_DENSE)
    for length, dim in itertools.product(LENGTHS[1:], HEAD_DIMS):
        yield case_of(length, dim, GPU_CLAMP, False), ("ours", *WITHOUT_TABLE)


def wrong_providers(names: Sequence[str]) -> set[str]:
    """The providers that differ from the reference in a small case, or cannot run; each is told."""
    wrong = set()
    for dim in HEAD_DIMS:
        inputs = make_inputs(replace(case_of(1024, dim, GPU_CLAMP, True), batch=1, heads=2), DEVICE)
        checker = Checker(inputs)
        for name in names:
            if not _reason_against(PROVIDERS[name], BACKWARD) and not _is_right(name, inputs, checker):
                wrong.add(name)
    return wrong


def _is_right(name: str, inputs: Inputs, checker: Checker) -> bool:
    try:
        checker.check(PROVIDERS[name], PROVIDERS[name].prepare(inputs), needs_gradients=True)
    except ArithmeticError as error:
        print(f"{name} is WRONG: {first_line(error)}")
        return False
    except Exception as error:  # such as that the device has no such kernel
        say_absent("the check", name, error)
        stop_if_the_device_failed()
        return False
    return True


def measure(case: Case, names: Sequence[str], maker: RowMaker, file: str) -> None:
    """Appends time and rate of the providers, forward and backward. One that fails is told, and left out."""
    if not names or not has_time(1.0):
        return
    torch._dynamo.reset()  # else the shapes of earlier cases count towards the limit of recompilations
    inputs = make_inputs(case, DEVICE)
    for name in names:
        try:
            rates = list(_measure_provider(case, name, inputs, maker, file))
        except Exception as error:
            say_absent(case.name, name, error)
            stop_if_the_device_failed()
            continue
        if rates:
            print(f"{case.name}: {name} {' / '.join(f'{rate:.1f}' for rate in rates)} TFLOP/s forward / backward")


def _measure_provider(case: Case, name: str, inputs: Inputs, maker: RowMaker, file: str) -> Iterator[float]:
    """Appends the rows of one provider, and gives the rate of each mode."""
    provider = PROVIDERS[name]
    run = provider.prepare(inputs)
    for mode in (FORWARD, BACKWARD):
        if not has_time():
            return
        if reason := _reason_against(provider, mode):
            print(f"{case.name}: {name} is absent from {mode}: {reason}")
            continue
        with functorch_config.patch(donated_buffer=False):  # backward is repeated from one forward
            seconds = sampled(make_step(provider, run, inputs, mode, repeats_backward=True))
        rate = case.flops(mode) / seconds / 1e12
        times = maker.make(case, name, mode, "time", "ms", 1e3 * seconds, 1)
        append_rows(FOLDER / file, [times, maker.make(case, name, mode, "throughput", "TFLOP/s", rate, 1)])
        yield float(np.median(rate))


def measure_short_calls(length: int, maker: RowMaker) -> None:
    """Appends the wall time of forward and backward as called, and replayed from a CUDA graph."""
    case = Case(f"short_l{length}", 1 if IS_DRY else 8, 1 if IS_DRY else 12, length, 64, "bfloat16", is_causal=True)
    inputs = make_inputs(case, DEVICE)
    for name in ("ours", "sdpa_flash"):
        if not has_time(1.0):
            return
        step = make_step(PROVIDERS[name], PROVIDERS[name].prepare(inputs), inputs, BOTH)
        try:
            found = {"call": _mean_wall_time(lambda step=step: step.timed(None))}
            if not IS_DRY:
                found["replay"] = _mean_wall_time(_captured(lambda step=step: step.timed(None)))
        except Exception as error:
            say_absent(case.name, name, error)
            stop_if_the_device_failed()
            continue
        for metric, seconds in found.items():
            row = maker.make(case, name, BOTH, metric, "ms", np.array([1e3 * seconds]), 1)
            append_rows(FOLDER / "speed.csv", [row])
        print(f"{case.name}: {name}", *(f"{metric} {1e3 * seconds:.3f} ms" for metric, seconds in found.items()))


def _mean_wall_time(call: Callable[[], object]) -> float:
    """Seconds of a call among many, with what the host takes."""
    for counted in (3, 1 if IS_DRY else CALLS):  # the first few warm up
        start = time.perf_counter()
        for _ in range(counted):
            call()
        if not IS_DRY:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / counted


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, after it has run on a stream of its own as capturing wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _reason_against(provider: Provider, mode: str) -> str:
    return provider.why_not if torch.device(DEVICE).type == "cpu" and mode not in provider.cpu_modes else ""


def say_absent(case: str, name: str, error: Exception) -> None:
    """Prints why a provider has no row."""
    print(f"{case}: {name} is absent: {first_line(error)}")


if __name__ == "__main__":
    main()
