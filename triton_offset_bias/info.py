"""`python -m triton_offset_bias.info`: every backend, what it serves, what it is built for, and why it cannot serve."""

import platform

import torch

import triton_offset_bias
from triton_offset_bias.dispatch import BACKENDS


def report() -> str:
    """The text that the command prints."""
    lines = [
        f"triton_offset_bias {triton_offset_bias.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads",
        "",
    ]
    for name, backend in BACKENDS.items():
        reasons = backend.unavailable_reasons()
        lines.append(f"{name}: {'cannot serve' if reasons else 'ready'}")
        lines.append(f"  serves     {backend.SERVES}")
        lines.append(f"  built for  {backend.build_description()}")
        lines.extend(f"  because    {reason}" for reason in reasons)
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
