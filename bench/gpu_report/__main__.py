"""``python -m bench.gpu_report``: is the package right on this GPU, and how fast is it? No network, nothing to install.

It runs from the repository's root, with torch, Triton, NumPy and pytest alone. Its parts run one after another, each in
a process of its own and in its share of the time. A part that crashes, hangs or takes too long spoils itself alone.
What is measured is written at once, and the page is written anew after each part.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.gpu_report.flow import Part, run_parts
from bench.gpu_report.page import write_page
from bench.rows import ROOT

MINUTES = 7.0


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts, writes the page, and says where it is. Fails if a part did."""
    parser = argparse.ArgumentParser("python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, help=f"time of all parts (default {MINUTES:g})")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu shows that the report itself works (default cuda)",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/gpu-DEVICE)")
    options = parser.parse_args(arguments)
    name = device_name(options.device)
    if not name:
        parser.error(f"argument --device: torch finds no {options.device} here")
    folder = (options.output or ROOT / "bench" / "results" / f"gpu-{slug(name)}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [PARTS[part](folder) for part in options.only or PARTS]
    for stale in (name for part in parts for name in (f"{part.name}.txt", *part.results)):
        (folder / stale).unlink(missing_ok=True)
    os.environ["GPU_REPORT_DEVICE"] = options.device
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part at work is ended as well
    outcomes = run_parts(parts, 60 * options.minutes, folder, lambda so_far: write_page(folder, name, so_far))
    print(f"\nwrote {folder / 'report.md'}")
    if any(outcome.has_failed for outcome in outcomes):
        raise SystemExit(1)


def device_name(device: str) -> str:
    """The device's name, from a process of its own, which leaves this one without CUDA; "" if there is none."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(name: str) -> str:
    """The name in small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _minutes(text: str) -> float:
    if not 0 < (minutes := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return minutes


def _module(
    name: str, weight: float, about: str, result: str | None = None, is_needed: bool = False
) -> Callable[[Path], Part]:
    command, results = (sys.executable, "-m", f"bench.gpu_report.{name}"), () if result is None else (result,)
    return lambda _: Part(name, about, command, weight, is_needed, results=results)


def _sanitizer(tool: str, weight: float) -> Callable[[Path], Part]:
    program = shutil.which("compute-sanitizer")
    command = (
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "bench.gpu_report.tiny",
    )
    why_not = "" if program else "compute-sanitizer is not installed"
    return lambda _: Part(tool, f"compute-sanitizer's {tool} on tiny calls", command, weight, why_not=why_not)


def _plot(folder: Path) -> Part:
    missing = [name for name in ("matplotlib", "pandas") if importlib.util.find_spec(name) is None]
    why_not = f"{' and '.join(missing)} are not installed" if missing else ""
    command = (sys.executable, "-m", "bench.plots", str(folder / "speed.csv"))
    return Part("plot", "the rates over the length", command, 10, why_not=why_not, results=("speed_gpu.png",))


# In the order of the report. Weights are seconds in a report of seven minutes.
PARTS: dict[str, Callable[[Path], Part]] = {
    "first": _module("first", 60, "the versions, and a few calls against float64", is_needed=True),
    "warm": _module("warm", 60, "compiles what the later parts measure"),
    "correctness": _module("correctness", 110, "the tests of the GPU kernels", "tests.tsv"),
    "speed": _module("speed", 110, "times and rates beside other attentions", "speed.csv"),
    "search": _module("search", 45, "every candidate of the block sizes", "search.csv"),
    "memcheck": _sanitizer("memcheck", 20),
    "racecheck": _sanitizer("racecheck", 15),
    "experiments": _module("experiments", 20, "kernels behind a switch against those that ship", "experiments.csv"),
    "plot": _plot,
}

if __name__ == "__main__":
    main()
