"""Fixtures that every test may use.

`PTXEMU=FOLDER` makes the PTX emulator in that folder Triton's device, as an NVIDIA GPU of `PTXEMU_ARCH` (80 or 90).
`TEST_DEVICE=cuda` puts every tensor that a test makes on that device; tests of the CPU engine are left out.
`TESTS_REQUIRE_ALL=1`, which `make` sets, makes a missing library or engine an error; otherwise its tests are skipped.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Programs that tests start find the package as the tests do, whatever their folder is.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])]))
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # The workers fill the cores. With two threads in each, threads would wait for others that wait for a core.
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)
if "PTXEMU" in os.environ:
    sys.path.insert(0, os.environ["PTXEMU"])
    import triton_offline

    triton_offline.install(arch=int(os.environ.get("PTXEMU_ARCH", "80")))

from bare import (
    REQUIRE_ALL,
    OptionalModule,
    has_device,
    lacking_memory,
    own_warnings,
    watched_memory,
)

from bench.torchvision_operators import declare_operators_of_torchvision
from triton_offset_bias.backends.contract import BACKENDS

declare_operators_of_torchvision()
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
IS_ON_CPU = torch.device(DEVICE).type == "cpu"
if not IS_ON_CPU and has_device(DEVICE):  # on a CPU it would only slow each of torch's functions down
    torch.set_default_device(DEVICE)


def _serves_the_device(name: str) -> bool:
    """Whether the backend can serve calls on this machine with tensors on the device of the tests."""
    backend = BACKENDS[name]
    if backend.unavailable_reasons():
        return False
    if name == "triton":
        return torch.device(DEVICE).type in backend.device_types()
    return name != "cpp" or IS_ON_CPU


AVAILABLE = [name for name in BACKENDS if _serves_the_device(name)]


def pytest_configure(config: pytest.Config) -> None:
    """Allows tests only to be listed without the device. Warnings are errors where this project is to blame.

    Other warnings are errors too, as pyproject.toml says, except a library's own on a device that it alone sees. A call
    that takes the reference unasked is an error, except where no engine was compiled for the tensors of the tests.
    """
    if not has_device(DEVICE) and not config.option.collectonly:
        raise pytest.UsageError(f"TEST_DEVICE={DEVICE}, but torch {torch.__version__} finds no such device")
    if REQUIRE_ALL and IS_ON_CPU and BACKENDS["cpp"].unavailable_reasons():
        raise pytest.UsageError(f"TESTS_REQUIRE_ALL=1, but {BACKENDS['cpp'].unavailable_reasons()[0]}")
    if "error" in config.getini("filterwarnings"):
        is_dense = IS_ON_CPU and "cpp" not in AVAILABLE
        fallback = f"{'ignore' if is_dense else 'error'}::triton_offset_bias.DenseFallbackWarning"
        for line in (*(() if IS_ON_CPU else ("default",)), own_warnings(), fallback):
            config.addinivalue_line("filterwarnings", line)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Skips files that import a library that is not installed."""
    return OptionalModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that only a CPU can run when the tensors are elsewhere."""
    left_out = [item for item in items if not IS_ON_CPU and item.get_closest_marker("cpu_only")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests for which this machine has no engine or too little memory."""
    if item.get_closest_marker("needs_engine") and "cpp" not in AVAILABLE:
        pytest.skip("; ".join(BACKENDS["cpp"].unavailable_reasons()) or "the engine serves CPU tensors")
    if reason := lacking_memory(item, DEVICE):
        pytest.skip(reason)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can serve the tensors of the tests here, by name."""
    return request.param


@pytest.fixture(params=[name for name in AVAILABLE if name != "triton"])
def precise_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that serves float64 and rounds as IEEE 754 says. Triton's interpreter truncates bfloat16 numbers."""
    return request.param


@pytest.fixture(autouse=True)
def _watched_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    with watched_memory(request.node, DEVICE):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills fresh memory with NaN, so that a test sees a result that nobody wrote."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
