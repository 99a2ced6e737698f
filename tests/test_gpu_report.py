"""The report of a GPU: its parts spoil themselves alone, keep to their time, and leave what they have measured."""

import csv
import os
import sys
import time

import numpy as np
import pytest

from bench.cases import BACKWARD, FORWARD, Case
from bench.gpu_report import flow
from bench.gpu_report.flow import DONE, Outcome, Part, run_parts
from bench.gpu_report.page import write_page
from bench.rows import RowMaker, append_rows

pytestmark = pytest.mark.cpu_only
triton = pytest.importorskip("triton", reason="Triton is not installed")

SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
PARENT = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); print(child.pid)"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(flow, "GRACE", 0.5)
    monkeypatch.setattr(flow, "SHORTEST", 0.1)


def stub(name, code, weight=1.0, **options):
    """A part that is a line of Python."""
    return Part(name, "a stub", (sys.executable, "-c", code), weight, **options)


def states(outcomes):
    """How each part ended, by name."""
    return {outcome.part.name: outcome.state for outcome in outcomes}


def test_a_part_that_fails_crashes_or_hangs_spoils_itself_alone(tmp_path):
    """The parts after it run, and what it printed before is there; the others' order is kept."""
    parts = [
        stub("fails", "print('half'); raise SystemExit(3)"),
        stub("crashes", "import os; print('half', flush=True); os.kill(os.getpid(), 11)"),
        stub("hangs", f"print('half', flush=True); {SLEEP}"),
        stub("deaf", DEAF),
        stub("lacks", "", why_not="no such tool"),
        stub("works", "print('whole')"),
    ]
    told = []
    start = time.monotonic()
    outcomes = run_parts(parts, 12.0, tmp_path, lambda so_far: told.append(len(so_far)))
    assert time.monotonic() - start < 13
    assert states(outcomes) == {
        "fails": "failed, exit code 3",
        "crashes": "failed, exit code -11",
        "hangs": "stopped at its time limit",
        "deaf": "stopped at its time limit",
        "lacks": "left out: no such tool",
        "works": DONE,
    }
    assert [outcome.has_failed for outcome in outcomes] == [True, True, True, True, False, False]
    assert told == [1, 2, 3, 4, 5, 6]
    printed = {part.name: (tmp_path / f"{part.name}.txt").read_text() for part in parts if part.name != "lacks"}
    assert printed == {**dict.fromkeys(("fails", "crashes", "hangs"), "half\n"), "deaf": "deaf\n", "works": "whole\n"}


def test_nothing_follows_a_part_that_is_needed_and_fails(tmp_path):
    """Speed says nothing where the first call is wrong."""
    parts = [stub("first", "raise SystemExit(1)", is_needed=True), stub("speed", "")]
    outcomes = run_parts(parts, 20.0, tmp_path, lambda _: None)
    assert states(outcomes)["speed"] == "left out: a part before it is needed, and failed"


def test_time_is_shared_by_weights_and_what_is_left_goes_on(tmp_path):
    """The first of 1 : 2 : 1 has a quarter; as it ends early, the others share nearly all by 2 : 1."""
    code = "import os; print(os.environ['GPU_REPORT_SECONDS'])"
    parts = [stub("one", code), stub("two", code, 2.0), stub("absent", code, 9.0, why_not="none"), stub("three", code)]
    run_parts(parts, 40.0, tmp_path, lambda _: None)
    one, two, three = (float((tmp_path / f"{name}.txt").read_text()) for name in ("one", "two", "three"))
    assert one == pytest.approx(9.5, abs=0.2)
    assert two == pytest.approx(26.2, abs=1.5)
    assert three == pytest.approx(38.5, abs=2.5)


def test_what_a_part_has_started_ends_with_it(tmp_path):
    """Otherwise a test that hangs would hold the device while the next part measures."""
    run_parts([stub("parent", PARENT)], 20.0, tmp_path, lambda _: None)
    child = int((tmp_path / "parent.txt").read_text())
    for _ in range(50):
        if not _is_alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child is alive")


def _is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_page_has_what_there_is(tmp_path):
    """First nothing but how the parts ended; then rates, short calls, block sizes, tests and what is absent."""
    outcomes = [Outcome(stub("first", ""), DONE, 2.0), Outcome(stub("speed", ""), "stopped at its time limit", 9.0)]
    write_page(tmp_path, "a device", outcomes)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# a device\n")
    assert "| speed | a stub | stopped at its time limit | 9 |" in page
    assert "##" not in page
    _leave_results(tmp_path)
    write_page(tmp_path, "a device", outcomes)
    page = (tmp_path / "report.md").read_text()
    assert "| case | ours | SDPA flash, no bias |" in page
    assert "| l1024 | 300 / 200 | 310 / - |" in page
    assert "| short | ours | replayed from a CUDA graph | 0.25 |" in page
    assert "| forward | 64 | 128x64, 8 warps, 3 stages: 1.5000 ms | 128x64, 4 warps, 3 stages: 2.0000 ms | 2 |" in page
    assert "1 failed, 2 passed" in page
    assert "tests/a.py::b: AssertionError: far" in page
    assert "l1024: sdpa_cudnn is absent: no kernel" in page


def _leave_results(folder):
    maker, case = RowMaker("cpu"), Case("l1024", 1, 1, 1024)
    for provider, mode, rate in (("ours", FORWARD, 300), ("ours", BACKWARD, 200), ("sdpa_flash", FORWARD, 310)):
        row = maker.make(case, provider, mode, "throughput", "TFLOP/s", np.array([rate]), 1)
        append_rows(folder / "speed.csv", [row])
    short = maker.make(Case("short", 1, 1, 256), "ours", FORWARD, "replay", "ms", np.array([0.25]), 1)
    append_rows(folder / "speed.csv", [short])
    with (folder / "search.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kernel", "D", "block_m", "block_n", "warps", "stages", "ships", "ms"))
        writer.writerow(("forward", 64, 128, 64, 4, 3, True, "2.0000"))
        writer.writerow(("forward", 64, 128, 64, 8, 3, False, "1.5000"))
        writer.writerow(("forward", 64, 128, 128, 8, 3, False, "no room"))
    lines = ["passed\t0.1\ttests/a.py::a\t", "passed\t0.1\ttests/a.py::c\t"]
    lines += ["failed\t0.1\ttests/a.py::b\tAssertionError: far", "passed\t0"]  # the last one is not written to its end
    (folder / "tests.tsv").write_text("\n".join(lines))
    (folder / "speed.txt").write_text("l1024: ours 300\nl1024: sdpa_cudnn is absent: no kernel\n")


def test_a_dry_run_without_a_gpu_measures(tmp_path):
    """At small sizes on the CPU: rows of this package and of a peer, and a line on those that cannot run there."""
    from bench.gpu_report.__main__ import main

    main(["--device", "cpu", "--minutes", "10", "--only", "speed", "--output", str(tmp_path)])
    with (tmp_path / "speed.csv").open(newline="") as file:
        found = {(row["provider"], row["mode"], row["metric"]) for row in csv.DictReader(file)}
    both = {(name, mode) for name in ("ours", "ours_no_bias", "sdpa_flash") for mode in (FORWARD, BACKWARD)}
    assert {(*row, metric) for row in both for metric in ("time", "throughput")} < found
    assert ("ours", "forward+backward", "call") in found
    page = (tmp_path / "report.md").read_text()
    assert "sdpa_cudnn is absent from forward: cuDNN is for NVIDIA GPUs" in page


def test_a_device_that_is_not_there_is_named(monkeypatch, capsys):
    """Nothing runs, and nothing is written."""
    from bench.gpu_report import __main__ as command_line

    monkeypatch.setattr(command_line, "device_name", lambda device: "")
    with pytest.raises(SystemExit):
        command_line.main(["--minutes", "1"])
    assert "argument --device: torch finds no cuda here" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")
def test_tritons_interpreter_is_right_in_the_first_part(tmp_path):
    """A dry run of the part that decides whether there is a report."""
    from bench.gpu_report.__main__ import main

    main(["--device", "cpu", "--minutes", "10", "--only", "first", "--output", str(tmp_path)])
    assert "right, out" in (tmp_path / "report.md").read_text()
