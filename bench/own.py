"""The providers that call this package: with its options, without a bias, and by other builds and kernels."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

from bench.cases import Inputs
from bench.provider import AbsentError, Run
from triton_offset_bias import offset_bias_attention
from triton_offset_bias.backends import cpp
from triton_offset_bias.backends.cpp import library

VECTORS = "avx512_bf16"


def ours(inputs: Inputs) -> Run:
    """This package."""
    options = _options(inputs)
    return lambda q, k, v, table, gate=None: offset_bias_attention(q, k, v, table, bias_gate=gate, **options)


def ours_ungated(inputs: Inputs) -> Run:
    """This package on `Inputs.ungated`. The difference to `ours` is the cost of factors from the query."""
    return ours(inputs)


def ours_no_bias(inputs: Inputs) -> Run:
    """This package without bias and positions. The difference to `ours` is their cost."""
    return lambda q, k, v, _: offset_bias_attention(q, k, v, None, **_band(inputs))


def ours_vectors(inputs: Inputs) -> Run:
    """This package by the engine's build avx512_bf16 where another one is loaded: vectors instead of AMX tiles."""
    if cpp.BUILD == VECTORS or VECTORS not in cpp.RUNNABLE:
        raise AbsentError(
            f"it needs {VECTORS} and another build that is loaded; loaded: {cpp.BUILD}, runnable: "
            f"{', '.join(cpp.RUNNABLE)}"
        )
    return ours(inputs)


def ours_atomics(inputs: Inputs) -> Run:
    """This package's GPU kernels with an atomic add for every score, as compilers generate them."""
    return _by_triton(inputs)


def ours_hopper(inputs: Inputs) -> Run:
    """This package's GPU kernels, the forward one for Hopper alone."""
    capability = torch.cuda.get_device_capability(inputs.q.device)
    if capability[0] != 9:
        raise AbsentError(f"`ours_hopper` needs a GPU of compute capability 9, got {capability}")
    return _by_triton(inputs)


def _by_triton(inputs: Inputs) -> Run:
    options = {**_options(inputs), "backend": "triton"}
    return lambda q, k, v, table, gate=None: offset_bias_attention(q, k, v, table, bias_gate=gate, **options)


def _options(inputs: Inputs) -> dict[str, Any]:
    return {**_band(inputs), "query_positions": inputs.positions, "key_positions": inputs.positions}


def _band(inputs: Inputs) -> dict[str, Any]:
    return {"is_causal": inputs.is_causal, "window_size": (inputs.window, inputs.window)}


@contextmanager
def vectors() -> Iterator[None]:
    """The context of `ours_vectors`: calls go to that build."""
    other = _loaded(VECTORS)
    loaded, cpp._ENGINE = cpp._ENGINE, other
    try:
        yield
    finally:
        cpp._ENGINE = loaded


def atomics_of_scores() -> AbstractContextManager:
    """The context of `ours_atomics`."""
    from triton_offset_bias.backends.triton.configs import GATHERING_VARIABLE

    return _variable(GATHERING_VARIABLE, "elements")


def hopper_kernels() -> AbstractContextManager:
    """The context of `ours_hopper`."""
    from triton_offset_bias.backends.triton.hopper import HOPPER_VARIABLE

    return _variable(HOPPER_VARIABLE, "1")


@cache
def _loaded(build: str) -> ctypes.CDLL:
    with _variable(cpp.BUILD_VARIABLE, build):
        engine = library.load()
    if engine.library is None:
        raise RuntimeError(f"{build}: {engine.reason}")
    return engine.library


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable, and gives it its old value back."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
