"""Without optional libraries, the engine or the device, tests are still listed, and are skipped with a reason."""

import os
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import bare
import pytest
import torch

from triton_offset_bias.backends import cpp

ROOT = Path(__file__).parents[1]
WITHOUT = f"""
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *others):
        return None if name.partition(".")[0] in {sorted(bare.OPTIONAL)} else self.finder.find_spec(name, *others)


sys.meta_path[:] = map(Without, sys.meta_path)
"""
pytestmark = pytest.mark.cpu_only  # each starts a Python of its own, whose device it chooses, or needs none


def _run_pytest(folder: Path, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in an empty folder, where no optional library, plugin or engine is found."""
    (folder / "without").mkdir()
    (folder / "without" / "sitecustomize.py").write_text(WITHOUT)
    (folder / "empty").mkdir()
    inherited = {name: x for name, x in os.environ.items() if name not in ("TEST_DEVICE", "TESTS_REQUIRE_ALL")}
    path = os.pathsep.join([str(folder / "without"), os.environ["PYTHONPATH"]])
    environment |= {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", cpp.FOLDER_VARIABLE: str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder / "empty", env=inherited | environment, capture_output=True, text=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_whole_suite_is_collected(tmp_path, device):
    """Tests for a device can be listed on a machine without it."""
    done = _run_pytest(tmp_path, "--collect-only", ROOT / "tests", TEST_DEVICE=device)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert "error" not in done.stdout.splitlines()[-1]
    for file in ("test_attention.py", "test_hostile.py", "test_readme.py", "test_inspection.py"):
        assert f"tests/{file}::" in done.stdout
    assert "tests/test_table.py::" not in done.stdout
    assert ("tests/test_engine.py::" in done.stdout) == (device == "cpu")


def test_what_cannot_run_is_skipped_with_the_reason(tmp_path):
    """A file that imports a missing library, tests of the engine, and a block of the docs are skipped.

    Other tests pass.
    """
    files = [ROOT / "tests" / name for name in ("test_table.py", "test_dispatch.py", "test_readme.py")]
    done = _run_pytest(tmp_path, "-rs", "-k", "dispatch or table or choosing", *files)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "hypothesis is not installed" in done.stdout
    assert "matplotlib is not installed" in done.stdout
    assert "the engine was not compiled" in done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TESTS_REQUIRE_ALL": "1"}, "TESTS_REQUIRE_ALL=1, but the engine was not compiled"),
        ({"TESTS_REQUIRE_ALL": "1", "TEST_DEVICE": "meta"}, "No module named 'hypothesis'"),
        ({"TEST_DEVICE": "xpu"}, "TEST_DEVICE=xpu, but torch .* finds no such device"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x.values()),
)
def test_what_must_not_be_lacking_is_an_error(tmp_path, environment, message):
    """`make test` skips nothing that its environment should have. A device that is asked for must be there."""
    if environment.get("TEST_DEVICE") == "xpu" and bare.has_device("xpu"):
        pytest.skip("there is such a device")
    done = _run_pytest(tmp_path, ROOT / "tests" / "test_table.py", **environment)
    assert done.returncode not in (0, 5)
    assert re.search(message, done.stdout + done.stderr)


BLAMED = ["triton_offset_bias.functional", "bench.cases", "test_table", "transformers_cases", "swin_windows"]


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecation_is_an_error_where_this_project_is_to_blame(category):
    """Warnings that other libraries address to their own users are no errors."""
    with warnings.catch_warnings(record=True) as shown:
        for name in ("numpy.linalg", "torch.jit", "transformers.utils", "multiprocessing.popen_fork"):
            warnings.warn_explicit("will change", category, "elsewhere.py", 1, module=name)
    assert len(shown) == 4
    for name in BLAMED:
        with pytest.raises(category, match="will change"):
            warnings.warn_explicit("will change", category, "here.py", 1, module=name)


class _Item:
    def __init__(self, *marks: pytest.Mark) -> None:
        self.marks = {mark.name: mark for mark in marks}

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)


LARGE = pytest.mark.large_memory(20).mark


def test_more_than_two_gigabytes_of_device_memory_fail_without_the_mark(monkeypatch):
    """Only the memory that a test takes above what was already taken counts."""
    memory = {"reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 3_000_000_000}
    for name, function in memory.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for peak, marks, fails in ((4.9e9, (), False), (5.1e9, (), True), (9e9, (LARGE,), False)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda peak=peak: peak)
        for device in ("cuda", "cpu"):
            is_wrong = fails and device == "cuda"
            expected = pytest.raises(pytest.fail.Exception, match=r"takes 2\.1 GB") if is_wrong else nullcontext()
            with expected, bare.watched_memory(_Item(*marks), device):
                pass


def test_a_test_that_does_not_fit_says_so(monkeypatch):
    """The free memory of the device decides."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16e9, 80e9))
    assert bare.lacking_memory(_Item(LARGE), "cuda") == "needs 20 GB of device memory, 16.0 are free"
    assert bare.lacking_memory(_Item(LARGE), "cpu") == bare.lacking_memory(_Item(), "cuda") == ""
