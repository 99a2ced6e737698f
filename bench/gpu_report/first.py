"""Part 0: the versions, and a few calls against float64. Nothing is worth measuring where they are wrong."""

import platform
import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from bench.gpu_report.part import DEVICE, IS_DRY
from triton_offset_bias import __version__, offset_bias_attention

# Largest error of an output or gradient in bfloat16, as a fraction of the largest number.
TOLERANCE = 0.03
NAMES = ("out", "dq", "dk", "dv", "dtable")
# Length, head dim, causal, columns of the table.
CALLS = [
    (256, 64, False, 511),
    (333, 80, True, 101),
    (300, 128, False, 65),
]
DRY_CALLS = [(70, 16, True, 33)]


def main() -> None:
    """Prints the versions and each call's errors. Fails if a call is wrong."""
    print(f"device: {platform.processor() or 'cpu' if IS_DRY else torch.cuda.get_device_name(DEVICE)}")
    if not IS_DRY:
        properties = torch.cuda.get_device_properties(DEVICE)
        print(f"capability {properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors")
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"triton_offset_bias {__version__}")
    wrong = [call for call in (DRY_CALLS if IS_DRY else CALLS) if not _is_right(*call)]
    if wrong:
        raise SystemExit(f"{len(wrong)} calls are wrong")


def _is_right(length: int, head_dim: int, is_causal: bool, columns: int) -> bool:
    start = time.monotonic()
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, length, head_dim).bfloat16().to(DEVICE) for _ in range(3)]
    inputs.append(torch.randn(2, columns).to(DEVICE))
    dout = torch.randn(2, 2, length, head_dim).bfloat16().to(DEVICE)
    got = _results(lambda *x: offset_bias_attention(*x, is_causal=is_causal, backend="triton"), inputs, dout)
    doubles = [x.double().cpu() for x in inputs]
    wanted = _results(
        lambda *x: offset_bias_attention(*x, is_causal=is_causal, backend="reference"), doubles, dout.double().cpu()
    )
    errors = [float((x.double().cpu() - y).abs().max() / y.abs().max()) for x, y in zip(got, wanted, strict=True)]
    is_right = all(error <= TOLERANCE for error in errors)  # NaN is not
    print(
        f"L={length} D={head_dim} causal={is_causal} N={columns}: {'right' if is_right else 'WRONG'},",
        *(f"{name} {error:.1e}" for name, error in zip(NAMES, errors, strict=True)),
        f"({time.monotonic() - start:.1f} s)",
    )
    return is_right


def _results(run: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


if __name__ == "__main__":
    main()
