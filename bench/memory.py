"""Growth of the peak resident memory by one step, measured in a process of its own (Linux).

The process makes the inputs, warms up, forgets its peak, runs one step, and reads the peak again. So the growth counts
the output, the gradients, the tensors that are saved between the passes, and scratch memory. It does not count q, k, v,
the table and the output's gradient.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from bench.cases import CASES, Case, make_inputs
from bench.providers import PROVIDERS
from bench.rows import ROOT
from bench.steps import make_step

WARM_UP_LENGTH = 64
# Copies of all B*H*M*N numbers that a dense provider may hold at once in a training step; an upper bound.
DENSE_COPIES = 6
# With these settings the C library gives freed memory back to the system at once. Otherwise a step would reuse memory
# of the warm-up, and its growth would look too small.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def measure_growth(case: Case, provider: str, mode: str, threads: int) -> int:
    """Bytes by which one step raises the peak of a fresh process.

    Raises:
        OSError: the system does not tell a process its peak.
        MemoryError: a dense provider would need more than half of the memory that is free.
        RuntimeError: the process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise OSError("peak memory is measured on Linux only")
    need = DENSE_COPIES * case.batch * case.heads * case.length**2 * getattr(torch, case.dtype).itemsize
    available = psutil.virtual_memory().available
    if PROVIDERS[provider].is_dense and need > available / 2:
        raise MemoryError(f"may need {need / 2**30:.0f} GiB of the {available / 2**30:.0f} GiB free")
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", case.name, provider, mode, str(threads)],
        cwd=ROOT,
        env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise RuntimeError(f"the process failed: {reason}")
    return json.loads(child.stdout.splitlines()[-1])


def _growth_here(case: Case, provider_name: str, mode: str) -> int:
    provider = PROVIDERS[provider_name]
    # A compiled provider is compiled for one shape, so that shape is its warm-up.
    warm_up = case if provider.is_compiled else replace(case, length=min(WARM_UP_LENGTH, case.length))
    inputs = provider.seen(make_inputs(warm_up, "cpu"))
    step = make_step(provider, provider.prepare(inputs), inputs, mode)
    step.timed(step.before())
    if not provider.is_compiled:
        inputs = provider.seen(make_inputs(case, "cpu"))
        step = make_step(provider, provider.prepare(inputs), inputs, mode)
    state = step.before()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    before = _status_bytes("VmRSS")
    result = step.timed(state)
    growth = _status_bytes("VmHWM") - before
    del result
    return growth


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _main() -> None:
    case, provider, mode, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(_growth_here(CASES[case], provider, mode))


if __name__ == "__main__":
    _main()
