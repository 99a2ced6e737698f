"""A plugin of pytest: runs one share of the tests, and writes how each ended as soon as it has.

The variable GPU_REPORT_SHARE says which: "I/N" is every N-th test from the I-th on.
"""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ["GPU_REPORT_FOLDER"])
INDEX, COUNT = map(int, os.environ["GPU_REPORT_SHARE"].split("/"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the other shares out; it comes after the choice by -k."""
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % COUNT != INDEX])
    items[:] = items[INDEX::COUNT]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Appends a line: the outcome, the seconds, the test's name, and the last line of what went wrong."""
    if report.when != "call" and report.passed:
        return
    lines = str(report.longrepr).strip().splitlines() if report.failed else [""]
    with (FOLDER / "tests.tsv").open("a") as file:  # one write of one line, from several processes
        file.write(f"{report.outcome}\t{report.duration:.2f}\t{report.nodeid}\t{lines[-1][:200]}\n")
