"""The example that trains on a sequence that is spread over two processes, from its command line to its picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
EXAMPLE = Path(__file__).parents[2] / "examples" / "long_context.py"


def _run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True)


def test_two_processes_train_as_one_and_within_a_budget_that_refuses_one(tmp_path: Path) -> None:
    """The losses at the short length are equal up to rounding. Parameters are sharded, and heads are traded."""
    sizes = ["--short-length", "64", "--steps", "3", "--long-steps", "1"]
    run = _run(*sizes, "--fsdp", "--method", "all_to_all", "--output-dir", str(tmp_path))
    assert run.returncode == 0, run.stderr
    apart = re.search(r"the losses of a step differ by (\S+) at most in the first 10 steps", run.stdout)
    assert apart is not None, run.stdout
    assert float(apart[1]) < 1e-5
    assert re.search(r"one process +\d+ +refused\n +2 processes, each +\d+ +granted", run.stdout), run.stdout
    pixels = imread(tmp_path / "long_context.png")[..., :3]
    assert 0.02 < (pixels < 0.9).any(-1).mean() < 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "4097"], "lengths must be multiples of the 2 processes, got 4097"),
        (["--data-parallel", "3"], "`--data-parallel` must divide the 2 processes, got 3"),
        (["--text-dir", "/nowhere"], "`--text-dir` must be a directory, got /nowhere"),
    ],
    ids=["length", "groups", "folder"],
)
def test_a_bad_argument_ends_the_program_and_is_named(options: list[str], message: str) -> None:
    """It ends before processes are started."""
    run = _run(*options)
    assert run.returncode not in (0, None)
    assert message in run.stderr
