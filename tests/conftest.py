"""Fixtures that every test may use.

`PTXEMU=FOLDER` makes the PTX emulator in that folder Triton's device, as an NVIDIA GPU of `PTXEMU_ARCH` (80 or 90).
`TEST_DEVICE=cuda` puts every tensor that a test makes on that device; tests of the CPU engine are left out.
"""

import os
import sys

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # The workers fill the cores: with two threads each, threads wait for others that wait for a core.
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)
if "PTXEMU" in os.environ:
    sys.path.insert(0, os.environ["PTXEMU"])
    import triton_offline

    triton_offline.install(arch=int(os.environ.get("PTXEMU_ARCH", "80")))

from triton_offset_bias.dispatch import BACKENDS

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
torch.set_default_device(DEVICE)
AVAILABLE = [
    name for name, module in BACKENDS.items() if not module.unavailable_reasons() and (name != "cpp" or DEVICE == "cpu")
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only a CPU can do when the tensors are elsewhere."""
    left_out = [item for item in items if DEVICE != "cpu" and item.get_closest_marker("cpu_only")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can serve CPU tensors here, by name."""
    return request.param


@pytest.fixture(params=[name for name in AVAILABLE if name != "triton"])
def precise_backend(request: pytest.FixtureRequest) -> str:
    """Those of them that serve float64 and round as IEEE 754 says: Triton's interpreter cuts bfloat16 numbers off."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, so that a result that nobody wrote is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
