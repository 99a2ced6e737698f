"""Runs the parts of a report one after another, each in a process of its own and in its share of the time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.rows import ROOT

DONE, LEFT_OUT = "done", "left out: "
GRACE = 3.0  # seconds between asking a part to end, and ending it
SHORTEST = 3.0  # seconds; a part with less is not begun


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        name: the part's name; what it prints goes to NAME.txt.
        about: what it shows.
        command: the process. The variables GPU_REPORT_SECONDS and GPU_REPORT_FOLDER tell it its time and its folder.
        weight: its share of the time, in proportion to the weights of the parts after it.
        is_needed: whether nothing after it makes sense if it fails.
        why_not: the reason why it cannot run here, or "".
        results: the files that it writes, beside NAME.txt.
    """

    name: str
    about: str
    command: Sequence[str]
    weight: float
    is_needed: bool = False
    why_not: str = ""
    results: Sequence[str] = ()


class Outcome(NamedTuple):
    """How a part ended: `DONE`, or what happened instead; and its seconds."""

    part: Part
    state: str
    seconds: float = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether the part ran, and did not end by itself and well."""
        return self.state != DONE and not self.state.startswith(LEFT_OUT)


def run_parts(
    parts: Sequence[Part], seconds: float, folder: Path, tell: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs the parts in their order. What a part leaves of its time is for the parts after it.

    Args:
        parts: the parts.
        seconds: the time of all parts together.
        folder: where parts put their results, and where their output goes.
        tell: called after each part with the outcomes so far.
    """
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for turn, part in enumerate(parts):
        weights = [other.weight for other in parts[turn:] if not other.why_not]
        is_stopped = any(outcome.part.is_needed and outcome.state != DONE for outcome in outcomes)
        if part.why_not or is_stopped:
            outcomes.append(Outcome(part, LEFT_OUT + (part.why_not or "a part before it is needed, and failed")))
        else:
            share = (end - time.monotonic()) * part.weight / sum(weights)
            outcomes.append(run_part(part, share, folder))
        tell(outcomes)
    return outcomes


def run_part(part: Part, seconds: float, folder: Path) -> Outcome:
    """Runs one part for at most so many seconds. Then it, and all that it has started, are ended."""
    if seconds < SHORTEST + GRACE:
        return Outcome(part, LEFT_OUT + "no time was left")
    start = time.monotonic()
    print(f"== {part.name}, at most {seconds:.0f} s: {part.about}", flush=True)
    limits = {"GPU_REPORT_SECONDS": f"{seconds - GRACE:.1f}", "GPU_REPORT_FOLDER": str(folder)}
    with (folder / f"{part.name}.txt").open("w") as output:
        process = _start(part.command, limits, output.fileno())
        try:
            code = process.wait(seconds - GRACE)
            state = DONE if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            state = "stopped at its time limit"
        finally:
            _end(process)
    print(*_last_lines(folder / f"{part.name}.txt"), f"== {part.name}: {state}", sep="\n", flush=True)
    return Outcome(part, state, time.monotonic() - start)


def _start(command: Sequence[str], limits: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **limits}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group: by asking it to, and after `GRACE` seconds without."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # all of it has ended
            return
        try:
            process.wait(GRACE if number == signal.SIGTERM else 1)
        except subprocess.TimeoutExpired:  # such as one that waits for the driver; nothing can end it
            continue


def _last_lines(path: Path, count: int = 12) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:]
