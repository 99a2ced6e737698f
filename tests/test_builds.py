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


@pytest.mark.parametrize(("first", "chosen"), [(0, "avx512"), (1, "avx512"), (2, "avx2"), (3, "portable")])
def test_the_build_that_multiplies_bfloat16_is_for_processors_that_do_it_fast(first, chosen):
    """Intel's processors multiply bfloat16 at half the rate of float32. On others the widest build is the fastest."""
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


@pytest.mark.parametrize(
    ("is_intel", "compiled", "build", "reason"),
    [
        (1, cpp.BUILDS, "avx512", "which runs avx512_bf16 too but multiplies bfloat16 numbers slowly"),
        (0, cpp.BUILDS, "avx512_bf16", "the fastest on this processor"),
        (1, ("avx512_bf16", "portable"), "portable", "avx512 would be faster and was not compiled"),
    ],
)
def test_a_processor_gets_its_build(monkeypatch, is_intel, compiled, build, reason):
    """The processor, of either maker, can run all builds. Its fastest build that was compiled is loaded."""

    class Function:
        def __init__(self, result):
            self.result = result

        def __call__(self):
            return self.result

    class Library:
        def __init__(self, path):
            self.tob_widest_build, self.tob_is_intel = Function(b"avx512_bf16"), Function(is_intel)
            self.tob_build_description = self.tob_forward = self.tob_backward = Function(None)

    monkeypatch.delenv(cpp.BUILD_VARIABLE, raising=False)
    monkeypatch.setattr(library.ctypes, "CDLL", Library)
    monkeypatch.setattr(structs, "difference", lambda engine: None)
    monkeypatch.setattr(library, "path_of", lambda name: Path(name) if name in compiled else None)
    engine = library.load()
    assert engine.build == build
    assert reason in engine.reason
    monkeypatch.setenv(cpp.BUILD_VARIABLE, "avx512_bf16")
    assert library.load().build == "avx512_bf16"


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
    assert f"tob_problem.kept_scale: d {structs.PROBLEM.size - 8}" in lines
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
        (structs.FUNCTIONS, "tob_backward", "'tob_backward: pointers 9' where 'tob_backward: pointers 10'"),
    ],
)
def test_an_engine_beside_a_package_with_other_numbers_is_not_called(monkeypatch, names, name, difference):
    """The numbers are limits that both languages have, and a function's number of arguments."""
    monkeypatch.setitem(names, name, names[name] + 1)
    engine = library.load()
    assert engine.library is None
    assert difference in engine.reason
