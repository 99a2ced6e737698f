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


def precision() -> str:
    """How float32 is multiplied; other dtypes have one way."""
    if interprets():
        return "upcast"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
