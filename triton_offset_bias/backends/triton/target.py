"""What Triton compiles for here, and how to tell."""

import torch
import triton

from triton_offset_bias.backends.triton.forward import forward_kernel


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return not isinstance(forward_kernel, triton.JITFunction)


@torch.compiler.assume_constant_result
def target() -> str:
    """What the kernels are compiled for here: "interpreter", "cuda:90", "hip:gfx942"; empty if there is nothing."""
    if interprets():
        return "interpreter"
    try:
        found = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no driver is active
        return ""
    return f"{found.backend}:{found.arch}"


@torch.compiler.assume_constant_result
def device_types() -> tuple[str, ...]:
    """The types of the devices whose tensors Triton can work on here."""
    if interprets():
        return ("cpu", "cuda")
    return (triton.runtime.driver.active.get_active_torch_device().type,)


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at the least."""
    if device.type != "cuda":
        return 108  # an A100's, where the device is none
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """How tiles of `dtype` are multiplied: "upcast" | "tf32" | "ieee", which is the one way of 16-bit numbers."""
    if interprets():
        return "upcast"
    return "tf32" if dtype == torch.float32 and has_tf32(target()) and allows_tf32() else "ieee"


def has_tf32(name: str) -> bool:
    """Whether Triton multiplies in TF32 on that target: NVIDIA's since Ampere, and one of AMD's."""
    backend, _, arch = name.partition(":")
    return int(arch) >= 80 if backend == "cuda" else arch == "gfx942"


def allows_tf32() -> bool:
    """Whether torch's settings let float32 matrices be multiplied in TF32.

    Since torch 2.9 `fp32_precision` knows what was set by it, by its parent `torch.backends.fp32_precision` and by the
    older `allow_tf32`; the older one raises once one of the others was used.
    """
    matmul = torch.backends.cuda.matmul
    setting: str | None = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if setting is None else setting == "tf32"
