"""Facts of the CPU engine beyond its results: threads, floating-point environment, builds, memory."""

import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import Case, build, results_of
from emulated import compile_engine
from oracle import NAMES, Results

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen
from triton_offset_bias.backends import cpp
from triton_offset_bias.backends.cpp import library

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SPLIT = [
    Case("one head: work is split by blocks", (401, 397), (24, 40), batch=1, heads=(1, 1), through_lse=True),
    Case("one head, causal", (400, 400), batch=1, heads=(1, 1), options={"is_causal": True}),
    Case(
        "shared key heads: several queries' heads add to one gradient",
        (130, 230),
        heads=(6, 2),
        mask="holes",
        bias="N",
        columns=51,
        options={"window_size": (70, 40)},
    ),
    Case("more heads than threads, a table each", (97, 97), batch=4, heads=(5, 5), bias="BHN", dtype=torch.bfloat16),
    Case("float64", (150, 140), batch=1, heads=(2, 1), dtype=torch.float64, options={"is_causal": True}),
    Case(
        "gathered by positions",
        (130, 230),
        columns=51,
        options={"query_positions": torch.arange(130) * 3 % 71, "key_positions": torch.arange(230) * 5 % 83},
    ),
    Case(
        "positions that recur in all sequences",
        (130, 150),
        (40, 24),
        batch=8,
        columns=51,
        options={"query_positions": torch.arange(130) * 3 % 71, "key_positions": torch.arange(150) * 5 % 83},
    ),
]
DROPPING = Case("dropout", (130, 230), heads=(4, 2), options={"dropout_p": 0.3, "window_size": (90, 20)})


@pytest.fixture(autouse=True)
def _restored_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(code: str, **environment: str) -> str:
    """The output of a fresh Python that runs `code` with the package on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _passed(wanted: str, files: list[str], **environment: str) -> int:
    """The number of tests of the files that the expression selects and that pass; none may fail."""
    options = ["-p", "no:cacheprovider", "--tb=line", "-k", wanted]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/test_{file}.py" for file in files)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def _assert_bitwise_equal(got: Results, expected: Results) -> None:
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(expected, name)), f"{name} differs"


@pytest.mark.parametrize("case", [*SPLIT, DROPPING], ids=lambda case: case.reason)
def test_results_are_bitwise_equal_for_any_number_of_threads(case):
    """Output, log-sum-exp and all gradients with 1, 2, 3 and 5 threads are equal, the last two twice."""
    torch.set_num_threads(1)
    expected = results_of(build(case), "cpp")
    for threads in (2, 3, 3, 5, 5):
        torch.set_num_threads(threads)
        _assert_bitwise_equal(results_of(build(case), "cpp"), expected)


def test_packed_results_are_bitwise_equal_for_any_number_of_threads():
    """Short and long sequences lie together. The table's gradient sums over all of them."""
    bounds = torch.tensor([0, 3, 150, 150, 161, 400], dtype=torch.int32)
    q, k, v = (torch.randn(400, 2, 16, requires_grad=True) for _ in range(3))
    bias, dout = torch.randn(2, 51, requires_grad=True), torch.randn(400, 2, 16)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        out = offset_bias_attention_varlen(q, k, v, bias, bounds, bounds, 239, 239, backend="cpp")
        results.append([out, *torch.autograd.grad(out, [q, k, v, bias], dout)])
    assert all(torch.equal(x, first) for other in results[1:] for x, first in zip(other, results[0], strict=True))


def test_several_python_threads_at_once_get_what_one_gets():
    """Different calls run side by side, forward and backward, each with OpenMP threads of its own."""
    torch.set_num_threads(2)
    cases = SPLIT * 3
    expected = [results_of(build(case), "cpp") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda case: results_of(build(case), "cpp"), cases))
    for results, alone in zip(got, expected, strict=True):
        _assert_bitwise_equal(results, alone)


def test_other_python_threads_run_during_a_call():
    """A call releases the global interpreter lock. The main thread runs while another thread is inside a call."""
    q = torch.randn(1, 2, 3000, 64)
    worker = threading.Thread(target=offset_bias_attention, args=(q, q, q, None), kwargs={"backend": "cpp"})
    worker.start()
    wakings = 0
    while worker.is_alive():
        worker.join(0.001)
        wakings += 1
    assert wakings > 8


CALL = """
import os, torch
from triton_offset_bias import offset_bias_attention
def call(length=300, dim=16):
    q = torch.randn(1, 1, length, dim, requires_grad=True)
    bias = torch.zeros(1, 2 * length - 1, requires_grad=True)
    offset_bias_attention(q, q, q, bias, backend="cpp").sum().backward()
"""


@needs_linux
def test_the_process_has_one_openmp_runtime():
    """torch's runtime serves the engine's OpenMP calls. The memory map holds no second runtime."""
    maps = _run(CALL + "torch.set_num_threads(2); call(); print(open('/proc/self/maps').read())")
    runtimes = {path for path in re.findall(r"(/\S+)$", maps, re.MULTILINE) if re.search(r"lib(g|i)?omp\d*\b", path)}
    assert "_engine_" in maps
    assert len(runtimes) == 1, runtimes


@needs_linux
def test_the_engine_uses_as_many_threads_as_torch_is_set_to():
    """With one thread the caller does the work. With three, two more threads join the caller."""
    count = "print(len(os.listdir('/proc/self/task')) - before)"
    code = (
        CALL
        + f"""
before = len(os.listdir('/proc/self/task'))
torch.set_num_threads(1); offset_bias_attention(*[torch.ones(1, 4, 300, 16)] * 3, None, backend='cpp'); {count}
torch.set_num_threads(3); offset_bias_attention(*[torch.ones(1, 4, 300, 16)] * 3, None, backend='cpp'); {count}
"""
    )
    assert _run(code).split() == ["0", "2"]


@pytest.mark.parametrize("helpers", ["", "(many * 1).sum()"], ids=["started inside the call", "started before"])
def test_a_call_leaves_the_treatment_of_denormals_as_it_was(helpers):
    """The engine flushes denormals while it runs. The caller and the threads that helped get their own setting back."""
    code = (
        CALL
        + f"""
import numpy as np
many = torch.full((1 << 20,), 1e-39)
torch.set_num_threads(3)
{helpers}
call()
print(np.float32(1e-39) * np.float32(1) != 0, int((many * 1 != 0).sum()) == 1 << 20)
torch.set_flush_denormal(True)
call()
print(np.float32(1e-39) * np.float32(1) == 0)
"""
    )
    assert _run(code).split() == ["True", "True", "True"]


# glibc fills fresh memory with bytes 0x7f: as floats these are huge, so that scratch which nobody wrote is seen.
POISON = {"MALLOC_PERTURB_": "128", "MALLOC_MMAP_THRESHOLD_": str(1 << 24)}


@pytest.mark.parametrize("build", cpp.BUILDS)
def test_every_build_agrees_with_the_oracle_and_reads_no_memory_before_writing_it(build):
    """A process whose environment variable asks for the build runs listed calls, empty rows, halves and zero sizes."""
    state = _run(
        "from triton_offset_bias.backends import cpp; print(cpp.BUILD, cpp.unavailable_reasons())",
        **{cpp.BUILD_VARIABLE: build},
    )
    if build not in cpp.RUNNABLE:
        assert f"{cpp.BUILD_VARIABLE}={build}" in state
        assert f"runs {cpp.RUNNABLE[0]} at most" in state or (build == "amx" and library.REFUSED in state)
        return
    assert state == f"{build} []"
    # Filling what "indices beyond 2**31" reserves would take gigabytes.
    wanted = "(cpp and not named and not indices or test_exponentials or test_gate_engine)"
    wanted += " and not compiled and not less_memory"
    files = ["attention", "empty_rows", "half_precision", "checks", "one_key", "positions", "exponentials", "gate"]
    files += ["gate_engine"]
    assert _passed(wanted, files, **POISON, **{cpp.BUILD_VARIABLE: build}) > 90


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiles the engine")
@pytest.mark.parametrize(
    ("emulated", "products"), [("avx512_bf16", "bfloat16 products"), ("amx", "bfloat16 products in emulated AMX tiles")]
)
def test_products_of_bfloat16_numbers_are_right_where_no_instruction_multiplies_them(tmp_path, emulated, products):
    """The portable build with the products of other builds: their layouts, orders and roundings, on any processor."""
    compile_engine(emulated, tmp_path)
    environment = {cpp.BUILD_VARIABLE: "portable", cpp.FOLDER_VARIABLE: str(tmp_path)}
    assert products in _run(
        "from triton_offset_bias.backends import cpp; print(cpp.build_description())", **environment
    )
    files = [
        "attention",
        "empty_rows",
        "half_precision",
        "decode",
        "dropout",
        "engine_fuzz",
        "one_key",
        "hostile",
        "positions",
        "bfloat16",
        "gate",
        "gate_engine",
    ]
    wanted = "(cpp or engine_fuzz or test_bfloat16 or test_gate_engine) and not indices and not 2_to_the_31"
    wanted += " and (bfloat16 or not gate)"
    assert _passed(wanted, files, **environment) > 150
    assert _passed("bitwise or denormals", ["engine"], **environment) > 5


@needs_linux
@pytest.mark.skipif(shutil.which("clang++") is None, reason="Clang is not installed")
def test_an_engine_that_clang_compiled_runs_on_the_openmp_runtime_of_torch(tmp_path, monkeypatch):
    """On Linux torch brings GCC's runtime. Clang's OpenMP pragmas call functions that it does not have."""
    monkeypatch.setenv("CXX", "clang++")
    compile_engine("avx512_bf16", tmp_path)
    environment = {cpp.BUILD_VARIABLE: "portable", cpp.FOLDER_VARIABLE: str(tmp_path)}
    assert _passed("bitwise or denormals", ["engine"], **environment) > 5


def test_an_unknown_build_is_a_reason_against_the_engine_and_auto_takes_the_reference():
    """The error names the variable, its allowed values and the given one. No other build is loaded instead."""
    code = """
import torch
from triton_offset_bias import offset_bias_attention
inputs = [torch.arange(24.).view(1, 1, 6, 4).sin()] * 3
same = torch.equal(offset_bias_attention(*inputs, None), offset_bias_attention(*inputs, None, backend="reference"))
try:
    offset_bias_attention(*inputs, None, backend="cpp")
except NotImplementedError as error:
    print(same, error)
"""
    printed = _run(code, **{cpp.BUILD_VARIABLE: "avx1024"})
    assert printed.startswith("True ")
    for part in ("cpp", cpp.BUILD_VARIABLE, *cpp.BUILDS, "got 'avx1024'"):
        assert part in printed


@needs_linux
def test_a_training_step_needs_far_less_memory_than_one_matrix_of_scores():
    """A matrix of 8192 x 8192 scores takes 256 MiB.

    Forward and backward together grow the process by less than 64 MiB.
    """
    code = (
        CALL
        + """
def kilobytes(field):
    return int(next(line for line in open('/proc/self/status') if line.startswith(field)).split()[1])
torch.set_num_threads(2)
call(200)
before = kilobytes('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # resets the peak to the present memory
call(8192)
print((kilobytes('VmHWM') - before) // 1024, (kilobytes('VmRSS') - before) // 1024)
"""
    )
    peak, kept = map(int, _run(code).split())
    assert peak < 64
    assert kept < 16
