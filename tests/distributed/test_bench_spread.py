"""The benchmark of attention over ranks ends cleanly."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ranks_of_the_benchmark_give_their_semaphores_back():
    """A rank ends at once, without the usual clean-up. Python would warn of semaphores that it leaves behind."""
    options = ["--length", "64", "--ranks", "1", "--rounds", "1", "--kinds", "full", "--memory-ranks"]
    command = [sys.executable, "-m", "bench.spread", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert "full, L=64: one process takes" in done.stdout
    assert "leaked" not in done.stderr
