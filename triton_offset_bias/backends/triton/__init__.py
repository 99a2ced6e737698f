"""The GPU backend. This version has no GPU kernels yet: it says so, and "auto" serves CUDA tensors by the reference."""

from triton_offset_bias.problem import Problem

SERVES = "nothing in this version"


def build_description() -> str:
    """What this backend is built for here, for people."""
    return "not built"


def unavailable_reasons() -> list[str]:
    """Why this backend cannot serve any call here."""
    return ["the GPU kernels are not part of this version"]


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot serve `problem`."""
    return unavailable_reasons()
