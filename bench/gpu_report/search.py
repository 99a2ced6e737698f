"""Part 4: block sizes. Triton's tuner measures every candidate of `configs.CANDIDATES`, and each time is kept.

The CSV has a row for each kernel, head dim and candidate, and says which one ships: `configs.py` may cite it.
"""

import contextlib
import csv
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from bench.cases import GPU_CLAMP, Case, make_inputs
from bench.gpu_report.part import DEVICE, FOLDER, case_of, first_line, has_time, stop_if_the_device_failed
from bench.kernel_variants import CONFIGS
from bench.rows import RowMaker
from triton_offset_bias import offset_bias_attention
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.launch import AUTOTUNE_VARIABLE
from triton_offset_bias.backends.triton.target import current_target

LENGTH, HEAD_DIMS = 4096, (128, 64)
SHAPE = ("B", "H", "N", "D", "dtype", "causal", "device", "torch", "triton", "commit", "date")
FIELDS = ("kernel", "block_m", "block_n", "warps", "stages", "ships", "ms", *SHAPE)
Record = Callable[[str, configs.Config, float], None]


def main() -> None:
    """Measures the candidates of every kernel, at one length, causal, with a table that clamps."""
    maker = RowMaker(DEVICE)
    for dim in HEAD_DIMS:
        tune(case_of(LENGTH, dim, GPU_CLAMP, True), maker)


def tune(case: Case, maker: RowMaker) -> None:
    """Appends a row for each candidate of each kernel, as soon as it is measured."""
    record = functools.partial(_append, case, maker)
    with recorded(record):
        try:
            run_tuned(case)
        except TimeoutError as error:
            print(f"{case.name}: {error}")
        except Exception as error:
            print(f"{case.name}: {first_line(error)}")
            stop_if_the_device_failed()


def run_tuned(case: Case) -> None:
    """One forward and backward pass with tuning."""
    inputs = make_inputs(case, DEVICE)
    os.environ[AUTOTUNE_VARIABLE] = "1"
    try:
        out = offset_bias_attention(*inputs.arguments(), is_causal=case.is_causal, backend="triton")
        torch.autograd.grad(out, inputs.arguments(), inputs.dout)
    finally:
        del os.environ[AUTOTUNE_VARIABLE]


@contextlib.contextmanager
def recorded(record: Record) -> Iterator[None]:
    """While it lasts, tuning measures anew instead of reading its cache, and hands on every time in milliseconds."""
    tuner = triton.runtime.Autotuner
    look_up, measure = tuner.check_disk_cache, tuner._bench

    def measure_anew(self: Any, key: Any, candidates: Any, bench: Callable[[], None]) -> bool:
        bench()
        return False

    def measure_and_record(self: Any, *arguments: Any, config: Any, **meta: Any) -> Any:
        if not has_time():
            raise TimeoutError("no time is left for more candidates")
        times = measure(self, *arguments, config=config, **meta)
        record(self.base_fn.__name__.removesuffix("_kernel"), _plain(config), times[0])
        return times

    tuner.check_disk_cache, tuner._bench = measure_anew, measure_and_record
    try:
        yield
    finally:
        tuner.check_disk_cache, tuner._bench = look_up, measure


def _plain(config: triton.Config) -> configs.Config:
    blocks = config.kwargs
    rows, columns = (blocks.get(name, blocks.get("BLOCK")) for name in ("BLOCK_M", "BLOCK_N"))
    return configs.Config(rows, columns, config.num_warps, config.num_stages)


def _append(case: Case, maker: RowMaker, kernel: str, config: configs.Config, milliseconds: float) -> None:
    row = maker.make(case, "ours", kernel, "time", "ms", [milliseconds], 1)
    shape = {name: getattr(row, name) for name in SHAPE}
    ships = config == shipped(kernel, case)
    time = "no room" if math.isinf(milliseconds) else f"{milliseconds:.4f}"
    values = (kernel, config.block_m, config.block_n, config.num_warps, config.num_stages, ships, time)
    path = FOLDER / "search.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow({**dict(zip(FIELDS, values, strict=False)), **shape})


def shipped(kernel: str, case: Case) -> configs.Config:
    """The configuration of a kernel that ships for the device here."""
    dtype, block_d = getattr(torch, case.dtype), max(16, triton.next_power_of_2(case.head_dim))
    chosen = {**CONFIGS, "forward": configs.forward_config}[kernel]
    return chosen(current_target(), dtype, block_d)


if __name__ == "__main__":
    main()
