"""Compiles the CPU engine with sanitizers and runs its tests on these builds; the installed engine is left alone.

    python tests/sanitized/run.py [address] [thread] [--build NAME ...] [--examples N]

"address" looks for accesses outside of memory and for undefined behaviour, "thread" for data races. Without a name both
run. Each sanitizer first has to find planted mistakes. The fastest build runs all tests; the others run the fuzz test,
for which `--examples` is the number of calls to draw. So does "emulated", the build for AMX with emulated tiles: a
sanitizer does not see what the processor's tiles load and store. GCC with its sanitizers is needed. Builds stay in
`build/sanitized`.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# setuptools brings the distutils that newer Pythons no longer have.
import setuptools  # noqa: F401  # isort: skip
from distutils.core import run_setup

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from emulated import LIBRARY, compile_engine  # noqa: E402

HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "sanitized"
EMULATED = "emulated"
COMPILER = os.environ.get("CXX", "g++")
# These tests are left out: tests that measure memory or threads, which sanitizers use themselves; tests that reserve
# gigabytes; and a test that compiles an engine of its own, in which a sanitizer sees copies of memory, but not the
# atomics that order them.
OUT = "every_build or memory or openmp_runtime or as_many_threads or indices or 2_to_the_31 or no_instruction"


@dataclass(frozen=True)
class Sanitizer:
    """Compiler flags, the libraries to preload, the environment, planted mistakes with their reports, and tests."""

    flags: tuple[str, ...]
    preloaded: tuple[str, ...]
    environment: dict[str, str]
    mistakes: dict[str, tuple[int, str]]
    tests: tuple[str, ...]


SANITIZERS = {
    "address": Sanitizer(
        flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        preloaded=("libasan.so", "libstdc++.so"),
        # Python and torch leave memory to the end of the process.
        environment={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        mistakes={
            "heap_overflow": (8, "heap-buffer-overflow"),
            "signed_overflow": (1 << 20, "signed integer overflow"),
        },
        tests=(
            "attention",
            "empty_rows",
            "half_precision",
            "varlen",
            "positions",
            "dropout",
            "decode",
            "engine",
            "engine_fuzz",
            "gate",
            "gate_engine",
            "hostile",
            "load",
        ),
    ),
    "thread": Sanitizer(
        flags=("-fsanitize=thread",),
        preloaded=("libtsan.so", str(FOLDER / "openmp.so")),
        environment={"TSAN_OPTIONS": "halt_on_error=1"},
        mistakes={"data_race": (4, "data race")},
        tests=("varlen", "decode", "engine", "engine_fuzz", "gate_engine", "load"),
    ),
}


def main() -> None:
    """Runs the sanitizers that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="*", metavar="SANITIZER", help=" or ".join(SANITIZERS))
    parser.add_argument(
        "--build", action="append", help="build to test; may be repeated (default: all that run here, and 'emulated')"
    )
    parser.add_argument("--examples", type=int, default=50, help="calls that each fuzz test draws (default: 50)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    names = arguments.sanitizers or list(SANITIZERS)
    if unknown := set(names) - set(SANITIZERS):
        parser.error(f"SANITIZER must be one of {', '.join(SANITIZERS)}, got {', '.join(unknown)}")
    for name in names:
        compile_all(name)
        check_mistakes(name)
        best, *others = usable_builds()
        for build in arguments.build or (best, *others, EMULATED):
            run_tests(name, build, SANITIZERS[name].tests if build == best else ("engine_fuzz",), arguments.examples)


def compile_all(name: str) -> None:
    """Compiles the engine's builds, with the flags of `setup.py`, and the planted mistakes for a sanitizer."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-g1", "-fPIC", "-w", *SANITIZERS[name].flags]
    for extension in run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules:
        library = folder / f"{extension.name.rpartition('.')[2]}.abi3.so"
        sources = [ROOT / source for source in (*extension.sources, *extension.depends)]
        if not is_older(library, *sources):
            continue
        print(f"compiling {library.relative_to(ROOT)} ...", flush=True)
        call(COMPILER, *extension.extra_compile_args, "-O1", *flags, "-c", sources[0], "-o", library.with_suffix(".o"))
        call(COMPILER, "-shared", *SANITIZERS[name].flags, library.with_suffix(".o"), "-o", library)
    if is_older(folder / EMULATED / LIBRARY, *ROOT.glob("csrc_ref/*")):
        print(f"compiling {(folder / EMULATED / LIBRARY).relative_to(ROOT)} ...", flush=True)
        compile_engine("amx", folder / EMULATED, "-g1", *SANITIZERS[name].flags)
    call(COMPILER, "-shared", "-fopenmp", *flags, HERE / "mistakes.cpp", "-o", folder / "mistakes.so")
    call(COMPILER, "-shared", "-O1", "-fPIC", HERE / "openmp.cpp", "-o", FOLDER / "openmp.so")


def is_older(target: Path, *sources: Path) -> bool:
    """Whether a file is missing, or older than some source of it."""
    return not target.exists() or any(source.stat().st_mtime > target.stat().st_mtime for source in sources)


def usable_builds() -> list[str]:
    """The builds that this processor runs, the fastest first."""
    code = "from triton_offset_bias.backends import cpp; print(*cpp.RUNNABLE)"
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()


def environment_of(name: str) -> dict[str, str]:
    """The environment variables of a process with a sanitizer."""
    sanitizer = SANITIZERS[name]
    # The compiler prints a name that it does not know as it is, for example a name with its folder.
    find = [[COMPILER, f"-print-file-name={library}"] for library in sanitizer.preloaded]
    paths = [subprocess.check_output(command, text=True).strip() for command in find]
    return {**os.environ, **sanitizer.environment, "LD_PRELOAD": " ".join(paths)}


def check_mistakes(name: str) -> None:
    """Fails unless the sanitizer reports each planted mistake, and nothing where there is none."""
    library = FOLDER / name / "mistakes.so"
    for function, (argument, report) in {**SANITIZERS[name].mistakes, "no_mistake": (4, "")}.items():
        # torch brings the OpenMP runtime, as it does for the engine.
        code = f"import ctypes, torch; ctypes.CDLL({str(library)!r}).{function}({argument})"
        done = subprocess.run([sys.executable, "-c", code], env=environment_of(name), capture_output=True, text=True)
        if (done.returncode != 0) != bool(report) or report not in done.stderr:
            sys.exit(f"sanitizer {name!r} on {function}: status {done.returncode}\n{done.stderr[-3000:]}")
        print(f"{name}: {function} {'found' if report else 'passed'}", flush=True)


def run_tests(name: str, build: str, tests: tuple[str, ...], examples: int) -> None:
    """Runs tests on one build with a sanitizer, and ends this process unless they pass."""
    print(f"{name}: tests on build {build}", flush=True)
    variables = {
        "TRITON_OFFSET_BIAS_FOLDER": str(FOLDER / name / (EMULATED if build == EMULATED else "")),
        "TRITON_OFFSET_BIAS_BUILD": "portable" if build == EMULATED else build,
        "FUZZ_EXAMPLES": str(examples),
        "LOAD_CALLS": "20",
    }
    files = [f"tests/test_{test}.py" for test in tests]
    # Reports are written past Python: pytest must not catch them.
    options = [
        "-x",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-k",
        f"(cpp or test_engine or gate_engine or eight_threads) and not ({OUT})",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env={**environment_of(name), **variables}
    )
    if done.returncode:
        sys.exit(f"{name}, build {build}: pytest's status is {done.returncode}")


def call(*command: str | Path) -> None:
    """Runs a command."""
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
