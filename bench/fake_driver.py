"""A driver for Triton that compiles and launches nothing: what the host does for a launch can be counted and timed.

The real front end of Triton runs: it binds arguments and looks for the compiled kernel. Results are not written.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction


class Record:
    """What Triton was asked for.

    Attributes:
        launches: the kernels that were launched, by name, in order.
        compiled: the kernels that would have been compiled, by name, in order.
    """

    def __init__(self) -> None:
        """Begins with nothing."""
        self.launches: list[str] = []
        self.compiled: list[str] = []


class _FakeDriver(DriverBase):
    """An NVIDIA GPU with Hopper's memory, whose tensors are on the CPU."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("a driver that launches nothing measures nothing")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _FakeKernel:
    """A compiled kernel whose launches are recorded."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, record: Record) -> None:
        self._name, self._record = name, record

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self._record.launches.append(self._name)


@contextmanager
def installed(arch: int = 90) -> Iterator[Record]:
    """Makes Triton believe in a GPU of ten times the compute capability `arch`, for which nothing is compiled yet."""
    record = Record()

    def compile_nothing(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> _FakeKernel:
        name = self.__name__.removesuffix("_kernel")
        record.compiled.append(name)
        kernel = self.device_caches[device][0][key] = _FakeKernel(name, record)
        return kernel

    with (
        mock.patch.object(triton.runtime.driver, "_active", _FakeDriver(arch)),
        mock.patch.object(JITFunction, "_do_compile", compile_nothing),
        _emptied_caches(),
    ):
        yield record


@contextmanager
def _emptied_caches() -> Iterator[None]:
    """Takes all compiled kernels of this project from Triton, and gives them back."""
    modules = [module for name, module in sys.modules.items() if name.startswith("triton_offset_bias.backends.triton")]
    kernels = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    kept = {kernel: dict(kernel.device_caches) for kernel in kernels}
    for kernel in kernels:
        kernel.device_caches.clear()
    try:
        yield
    finally:
        for kernel, caches in kept.items():
            kernel.device_caches.clear()
            kernel.device_caches.update(caches)
