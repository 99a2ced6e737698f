"""The engine's builds, one for each instruction set. The fastest one on this processor is loaded.

`TRITON_OFFSET_BIAS_BUILD=portable` (or another of `BUILDS`) asks for a build by name. `TRITON_OFFSET_BIAS_FOLDER` names
a folder whose builds take the place of the package's.
"""

import ctypes
import importlib.machinery
import os
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  it brings the OpenMP runtime that the engine calls

from triton_offset_bias.backends.cpp import structs

BUILDS = ("avx512_bf16", "avx512", "avx2", "portable")  # each runs where those before it do
BUILD_VARIABLE = "TRITON_OFFSET_BIAS_BUILD"
FOLDER_VARIABLE = "TRITON_OFFSET_BIAS_FOLDER"


def path_of(build: str) -> Path | None:
    """The path of a build; None if it was not compiled."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parents[2])
    candidates = (folder / f"_engine_{build}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def fastest_builds(runnable: tuple[str, ...], is_intel: bool) -> tuple[str, ...]:
    """The builds to choose from, the fastest first, on a processor that can run the builds in `runnable`.

    Intel's processors multiply bfloat16 numbers (VDPBF16PS) at half the rate of float32 numbers.
    """
    return tuple(build for build in runnable if not (is_intel and build == "avx512_bf16"))


class Engine(NamedTuple):
    """The loaded engine, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str  # why this build was chosen, or why there is none
    build: str = ""
    runnable: tuple[str, ...] = ()  # the builds that the processor can run


def load() -> Engine:
    """Loads the build that is asked for, or the fastest."""
    wanted = os.environ.get(BUILD_VARIABLE, "")
    if wanted and wanted not in BUILDS:
        return Engine(None, f"{BUILD_VARIABLE} must be one of {', '.join(BUILDS)}, got {wanted!r}")
    portable = path_of("portable")
    if portable is None:
        return Engine(None, "the engine was not compiled: install a C++ compiler, then install the package again")
    try:
        # The engine's OpenMP calls bind to the runtime that torch has brought into the process. It loads no other.
        library = ctypes.CDLL(str(portable))
        library.tob_widest_build.restype = ctypes.c_char_p
        runnable = BUILDS[BUILDS.index(library.tob_widest_build().decode()) :]
        fastest = fastest_builds(runnable, bool(library.tob_is_intel()))
        build = wanted or next(b for b in fastest if path_of(b))
        if build not in runnable:
            return Engine(
                None, f"{BUILD_VARIABLE}={wanted}, but this processor runs {runnable[0]} at most", "", runnable
            )
        path = path_of(build)
        if path is None:
            return Engine(None, f"{BUILD_VARIABLE}={wanted}, but that build was not compiled", "", runnable)
        library = ctypes.CDLL(str(path))
        _declare(library)
    except OSError as error:
        return Engine(None, f"the engine could not be loaded: {error}")
    except (AttributeError, ImportError) as error:  # it lacks a function, or has other structs
        return Engine(None, f"the engine was compiled from other sources ({error}): install the package again")
    return Engine(
        library, f"asked for by {BUILD_VARIABLE}" if wanted else _why(build, runnable, fastest), build, runnable
    )


def _declare(library: ctypes.CDLL) -> None:
    """Declares the library's functions.

    Raises:
        AttributeError: the library lacks a function.
        ImportError: the library reads other structs than this package writes.
    """
    library.tob_build_description.restype = ctypes.c_char_p
    if difference := structs.difference(library):
        raise ImportError(difference)
    for name, count in structs.FUNCTIONS.items():
        getattr(library, name).argtypes = [ctypes.c_void_p] * count


def _why(build: str, runnable: tuple[str, ...], fastest: tuple[str, ...]) -> str:
    """The reason why a build was chosen when nobody asked for one by name."""
    if build != fastest[0]:
        return f"{fastest[0]} would be faster and was not compiled"
    if build != runnable[0]:
        return f"the fastest on this processor, which runs {runnable[0]} too but multiplies bfloat16 numbers slowly"
    return "the fastest on this processor"
