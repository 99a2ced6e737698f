"""``python -m bench.launch_cost``: the host's time for a tiny call of the GPU kernels, with nothing launched.

A driver that launches nothing takes the GPU's place (`bench.fake_driver`), so the time is Python's and torch's. It
is CPU time of one thread, the least of several samples, in microseconds. With `--against FOLDER`, the package in that
folder and this one are measured in processes that take turns, and the medians' ratio is printed too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLES, CALLS = 8, 40


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints one line for each kind of call."""
    parser = argparse.ArgumentParser("python -m bench.launch_cost", description=__doc__)
    parser.add_argument("--against", type=Path, help="a folder with another version of the package")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each version (default: 5)")
    parser.add_argument("--measure", action="store_true", help="measure the package that is imported, as JSON")
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured()))
        return
    folders = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    found: dict[Path, list[dict[str, float]]] = {folder: [] for folder in folders}
    for _ in range(options.rounds):
        for folder in folders:
            found[folder].append(_in_process(folder))
    for name in found[ROOT][0]:
        medians = [statistics.median(times[name] for times in found[folder]) for folder in folders]
        ratio = "" if len(folders) == 1 else f", ratio {medians[1] / medians[0]:.3f}"
        print(f"{name}: {' -> '.join(f'{median:.1f} us' for median in medians)}{ratio}")


def _in_process(folder: Path) -> dict[str, float]:
    """The times of the package in a folder. This file measures it, whatever that folder has."""
    code = f"import sys; sys.path[:0] = [{str(folder)!r}]; import triton_offset_bias; sys.path[0] = {str(ROOT)!r}; "
    code += "from bench.launch_cost import main; main(['--measure'])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def measured() -> dict[str, float]:
    """Microseconds of a tiny call on a fake Hopper GPU: B=1, H=2, L=128, D=64, bfloat16, a table of 257 columns."""
    import torch

    from bench.fake_driver import installed
    from triton_offset_bias import offset_bias_attention

    torch.set_num_threads(1)
    q, k, v = (torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    table, dout = torch.zeros(2, 257, requires_grad=True), torch.zeros_like(q)

    def forward() -> torch.Tensor:
        return offset_bias_attention(q, k, v, table, backend="triton")

    def inference() -> None:
        with torch.no_grad():
            forward()

    with installed():
        return {
            "forward without gradients": _time(inference),
            "forward": _time(forward),
            "forward and backward": _time(lambda: forward().backward(dout)),
        }


def _time(call: Callable[[], object]) -> float:
    """The least mean time of a call in any sample, in microseconds."""
    for _ in range(CALLS):
        call()
    means = []
    for _ in range(SAMPLES):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        means.append((time.process_time() - start) / CALLS)
    return 1e6 * min(means)


if __name__ == "__main__":
    main()
