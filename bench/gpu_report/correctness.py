"""Part 2: the tests of the GPU kernels on the device, in several processes of pytest."""

import collections
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu_report.part import DEVICE, FOLDER, IS_DRY
from bench.rows import ROOT

FILES = (
    *("attention", "gradients", "triton_strip", "varlen", "decode", "dropout", "positions", "half_precision"),
    *("empty_rows", "triton_precision", "triton_one_key"),
)
MOST_PROCESSES = 10
DRY_FILES = ("empty_rows",)


def main() -> None:
    """Runs the tests, and counts how they ended. Fails if one has failed, or if none ran."""
    results = FOLDER / "tests.tsv"
    results.unlink(missing_ok=True)
    count = 2 if IS_DRY else min(MOST_PROCESSES, os.cpu_count() or 1)
    processes = [_start(index, count) for index in range(count)]
    codes = [process.wait() for process in processes]
    counts, failures = read_results(results)
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "no test ran")
    print(*failures, sep="\n")
    if failures or not counts["passed"] or set(codes) - {0, 5}:  # 5: a share without tests
        raise SystemExit(f"pytest ended with {codes}")


def _start(index: int, count: int) -> subprocess.Popen[bytes]:
    files = [f"tests/test_{name}.py" for name in (DRY_FILES if IS_DRY else FILES)]
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_report.share", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=short", "--maxfail=20", "-k", "triton and not indices", *files]
    environment = {**os.environ, "TEST_DEVICE": DEVICE, "GPU_REPORT_SHARE": f"{index}/{count}"}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def read_results(path: Path) -> tuple[collections.Counter[str], list[str]]:
    """The number of tests with each outcome, and a line for each failure; also of an unfinished run."""
    lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    whole = [line for line in lines if len(line) == 4]
    failures = [f"{name}: {why}" for outcome, _, name, why in whole if outcome == "failed"]
    return collections.Counter(outcome for outcome, *_ in whole), failures


if __name__ == "__main__":
    main()
