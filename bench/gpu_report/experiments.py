"""Part 6: kernels that are behind a switch, against those that ship.

Each provider has a process of its own, because what a process has planned or compiled for a call may outlast a switch.
"""

import itertools
import subprocess
import sys

from bench.cases import GPU_CLAMP
from bench.gpu_report.part import DEVICE, case_of
from bench.gpu_report.speed import HEAD_DIMS, LENGTHS, measure, wrong_providers
from bench.providers import EXPERIMENTAL
from bench.rows import RowMaker


def main(names: list[str]) -> None:
    """Checks and measures the one provider that is named, or else all of them, "ours" first."""
    if names:
        measure_provider(*names)
        return
    if not EXPERIMENTAL:
        print("no kernel is behind a switch")
        return
    for name in ("ours", *EXPERIMENTAL):
        done = subprocess.run([sys.executable, "-m", "bench.gpu_report.experiments", name])
        if done.returncode:
            print(f"{name} is absent: its process ended with {done.returncode}")


def measure_provider(name: str) -> None:
    """Appends the rows of one provider at two lengths, if it is right."""
    if not wrong_providers([name]):
        for length, dim in itertools.product(LENGTHS[:2], HEAD_DIMS):
            measure(case_of(length, dim, GPU_CLAMP, True), [name], RowMaker(DEVICE), "experiments.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
