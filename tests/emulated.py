"""Builds of the engine for tests alone: they do without the instructions of a build, slowly, on any processor.

Each is the portable build with other products, and takes its place in a folder of its own.
"""

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = "_engine_portable.abi3.so"
# What is added to the portable build's flags; GCC notes that processors with longer vectors pass these otherwise.
FLAGS = {
    "avx512_bf16": ("-DTOB_BFLOAT16_PRODUCTS=1",),
    "amx": ("-DTOB_AMX=1", "-UTOB_VECTOR_BYTES", "-DTOB_VECTOR_BYTES=64", "-Wno-psabi"),
}


@functools.cache
def portable_flags() -> tuple[str, ...]:
    """The flags with which `setup.py` compiles the portable build."""
    # A bare machine has no setuptools. It brings the distutils that newer Pythons no longer have.
    import setuptools  # noqa: F401  # isort: skip
    from distutils.core import run_setup

    extensions = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules
    return tuple(next(x for x in extensions if x.name.endswith("portable")).extra_compile_args)


def compile_engine(build: str, folder: Path, *flags: str, source: Path = ROOT) -> None:
    """Compiles the emulation of a build from the repository at `source`, into `folder`.

    Raises:
        subprocess.CalledProcessError: the compiler refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler, compiled = os.environ.get("CXX", "c++"), folder / "engine.o"
    options = [*portable_flags(), *FLAGS[build], "-O1", "-fPIC", "-w", *flags]
    # Linked without OpenMP's runtime: torch brings it.
    for command in (
        [compiler, *options, "-c", source / "csrc_ref" / "engine.cpp", "-o", compiled],
        [compiler, "-shared", *flags, compiled, "-o", folder / LIBRARY],
    ):
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
