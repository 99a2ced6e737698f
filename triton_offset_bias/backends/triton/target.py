"""The target that Triton compiles for on this machine, and its abilities."""

import functools
from dataclasses import dataclass

import torch
import triton

KIB = 1024


@triton.jit
def _nothing():
    """A kernel that does nothing. Its type shows whether Triton interprets kernels that are defined now."""


@dataclass(frozen=True)
class Target:
    """A kind of device that kernels are compiled for.

    Attributes:
        backend: "cuda" | "hip" | "interpreter".
        arch: ten times the compute capability, or AMD's name; 0 in the interpreter.
        shared_memory: bytes that a program may have.
    """

    backend: str
    arch: int | str
    shared_memory: int

    @property
    def is_hopper(self) -> bool:
        """Whether Triton takes Hopper's asynchronous products of tiles in shared memory, and has room for them."""
        return self._capability // 10 == 9 and self._has_much_memory

    @property
    def is_blackwell(self) -> bool:
        """Whether products are asynchronous and live in a memory of their own, which registers reach by copies.

        They do on data centres' and Jetson's Blackwell, not on GeForce's; of later devices this is a guess, and what
        follows from it runs everywhere.
        """
        return (self._capability // 10 in (10, 11) or self._capability >= 130) and self._has_much_memory

    @property
    def is_asynchronous(self) -> bool:
        """Whether products are asynchronous.

        With fewer stages or wider tiles, ptxas serialises Hopper's products (C7511, C7515).
        """
        return self.is_hopper or self.is_blackwell

    @property
    def takes_large_tiles(self) -> bool:
        """Whether 16-bit tiles of 64 rows or more are multiplied by units of their own, and have room."""
        return self.backend == "hip" or (self._capability >= 80 and self.shared_memory >= 96 * KIB)

    @property
    def has_tf32(self) -> bool:
        """Whether Triton multiplies in TF32 there; elsewhere it refuses to."""
        return self._capability >= 80 or self.arch == "gfx942"

    @property
    def _capability(self) -> int:
        return self.arch if isinstance(self.arch, int) else 0

    @property
    def _has_much_memory(self) -> bool:
        return self.shared_memory >= 200 * KIB


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return not isinstance(_nothing, triton.JITFunction)


@torch.compiler.assume_constant_result
def target() -> str:
    """The name of the target here: "interpreter", or such as "cuda:90" or "hip:gfx942"; empty if there is none."""
    if interprets():
        return "interpreter"
    try:
        found = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no driver is active
        return ""
    return f"{found.backend}:{found.arch}"


def current_target() -> Target:
    """The `Target` here, which decides about configurations. Call it only where `target()` is not empty."""
    if interprets():
        return Target("interpreter", 0, 2**30)
    driver = triton.runtime.driver.active
    found = driver.get_current_target()
    return _with_memory(found.backend, found.arch, driver.get_current_device())


@torch.compiler.assume_constant_result
def shared_memory() -> int:
    """Bytes of shared memory that a program may have here. Call it only where `target()` is not empty."""
    return current_target().shared_memory


@functools.cache
def _with_memory(backend: str, arch: int | str, device: int) -> Target:
    """A device's target; its driver knows how much shared memory a program may have."""
    return Target(backend, arch, triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@torch.compiler.assume_constant_result
def device_types() -> tuple[str, ...]:
    """The types of the devices whose tensors Triton can work on here; none where there is no target."""
    if interprets():
        return ("cpu", "cuda")
    try:
        return (triton.runtime.driver.active.get_active_torch_device().type,)
    except RuntimeError:  # no driver is active
        return ()


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """The least number of programs that run side by side on a device."""
    if interprets():
        return 4  # more would make no program faster
    if device.type != "cuda":
        return 108  # an A100's number, where there is no device
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(target: Target, dtype: torch.dtype) -> str:
    """The way to multiply tiles of `dtype`: "upcast" | "tf32" | "ieee", which is the only way for 16 bits on GPUs."""
    if target.backend == "interpreter":
        return "upcast"
    return "tf32" if dtype == torch.float32 and target.has_tf32 and allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """Whether torch's settings let float32 matrices be multiplied in TF32.

    Since torch 2.9 `fp32_precision` knows what was set by it, by its parent `torch.backends.fp32_precision` and by the
    older `allow_tf32`; the older one raises once one of the others was used.
    """
    matmul = torch.backends.cuda.matmul
    setting: str | None = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if setting is None else setting == "tf32"
