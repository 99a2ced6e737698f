"""Every backend has the names that the contract asks for. `mypy` compares the types as well."""

import inspect

import pytest

from triton_offset_bias.backends.contract import (
    BACKENDS,
    FUSED_BACKENDS,
    TORCH_BACKENDS,
    Backend,
    FusedBackend,
    TorchBackend,
)

PROTOCOLS = dict.fromkeys(FUSED_BACKENDS, FusedBackend) | dict.fromkeys(TORCH_BACKENDS, TorchBackend)


def test_auto_asks_the_engine_then_the_kernels_then_the_reference():
    """There is one registry, and its two halves hold every backend."""
    assert list(BACKENDS) == ["cpp", "triton", "reference"] == list(PROTOCOLS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_backends_functions_have_the_signatures_of_its_protocol(name):
    """Names, order and types of parameters are equal, because `ops` passes arguments by position."""
    functions = {**vars(Backend), **vars(PROTOCOLS[name])}
    wanted = {name: x for name, x in functions.items() if inspect.isfunction(x) and not name.startswith("_")}
    assert "unsupported_reasons" in wanted
    for function, promised in wanted.items():
        _, *parameters = inspect.signature(promised).parameters.values()
        got = inspect.signature(getattr(BACKENDS[name], function), eval_str=True)
        assert list(got.parameters.values()) == parameters, function
        assert got.return_annotation == inspect.signature(promised).return_annotation, function
