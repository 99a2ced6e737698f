"""Mutation check: plants the mistakes in `mutants/`, one at a time, and shows that the tests see each of them.

    python tests/mutations.py [--only PATTERN] [--jobs N] [--list]

Mistakes are planted in temporary copies of the repository, never in this one. Those in the CPU engine are compiled with
the flags of `setup.py` for its portable build, and with products of bfloat16 numbers, which any processor can do
slowly (see `emulated`); those in GPU kernels run in Triton's interpreter. First the tests of all mistakes have to pass
without any. The exit status is 1 if a mistake is not seen, or does not even run.
"""

import argparse
import contextlib
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from emulated import LIBRARY, compile_engine
from mutants import ENGINE, KERNELS, PACKAGE, ROOT, Mutant, misplaced, planted
from tqdm import tqdm

LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "out", "images", "*.egg-info", "__pycache__", "*.so")
CPU_LIMIT, TIME_LIMIT = 300, 3600  # seconds: of a process at work, which hangs beyond, and of a busy machine
SEEN = ("seen", "crashes", "hangs")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a mistake, the seconds it took, and the first test that failed or else the printed text."""

    verdict: str
    seconds: float
    detail: str


def emulated_build(file: str) -> str:
    """The build whose emulation runs the tests of a mistake in this file."""
    return "amx" if Path(file).name.startswith("amx") else "avx512_bf16"


class Copy:
    """A copy of the repository, in which commands run, with engines that may be another copy's."""

    def __init__(self, folder: Path, engines: Path | None = None) -> None:
        self.folder, self.engines = folder, folder / "engines"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        if engines is not None:
            shutil.copytree(engines, self.engines)

    def compile_engine(self, build: str) -> None:
        """Compiles an emulated build of the engine. Raises CalledProcessError if the compiler refuses."""
        compile_engine(build, self.engines / build, source=self.folder)

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """A context in which the mistake is in this copy, compiled."""
        build = emulated_build(mutant.file)
        path, library = self.folder / mutant.file, self.engines / build / LIBRARY
        source, engine = path.read_text(), library.read_bytes()
        path.write_text(planted(mutant, source))
        try:
            if mutant in ENGINE:
                self.compile_engine(build)
            yield
        finally:
            path.write_text(source)
            library.write_bytes(engine)

    def test(self, file: str, wanted: str, is_interpreted: bool, build: str) -> Outcome:
        """Runs the tests of a file that the expression selects, on an emulated build, up to the first failure."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mistake may be as old and as long as the truth
            "TRITON_OFFSET_BIAS_BUILD": "portable",
            "TRITON_OFFSET_BIAS_FOLDER": str(self.engines / build),
            "TRITON_INTERPRET": "1" if is_interpreted else "0",
        }
        options = ["-x", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", wanted]
        command = [sys.executable, "-m", "pytest", *options, f"tests/{file}"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                **{"cwd": self.folder, "env": environment, "capture_output": True, "text": True},
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 10)),
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return Outcome("DOES NOT END", time.monotonic() - start, f"{file} -k {wanted!r}")
        if done.returncode == -signal.SIGXCPU:
            return Outcome("hangs", time.monotonic() - start, f"{file} -k {wanted!r}")
        failed = re.search(r"^FAILED .*?::(.*?)( - .*)?$", done.stdout, re.MULTILINE)
        verdict = {0: "NOT SEEN", 1: "seen"}.get(done.returncode, "crashes" if done.returncode < 0 else "DOES NOT RUN")
        detail = failed[1] if failed else done.stdout[-2000:] + done.stderr[-2000:] if done.returncode else ""
        return Outcome(verdict, time.monotonic() - start, detail)


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression in a mistake's name or file")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=os.cpu_count(), help="mistakes at a time (default: one for each core)"
    )
    parser.add_argument("--list", action="store_true", help="list the mistakes and plant none")
    arguments = parser.parse_args()
    chosen = [
        mutant for mutant in (*KERNELS, *ENGINE, *PACKAGE) if re.search(arguments.only, f"{mutant.name} {mutant.file}")
    ]
    if not chosen or arguments.jobs < 1:
        parser.error("no mistake matches PATTERN" if not chosen else "N must be at least 1")
    if wrong := misplaced(chosen):
        sys.exit("\n".join(wrong))
    if arguments.list:
        print("\n".join(f"{mutant.file}: {mutant.name}" for mutant in chosen))
        return
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: queue.Queue[Copy] = queue.Queue()
        first = Copy(Path(folder, "0"))
        for build in {emulated_build(mutant.file) for mutant in chosen}:
            first.compile_engine(build)
        copies.put(first)
        for index in range(1, arguments.jobs):
            copies.put(Copy(Path(folder, str(index)), first.engines))
        check_unmutated(chosen, copies, pool)
        outcomes = pool.map(lambda mutant: outcome_of(mutant, copies), chosen)
        seen = 0
        for mutant, outcome in tqdm(zip(chosen, outcomes, strict=True), "mistakes", len(chosen)):
            tqdm.write(line_of(mutant, outcome), file=sys.stdout)
            seen += outcome.verdict in SEEN
    print(f"{seen} of {len(chosen)} mistakes are seen")
    sys.exit(seen < len(chosen))


def check_unmutated(mutants: list[Mutant], copies: "queue.Queue[Copy]", pool: ThreadPoolExecutor) -> None:
    """Exits with an error unless the tests of all mistakes pass without a mistake."""
    wanted: dict[tuple[str, bool, str], list[str]] = {}
    for mutant in mutants:
        group = mutant.tests, mutant in KERNELS, emulated_build(mutant.file)
        wanted.setdefault(group, []).append(f"({mutant.wanted})")

    def run(group: tuple[str, bool, str]) -> Outcome:
        tests, is_interpreted, build = group
        with borrowed(copies) as copy:
            return copy.test(tests, " or ".join(dict.fromkeys(wanted[group])), is_interpreted, build)

    for group, outcome in tqdm(zip(wanted, pool.map(run, wanted), strict=True), "no mistake", len(wanted)):
        if outcome.verdict != "NOT SEEN":
            sys.exit(f"{group[0]} fails without any mistake: {outcome.verdict}\n{outcome.detail}")


def outcome_of(mutant: Mutant, copies: "queue.Queue[Copy]") -> Outcome:
    """Plants a mistake in a free copy and runs its tests there."""
    with borrowed(copies) as copy:
        try:
            with copy.planted(mutant):
                return copy.test(mutant.tests, mutant.wanted, mutant in KERNELS, emulated_build(mutant.file))
        except subprocess.CalledProcessError as error:
            return Outcome("DOES NOT RUN", 0.0, error.stderr[-2000:])


@contextlib.contextmanager
def borrowed(copies: "queue.Queue[Copy]") -> Iterator[Copy]:
    """A copy that nobody else uses meanwhile."""
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def line_of(mutant: Mutant, outcome: Outcome) -> str:
    """A row of the table: outcome, seconds, the mistake, and the test that saw it or the tests that should."""
    detail = f"{mutant.tests} -k {mutant.wanted!r}" if outcome.verdict == "NOT SEEN" else outcome.detail
    return f"{outcome.verdict:12} {outcome.seconds:4.0f} s  {mutant.file}: {mutant.name}\n{' ' * 21}{detail}"


if __name__ == "__main__":
    main()
