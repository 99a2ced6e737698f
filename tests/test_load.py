"""The CPU engine under load: many threads, forked processes, ten thousand calls, an interrupt, errors between calls."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import Case, build, results_of
from oracle import NAMES, Results
from torch.utils.data import DataLoader, Dataset

from triton_offset_bias import offset_bias_attention

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.needs_engine,
]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
ROOT = Path(__file__).parents[1]
CALLS_PER_THREAD = int(os.environ.get("LOAD_CALLS", "1000"))
TILES = Case("tiles, causal", (40, 50), (8, 24), options={"is_causal": True}, through_lse=True)
MIXED = [
    Case("one query, one key", (1, 1), (1, 1)),
    Case("a decoding step", (1, 65), (16, 16), heads=(4, 2)),
    TILES,
    Case("half precision, holes", (20, 33), dtype=torch.bfloat16, mask="holes"),
    Case("float64, a short table", (13, 30), dtype=torch.float64, columns=5, options={"beyond": "zero"}),
    Case("a window, no table", (70, 70), bias=None, options={"window_size": (9, 3)}),
    Case("positions", (15, 16), options={"query_positions": torch.arange(15) * 2, "key_positions": torch.arange(16)}),
    Case("no queries", (0, 7)),
]


@pytest.fixture(autouse=True)
def _restored_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def differing(got: Results, expected: Results) -> list[str]:
    """The names of results that are not the same bit for bit."""
    pairs = [(name, getattr(got, name), getattr(expected, name)) for name in NAMES]
    return [name for name, x, y in pairs if x is not None and not torch.equal(x, y)]


def test_eight_threads_at_once_get_what_one_gets():
    """Each thread makes `LOAD_CALLS` mixed calls, forward and backward, with two OpenMP threads."""
    torch.set_num_threads(2)
    expected = [results_of(build(case), "cpp") for case in MIXED]

    def work(first: int) -> list[str]:
        calls = [build(case) for case in MIXED]
        order = [(first + index) % len(MIXED) for index in range(CALLS_PER_THREAD)]
        return [name for index in order for name in differing(results_of(calls[index], "cpp"), expected[index])]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8


def attend(q: torch.Tensor) -> torch.Tensor:
    """The output and the table's gradient of a call that is large enough for several threads."""
    bias = torch.linspace(-1, 1, 199, requires_grad=True)
    out = offset_bias_attention(q, q, q, bias, backend="cpp")
    return torch.cat([out.detach().flatten(), *torch.autograd.grad(out, bias, q)])


class Attended(Dataset):
    """Items made by the engine inside of a worker process."""

    def __init__(self) -> None:
        self.queries = torch.randn(6, 1, 4, 100, 16)

    def __len__(self) -> int:
        """The number of items."""
        return len(self.queries)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The result of `attend`."""
        return attend(self.queries[index])


@needs_linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of a process with threads: the point here
def test_forked_workers_of_a_data_loader_can_call_it_after_their_parent_has():
    """A child has none of the parent's OpenMP threads. The loader's timeout ends a deadlock."""
    torch.set_num_threads(2)
    items = Attended()
    expected = [items[index] for index in range(len(items))]
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(*pair) for pair in zip(loader, expected, strict=True))


@needs_linux
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    """The child has no such threads, although torch is set to as many.

    It works alone. (Operators of torch may well hang.)
    """
    code = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
from test_load import attend
torch.set_num_threads(3)
q = torch.randn(1, 4, 100, 16)
expected = attend(q)
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    signal.alarm(60)
    os._exit(0 if torch.get_num_threads() == 3 and torch.equal(attend(q), expected) else 1)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def resident_bytes() -> int:
    """The memory of this process that is in use."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@needs_linux
def test_ten_thousand_calls_leave_no_memory_behind():
    """The calls are tiny, of every kind, forward and backward. A leak of 1 KB a call would be 8 MB."""
    torch.set_num_threads(1)
    calls = [build(case) for case in MIXED]
    for index in range(2000):
        results_of(calls[index % len(calls)], "cpp")
    before = resident_bytes()
    for index in range(8000):
        results_of(calls[index % len(calls)], "cpp")
    assert resident_bytes() - before < 4 * 2**20


@needs_linux
def test_an_interrupt_during_a_call_is_raised_after_it_and_the_next_call_is_right():
    """A call of the engine cannot be interrupted. Python raises KeyboardInterrupt when the call is over."""
    code = """
import os, signal, threading, time, torch
from triton_offset_bias import offset_bias_attention
torch.set_num_threads(2)
small = torch.randn(1, 2, 60, 16)
expected = offset_bias_attention(small, small, small, None, backend="cpp")
q = torch.randn(1, 4, 6000, 64)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
give_up = time.monotonic() + 60
try:
    while time.monotonic() < give_up:  # almost all of the time is spent in a call
        offset_bias_attention(q, q, q, None, backend="cpp")
    print("not interrupted")
except KeyboardInterrupt:
    again = offset_bias_attention(small, small, small, None, backend="cpp")
    print("interrupted", torch.equal(again, expected))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "interrupted True", done.stderr


@needs_linux
def test_a_call_without_memory_says_so_and_lets_go_of_its_tensors():
    """The process may take memory for the outputs (42 MB), but not for the engine's scratch (150 MB).

    Smaller calls still work.
    """
    code = """
import os, resource, weakref, torch
from pathlib import Path
from triton_offset_bias import offset_bias_attention
def attend(length):
    q = torch.ones(1, 1, length, 64, dtype=torch.bfloat16)
    seen.append(weakref.ref(q))
    return offset_bias_attention(q, q, q, torch.zeros(1, 5), window_size=(8, 8), backend="cpp")
seen = []
expected = attend(100)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
_, hard = resource.getrlimit(resource.RLIMIT_AS)
for _ in range(2):
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 100 * 2**20, hard))
    try:
        attend(300_000)
    except MemoryError as error:
        print(error)
    print(torch.equal(attend(100), expected), all(tensor() is None for tensor in seen))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    failure = "the CPU engine could not allocate its scratch memory"
    assert done.stdout.splitlines() == [failure, "True True"] * 2, done.stderr


def test_errors_leave_no_state_behind():
    """Refused arguments, an error in the operator, or an error in a hook of backward do not change the next call."""
    call = build(TILES)
    expected = results_of(call, "cpp")
    before = threading.active_count()

    def fail(gradient: torch.Tensor) -> None:
        raise ArithmeticError("from a hook")

    for _ in range(20):
        with pytest.raises(ValueError, match="`bias`"):
            offset_bias_attention(call.q, call.k, call.v, torch.zeros(3, 5, 7, 9), backend="cpp")
        with pytest.raises(ValueError, match="beyond='error'"):
            offset_bias_attention(
                call.q, call.k, call.v, torch.zeros(3), beyond="error", backend="cpp",
                key_padding_mask=torch.ones(2, 50, dtype=torch.bool),
            )  # fmt: skip
        out = offset_bias_attention(call.q, call.k, call.v, call.bias, backend="cpp")
        out.register_hook(fail)
        with pytest.raises(ArithmeticError, match="from a hook"):
            out.sum().backward()
        assert differing(results_of(call, "cpp"), expected) == []
    assert threading.active_count() == before
