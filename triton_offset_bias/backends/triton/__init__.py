"""The GPU backend: reasons not to serve, allocation and launches. The kernels are in `forward` and `backward`.

CPU tensors are served where Triton can run on them: in its interpreter (`TRITON_INTERPRET=1`), or by a driver whose
device is the CPU.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from triton_offset_bias.problem import Problem

try:
    import triton
    import triton.language as tl

    from triton_offset_bias.backends.triton import configs, strip
    from triton_offset_bias.backends.triton.backward import (
        dbias_kernel,
        dkey_dvalue_kernel,
        dquery_kernel,
        prepare_kernel,
    )
    from triton_offset_bias.backends.triton.forward import forward_kernel

    _WHY_NOT = ""
except ImportError as error:  # there is no Triton for this platform
    _WHY_NOT = f"Triton could not be imported: {error}"

SERVES = "CUDA and ROCm tensors; float16, bfloat16, float32; head dims 1 to 256"
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PREPARE_ROWS = 64


def build_description() -> str:
    """What this backend is built for here, for people."""
    if _WHY_NOT:
        return "not built"
    return f"Triton {triton.__version__}, {_target() or 'no device'}"


def unavailable_reasons() -> list[str]:
    """Why this backend cannot serve any call here."""
    if _WHY_NOT:
        return [_WHY_NOT]
    return [] if _target() else ["Triton finds no GPU and its interpreter is off (TRITON_INTERPRET=1 turns it on)"]


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot serve `problem`."""
    reasons = unavailable_reasons()
    query, value = problem.query, problem.value
    if not reasons and query.device.type not in _device_types():
        reasons.append(f"serves {' and '.join(_device_types())} tensors here, got {query.device.type}")
    if query.dtype not in _DTYPES:
        reasons.append(f"serves float16, bfloat16 and float32, got {query.dtype}")
    if query.shape[3] > MAX_HEAD_DIM or value.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"serves head dims up to {MAX_HEAD_DIM}")
    if query.shape[2] >= MAX_LENGTH or problem.key.shape[2] >= MAX_LENGTH:
        reasons.append(f"serves lengths below {MAX_LENGTH}")
    if problem.dropout_p > 0.0:
        reasons.append("does not serve dropout yet")
    if problem.query_positions is not None:
        reasons.append("does not serve query_positions and key_positions yet")
    return reasons


def forward(problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Writes the output, the log-sum-exp in nats, and the rows' maximum in bits and sum."""
    call = _Call(problem)
    config = configs.forward_config(_target(), problem.query.dtype, call.block_d)
    with _device_of(out):
        forward_kernel[_grid(problem.query, config.block_m)](
            *call.inputs, call.strip_arg, call.mask_arg,
            out, row_max, row_sum, lse,
            *call.input_strides, *_strides(out), *call.strip_strides,
            *call.sizes, *call.bounds, call.scale_log2,
            EVEN_N=call.len_k % config.block_n == 0, **call.constants, **call.parts,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, **config.options,
        )  # fmt: skip


def backward(
    problem: Problem,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    needs_dbias: bool,
) -> Tensor | None:
    """Writes the gradients that are not None, and returns that of the table if it is needed."""
    call = _Call(problem)
    has_atomics = needs_dbias and not problem.deterministic
    with _device_of(out):
        rows = _prepare(call, out, row_max, row_sum, dout, dlse)
        dstrip = None if call.strip is None or not has_atomics else torch.zeros_like(call.strip)
        if dquery is not None or dstrip is not None:
            _sweep_keys(call, dout, rows, dquery, dstrip)
        if dkey is not None or dvalue is not None:
            _sweep_queries(call, dout, rows, dkey, dvalue)
        if call.strip is not None and needs_dbias and problem.deterministic:
            dstrip = _sum_diagonals_of_tiles(call, dout, rows)
    return None if dstrip is None else strip.fold_strip(problem, dstrip)


def _prepare(
    call: "_Call", out: Tensor, row_max: Tensor, row_sum: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each (B, H, M) float32: the log-sum-exp in bits, of which the log of the sum may be held apart, and delta."""
    lse_bits, log_sum, delta = (torch.empty_like(row_max) for _ in range(3))
    dlse = None if dlse is None else dlse.float().contiguous()
    prepare_kernel[_grid(out, _PREPARE_ROWS)](
        out, dout, _or_dummy(dlse, out), row_max, row_sum,
        lse_bits, log_sum, delta,
        *_strides(out), *_strides(dout),
        call.num_heads, call.len_q,
        HEAD_DIM_V=out.shape[3], BLOCK_DV=_padded(out), HAS_DLSE=dlse is not None,
        SPLIT_LSE=call.split_lse, BLOCK_M=_PREPARE_ROWS, enable_fp_fusion=True,
    )  # fmt: skip
    return lse_bits, log_sum, delta


def _sweep_keys(
    call: "_Call", dout: Tensor, rows: tuple[Tensor, Tensor, Tensor], dquery: Tensor | None, dstrip: Tensor | None
) -> None:
    """dQ, and the diagonals of dS added to `dstrip`; each where it is not None."""
    config = configs.backward_config(_target(), dout.dtype, call.block_d)
    written = _or_dummy(dquery, dout)
    dquery_kernel[_grid(call.query, config.block_m)](
        *call.inputs, dout, call.strip_arg, call.mask_arg, *rows,
        written, _or_dummy(dstrip, dout),
        *call.input_strides, *_strides(dout), *_strides(written), *call.strip_strides,
        *call.sizes, *call.bounds, call.scale, call.scale_log2,
        EVEN_N=call.len_k % config.block_m == 0, HAS_DQ=dquery is not None,
        DBIAS="none" if dstrip is None else configs.DBIAS,
        SPLIT_LSE=call.split_lse, **call.constants, **call.parts, BLOCK=config.block_m, **config.options,
    )  # fmt: skip
    if dquery is not None and call.query is not call.problem.query:
        dquery.mul_(call.query_factor)


def _sweep_queries(
    call: "_Call", dout: Tensor, rows: tuple[Tensor, Tensor, Tensor], dkey: Tensor | None, dvalue: Tensor | None
) -> None:
    """dK and dV, each where it is not None."""
    config = configs.backward_config(_target(), dout.dtype, call.block_d)
    written = _or_dummy(dkey, dout), _or_dummy(dvalue, dout)
    dkey_dvalue_kernel[_grid(call.problem.key, config.block_m)](
        *call.inputs, dout, call.strip_arg, call.mask_arg, *rows,
        *written,
        *call.input_strides, *_strides(dout), *_strides(written[0]), *_strides(written[1]), *call.strip_strides,
        *call.sizes, *call.bounds, call.scale, call.scale_log2,
        EVEN_M=call.len_q % config.block_m == 0, HAS_DK=dkey is not None, HAS_DV=dvalue is not None,
        SPLIT_LSE=call.split_lse, **call.constants, **call.parts, BLOCK=config.block_m, **config.options,
    )  # fmt: skip


def _sum_diagonals_of_tiles(call: "_Call", dout: Tensor, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The gradient of the strip in one order of sums."""
    assert call.strip is not None
    config = configs.backward_config(_target(), dout.dtype, call.block_d)
    bias_batch, bias_heads = call.strip.shape[:2]
    block, tiles_n = config.block_m, -(-call.len_k // config.block_m)
    diagonals = -(-call.len_q // block) + tiles_n - 1
    parts = call.strip.new_empty(bias_batch, bias_heads, diagonals, 2, block)
    dbias_kernel[(bias_batch * bias_heads * diagonals,)](
        *call.inputs, dout, call.strip_arg, call.mask_arg, *rows,
        parts,
        *call.input_strides, *_strides(dout), *call.strip_strides,
        dout.shape[0], *call.sizes, bias_batch, bias_heads, call.bounds.band_lo, call.bounds.band_hi, call.scale_log2,
        SPLIT_LSE=call.split_lse, **call.constants, BLOCK=config.block_m, **config.options,
    )  # fmt: skip
    dstrip = parts.new_zeros(bias_batch, bias_heads, diagonals + 1, block)
    dstrip[:, :, :-1] += parts[:, :, :, 0]
    dstrip[:, :, 1:] += parts[:, :, :, 1]
    first = tiles_n * block - (call.len_k - 1)  # column 0 is offset -tiles_n * block
    return torch.nn.functional.pad(
        dstrip.flatten(2)[..., first : first + call.len_q + call.len_k - 1], (strip.PAD, strip.PAD)
    )


class _Call:
    """What the launches of one problem share, in the order in which kernels take it."""

    def __init__(self, problem: Problem) -> None:
        query, key, value = problem.query, problem.key, problem.value
        # The kernels want a positive scale: its sign, or the 0 that it is, goes into the queries.
        self.query_factor = 1.0 if problem.scale > 0 else -1.0 if problem.scale < 0 else 0.0
        self.query = query if problem.scale > 0 else query * self.query_factor
        self.scale = abs(problem.scale) or 1.0
        self.scale_log2 = self.scale * math.log2(math.e)
        self.problem = problem
        self.num_heads, self.len_q, self.len_k = query.shape[1], query.shape[2], key.shape[2]
        self.sizes = (self.num_heads, self.num_heads // key.shape[1], self.len_q, self.len_k)
        self.bounds = strip.bounds_of(problem)
        self.parts = {"HAS_BIAS": problem.bias is not None, **self.bounds.parts(self.len_q, self.len_k)}
        self.inputs = (self.query, key, value)
        self.input_strides = (*_strides(self.query), *_strides(key), *_strides(value))
        self.strip = strip.build_strip(problem)
        self.strip_arg = _or_dummy(self.strip, query)
        self.strip_strides = (0, 0) if self.strip is None else self.strip.expand(*query.shape[:2], -1).stride()[:2]
        mask = problem.key_padding_mask
        self.mask_arg = query if mask is None else mask.contiguous().view(torch.uint8)
        self.block_d = max(_padded(query), _padded(value))
        self.split_lse = query.dtype == torch.float32
        self.constants: dict[str, Any] = {
            "HEAD_DIM": query.shape[3],
            "HEAD_DIM_V": value.shape[3],
            "BLOCK_D": _padded(query),
            "BLOCK_DV": _padded(value),
            "HAS_MASK": mask is not None,
            "USE_ASM": _target().startswith("cuda"),
            "PRECISION": _precision(),
        }


def _precision() -> str:
    """How float32 is multiplied; other dtypes have one way."""
    if _interprets():
        return "upcast"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _or_dummy(tensor: Tensor | None, dummy: Tensor) -> Tensor:
    """A kernel is given some tensor for each pointer, those that it never touches too."""
    return dummy if tensor is None else tensor


def _strides(x: Tensor) -> tuple[Any, ...]:
    """Strides of a (B, H, L, D) tensor for a launch.

    The rows' is compiled into the kernel, where it comes from heads and head dim and not from lengths or batch: it
    saves the registers that hold pointers.
    """
    b, h, row, d = x.stride()
    return b, h, tl.constexpr(row) if row <= 4 * x.shape[1] * x.shape[3] else row, d


def _padded(x: Tensor) -> int:
    """The head dim as the kernels' tiles have it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(x.shape[3]))


def _grid(x: Tensor, block: int) -> tuple[int]:
    """One program for each block of rows of each head of a (B, H, L, D) tensor."""
    return (x.shape[0] * x.shape[1] * -(-x.shape[2] // block),)


def _interprets() -> bool:
    return not isinstance(forward_kernel, triton.JITFunction)


@torch.compiler.assume_constant_result
def _target() -> str:
    """What the kernels are compiled for here: "interpreter", "cuda:90", "hip:gfx942"; empty if there is nothing."""
    if _interprets():
        return "interpreter"
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no driver is active
        return ""
    return f"{target.backend}:{target.arch}"


@torch.compiler.assume_constant_result
def _device_types() -> tuple[str, ...]:
    """The types of the devices whose tensors Triton can work on here."""
    if _interprets():
        return ("cpu", "cuda")
    return (triton.runtime.driver.active.get_active_torch_device().type,)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one: Triton launches there."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
