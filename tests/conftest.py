"""Fixtures that every test may use."""

import pytest
import torch

from triton_offset_bias.dispatch import BACKENDS

AVAILABLE = [name for name, module in BACKENDS.items() if not module.unavailable_reasons()]


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can serve CPU tensors here, by name."""
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
