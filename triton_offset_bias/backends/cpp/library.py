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

BUILDS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")  # each runs where those before it do
BUILD_VARIABLE = "TRITON_OFFSET_BIAS_BUILD"
FOLDER_VARIABLE = "TRITON_OFFSET_BIAS_FOLDER"
REFUSED = "the operating system refuses the tiles of amx"


def path_of(build: str) -> Path | None:
    """The path of a build; None if it was not compiled."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parents[2])
    candidates = (folder / f"_engine_{build}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


class Known(NamedTuple):
    """A fact about the processors of one maker: whether a build is fast there, and why."""

    build: str
    is_intel: bool
    is_fast: bool
    why: str


# Builds that differ in how they multiply bfloat16 numbers. AMD's figure is CPU time, forward as well as with backward:
# B=1, H=8, L=512 to 1024, D=64.
PROCESSORS = (
    Known("amx", True, True, "AMX tiles multiply bfloat16 numbers"),
    Known("avx512_bf16", True, False, "VDPBF16PS multiplies bfloat16 numbers at half the rate of float32 numbers"),
    Known("avx512_bf16", False, True, "bfloat16 problems took 0.59 of the time of avx512 on AMD Zen 4"),
)


def fastest_builds(runnable: tuple[str, ...], is_intel: bool) -> tuple[str, ...]:
    """The builds to choose from, the fastest first, on a processor that can run the builds in `runnable`."""
    slow = {known.build for known in PROCESSORS if known.is_intel == is_intel and not known.is_fast}
    return tuple(build for build in runnable if build not in slow)


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
        is_refused = runnable[0] == "amx" and not library.tob_request_tiles()
        if is_refused:
            runnable = runnable[1:]
        is_intel = bool(library.tob_is_intel())
        fastest = fastest_builds(runnable, is_intel)
        build = wanted or next(b for b in fastest if path_of(b))
        if build not in runnable:
            reason = REFUSED if is_refused else f"this processor runs {runnable[0]} at most"
            return Engine(None, f"{BUILD_VARIABLE}={wanted}, but {reason}", "", runnable)
        path = path_of(build)
        if path is None:
            return Engine(None, f"{BUILD_VARIABLE}={wanted}, but that build was not compiled", "", runnable)
        library = ctypes.CDLL(str(path))
        _declare(library)
    except OSError as error:
        return Engine(None, f"the engine could not be loaded: {error}")
    except (AttributeError, ImportError) as error:  # it lacks a function, or has other structs
        return Engine(None, f"the engine was compiled from other sources ({error}): install the package again")
    why = f"asked for by {BUILD_VARIABLE}" if wanted else _why(build, runnable, fastest, is_intel)
    return Engine(library, f"{why}; {REFUSED}" if is_refused and not wanted else why, build, runnable)


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


def _why(build: str, runnable: tuple[str, ...], fastest: tuple[str, ...], is_intel: bool) -> str:
    """The reason why a build was chosen when nobody asked for one by name."""
    if build != fastest[0]:
        return f"{fastest[0]} would be faster and was not compiled"
    wider = runnable[: runnable.index(build)]
    known = [fact for fact in PROCESSORS if fact.is_intel == is_intel]
    facts = [fact.why for fact in known if fact.build == build]
    facts += [f"it runs {fact.build} too, but {fact.why}" for fact in known if fact.build in wider]
    return ": ".join(["the fastest on this processor", *facts])
