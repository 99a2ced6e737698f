"""What the parts of the report share: their device, their time, their folder, and the sampling of times."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from bench.cases import GPU_CASES, Case
from bench.steps import Step

DEVICE = os.environ.get("GPU_REPORT_DEVICE", "cuda")
FOLDER = Path(os.environ.get("GPU_REPORT_FOLDER", "."))
IS_DRY = torch.device(DEVICE).type == "cpu"  # shows that the report works, at small sizes
WARM_UP, SAMPLE = 8, 40  # milliseconds

_END = time.monotonic() + float(os.environ.get("GPU_REPORT_SECONDS", "inf"))


def has_time(seconds: float = 0.0) -> bool:
    """Whether so many seconds are left to this part."""
    return time.monotonic() + seconds < _END


def case_of(length: int, head_dim: int, clamp: int | None, is_causal: bool) -> Case:
    """A case of the benchmark's suite for GPUs; where the run is dry, a small one instead."""
    if IS_DRY:
        clamp = None if clamp is None else 16
        return Case("dry", 1, 2, 64, 16, "bfloat16", is_causal, clamp=clamp)
    wanted = (length, head_dim, clamp, is_causal)
    (case,) = (case for case in GPU_CASES if (case.length, case.head_dim, case.clamp, case.is_causal) == wanted)
    return case


def sampled(step: Step) -> np.ndarray:
    """Seconds of the step, many times on a GPU, with an empty L2 cache; twice on a CPU."""
    state = step.before()
    if IS_DRY:
        return np.array([_seconds(step, state) for _ in range(2)])
    from triton.testing import do_bench

    times = do_bench(lambda: step.timed(state), warmup=WARM_UP, rep=SAMPLE, return_mode="all")
    return np.array(times) / 1e3


def _seconds(step: Step, state: object) -> float:
    start = time.perf_counter()
    step.timed(state)
    return time.perf_counter() - start


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"


def stop_if_the_device_failed() -> None:
    """Ends this part where the device takes no more work, as after an access out of bounds."""
    if IS_DRY:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"the device takes no more work: {first_line(error)}") from error
