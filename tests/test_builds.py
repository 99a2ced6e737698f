"""The choice of the CPU engine's build, and the text that tells the user about it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_offset_bias.backends import cpp
from triton_offset_bias.backends.cpp import library, structs

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).parents[1]


def _report(**environment: str) -> str:
    """The output of `python -m triton_offset_bias.info`."""
    command = [sys.executable, "-m", "triton_offset_bias.info"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("first", "chosen"), [(0, "amx"), (1, "avx512"), (2, "avx512"), (3, "avx2"), (4, "portable")])
def test_the_build_that_multiplies_bfloat16_is_for_processors_that_do_it_fast(first, chosen):
    """Intel's vectors multiply bfloat16 at half the rate of float32. On others the widest build is the fastest."""
    runnable = cpp.BUILDS[first:]
    assert library.fastest_builds(runnable, is_intel=True)[0] == chosen
    assert library.fastest_builds(runnable, is_intel=False) == runnable


@pytest.mark.needs_engine
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_engine_knows_whose_processor_it_runs_on_and_info_says_what_was_chosen():
    """The choice of a build depends on the processor's maker. The operating system names the same maker."""
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert library.load().library.tob_is_intel() == is_intel
    fastest = library.fastest_builds(cpp.RUNNABLE, is_intel)
    chosen = next(build for build in fastest if library.path_of(build))
    report = _report(**{cpp.BUILD_VARIABLE: ""})
    assert f"built for  {chosen} (" in report
    assert ("the fastest on this processor" if chosen == fastest[0] else f"{fastest[0]} would be faster") in report


def test_info_says_that_a_build_was_asked_for():
    """The text names the variable. Slower builds can be asked for on every processor."""
    report = _report(**{cpp.BUILD_VARIABLE: "portable"})
    assert "built for  portable (" in report
    assert f"asked for by {cpp.BUILD_VARIABLE}" in report


def _pretend(monkeypatch, widest: str, is_intel: bool, has_tiles: bool, compiled: tuple[str, ...] = cpp.BUILDS) -> None:
    """Gives the loader a processor, an operating system and compiled builds."""

    class Library:
        def __init__(self, path):
            self.tob_widest_build = self._function(widest.encode())
            self.tob_is_intel, self.tob_request_tiles = self._function(int(is_intel)), self._function(int(has_tiles))
            self.tob_build_description = self.tob_forward = self.tob_backward = self._function(None)

        @staticmethod
        def _function(result):
            def call():
                return result

            return call

    monkeypatch.delenv(cpp.BUILD_VARIABLE, raising=False)
    monkeypatch.setattr(library.ctypes, "CDLL", Library)
    monkeypatch.setattr(structs, "difference", lambda engine: None)
    monkeypatch.setattr(library, "path_of", lambda name: Path(name) if name in compiled else None)


@pytest.mark.parametrize(
    ("widest", "is_intel", "compiled", "build", "reason"),
    [
        ("amx", True, cpp.BUILDS, "amx", "the fastest on this processor: AMX tiles"),
        ("avx512_bf16", True, cpp.BUILDS, "avx512", "runs avx512_bf16 too, but VDPBF16PS"),
        ("avx512_bf16", False, cpp.BUILDS, "avx512_bf16", "the fastest on this processor: bfloat16 problems took 0.59"),
        ("avx2", False, cpp.BUILDS, "avx2", "the fastest on this processor"),
        ("amx", True, ("avx512", "portable"), "avx512", "amx would be faster and was not compiled"),
        ("avx512_bf16", True, ("avx512_bf16", "portable"), "portable", "avx512 would be faster and was not compiled"),
    ],
)
def test_a_processor_gets_its_build(monkeypatch, widest, is_intel, compiled, build, reason):
    """The fastest of the builds that were compiled, with the reason; each that runs can be asked for."""
    _pretend(monkeypatch, widest, is_intel, True, compiled)
    engine = library.load()
    assert engine.build == build
    assert reason in engine.reason
    monkeypatch.setenv(cpp.BUILD_VARIABLE, "portable")
    assert library.load().build == "portable"


def test_where_the_operating_system_refuses_tiles_the_next_build_is_taken(monkeypatch):
    """It says so, and to ask for tiles by name is an error."""
    _pretend(monkeypatch, "amx", is_intel=True, has_tiles=False)
    engine = library.load()
    assert engine.build == "avx512"
    assert "amx" not in engine.runnable
    assert "the operating system refuses the tiles of amx" in engine.reason
    monkeypatch.setenv(cpp.BUILD_VARIABLE, "amx")
    assert library.load().library is None
    assert library.load().reason == f"{cpp.BUILD_VARIABLE}=amx, but the operating system refuses the tiles of amx"


@pytest.mark.needs_engine
def test_a_processor_without_tiles_gets_none():
    """The operating system refuses what is not there, and the process lives on."""
    engine = library.load().library
    if engine.tob_widest_build() != b"amx":
        assert engine.tob_request_tiles() == 0


@pytest.mark.needs_engine
def test_an_engine_of_other_sources_is_not_called(monkeypatch):
    """An engine that lacks a function gives a reason, and no exception at import."""

    class Library:
        def __init__(self, path):
            pass

    monkeypatch.setattr(library.ctypes, "CDLL", Library)
    assert library.load().library is None
    assert "compiled from other sources" in library.load().reason


def test_every_build_has_the_structs_and_numbers_that_the_package_has():
    """Layouts are compared field by field, for the portable build and for the builds that the processor runs."""
    paths = {build: library.path_of(build) for build in {"portable", *cpp.RUNNABLE}}
    for build, path in paths.items():
        if path is not None:
            assert structs.layout_of(ctypes.CDLL(str(path))) == structs.layout(), build


def test_the_layout_that_is_compared_is_the_one_that_is_packed():
    """The last field ends where the struct ends. The first fields lie where `struct` puts their bytes."""
    lines = structs.layout()
    assert f"tob_problem: bytes {structs.PROBLEM.size}" in lines
    assert f"tob_problem.is_part: q {structs.PROBLEM.size - 8}" in lines
    packed = structs.TENSOR.pack(1, 2, 3, 4, 5)
    assert "tob_tensor.stride_h: q 16" in lines
    assert int.from_bytes(packed[16:24], sys.byteorder) == 3


@pytest.mark.needs_engine
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("key_mask query_positions", "query_positions key_mask", "expected"),
        ("d scale", "d scale softcap", "it has 'tob_problem: bytes "),
        ("I largest_dropped", "Q largest_dropped", "'tob_problem.largest_dropped: I "),
    ],
)
def test_an_engine_beside_a_package_with_other_structs_is_not_called(monkeypatch, old, new, reason):
    """Each of these gives a reason: two fields that change places, a new field, and a field that grows into padding."""
    fields = structs.STRUCTS["tob_problem"]
    monkeypatch.setitem(structs.STRUCTS, "tob_problem", fields.replace(old, new))
    assert structs.STRUCTS["tob_problem"] != fields
    engine = library.load()
    assert engine.library is None
    assert "compiled from other sources" in engine.reason
    assert reason in engine.reason


@pytest.mark.needs_engine
@pytest.mark.parametrize(
    ("names", "name", "difference"),
    [
        (
            structs.NUMBERS,
            "TOB_MAX_DIM",
            "it has 'TOB_MAX_DIM: number 256' where 'TOB_MAX_DIM: number 257' was expected",
        ),
        (structs.NUMBERS, "TOB_MAX_LENGTH", f"'TOB_MAX_LENGTH: number {2**30}' where"),
        (structs.NUMBERS, "TOB_MAX_SPREAD", f"'TOB_MAX_SPREAD: number {2**29}' where"),
        (structs.NUMBERS, "TOB_UNLIMITED", f"'TOB_UNLIMITED: number {2**61}' where"),
        (structs.FUNCTIONS, "tob_backward", "'tob_backward: pointers 10' where 'tob_backward: pointers 11'"),
    ],
)
def test_an_engine_beside_a_package_with_other_numbers_is_not_called(monkeypatch, names, name, difference):
    """The numbers are limits that both languages have, and a function's number of arguments."""
    monkeypatch.setitem(names, name, names[name] + 1)
    engine = library.load()
    assert engine.library is None
    assert difference in engine.reason
