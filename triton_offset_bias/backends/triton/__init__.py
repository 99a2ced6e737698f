"""The GPU backend: reasons not to serve, and the two directions. `passes` launches the kernels, which are in `kernels`.

CPU tensors are served where Triton can run on them: in its interpreter (`TRITON_INTERPRET=1`), or by a driver whose
device is the CPU.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from triton_offset_bias.backends.limits import exceeded_limits
from triton_offset_bias.backends.merging import add_part
from triton_offset_bias.problem import Problem

try:
    import triton

    from triton_offset_bias.backends.triton import configs, passes
    from triton_offset_bias.backends.triton.target import device_types, shared_memory, target

    _WHY_NOT = ""
except ImportError as error:  # there is no Triton for this platform
    _WHY_NOT = f"Triton could not be imported: {error}"

PROPERTIES = {
    "serves": "CUDA and ROCm tensors; float16, bfloat16, float32; head dims 1 to 256",
    "options and packed sequences": "all; gates of rank 1",
    "runs on": "NVIDIA and AMD GPUs (compiled for both; no device has run it yet, see Limits)",
    "memory": "O(Lq + Lk)",
    "few queries against a long key cache": "keys split among programs",
    "same bits in repeated runs": "with `deterministic`",
    "`torch.compile(fullgraph=True)`, `torch.export`, autocast, checkpointing": "yes",
    "second derivatives, forward mode, `torch.func`": "no (a clear error)",
}
DEVICES: tuple[str, ...] = ("cuda",)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def build_description() -> str:
    """A text for people: what this backend is built for here."""
    if _WHY_NOT:
        return "not built"
    return f"Triton {triton.__version__}, {target() or 'no device'}"


def unavailable_reasons() -> list[str]:
    """Why this backend cannot serve any call here."""
    if _WHY_NOT:
        return [_WHY_NOT]
    return [] if target() else ["Triton finds no GPU and its interpreter is off (TRITON_INTERPRET=1 turns it on)"]


def _problem_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot serve `problem` on any machine."""
    dtype = problem.query.dtype
    wrong = [] if dtype in _DTYPES else [f"serves float16, bfloat16 and float32, got {dtype}"]
    if problem.bias_gate is not None and problem.bias_gate.shape[3] > 1:
        wrong.append(f"serves gates of rank 1, got rank {problem.bias_gate.shape[3]}")
    if problem.is_causal_by_index and not torch.compiler.is_compiling():
        missed = problem.key.shape[2] - problem.query.shape[2] - problem.query_start
        if missed:
            wrong.append(f"serves causality by index with the last query on the last key, got it {missed} keys before")
    return wrong + exceeded_limits(problem)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot serve `problem` here."""
    types = () if _WHY_NOT else device_types()
    reasons = [] if types else unavailable_reasons()
    query = problem.query
    if types and query.device.type not in types:
        reasons.append(f"serves {' and '.join(types)} tensors here, got {query.device.type}")
    elif types and query.dtype == torch.float32 and max(query.shape[3], problem.value.shape[3]) > 128:
        needed, there = configs.least_shared_memory(torch.float32, 256), shared_memory()
        if needed > there:
            reasons.append(
                f"head dims above 128 in float32 need {needed} bytes of shared memory, this device has {there}"
            )
    return reasons + _problem_reasons(problem)


def forward(problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Writes the output, the log-sum-exp in nats, the rows' maximum in bits, and the rows' sum.

    `backward` takes the last two again. Their scores have the table less `Strip.constants` as their bias.
    """
    with _device_of(out):
        passes.forward(_without_rank(problem), out, lse, row_max, row_sum)


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
    dgate: Tensor | None,
    needs_dbias: bool,
) -> Tensor | None:
    """Writes the gradients that are not None, and returns the table's gradient if it is needed."""
    gradients = dquery, dkey, dvalue, dgate
    with _device_of(out):
        dbias = passes.backward(
            _without_rank(problem), out, row_max, row_sum, dout, dlse, *gradients, needs_dbias=needs_dbias
        )
    return dbias if dbias is None or problem.bias_gate is None else dbias.unsqueeze(-2)


def _without_rank(problem: Problem) -> Problem:
    """The problem with the table of a gate of rank 1 as it is without a gate: (N,), (H, N) or (B, H, N)."""
    bias = problem.bias
    return problem if problem.bias_gate is None or bias is None else problem._replace(bias=bias.squeeze(-2))


def forward_part(problem: Problem, acc: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Adds the keys of `problem` to the softmax of rows that may have attended to other keys.

    The kernel computes the part by itself.
    """
    out = torch.empty_like(acc, memory_format=torch.contiguous_format)
    lse, part_max, part_sum = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in [row_max] * 3)
    with _device_of(acc):
        passes.forward(_without_rank(problem), out, lse, part_max, part_sum, is_part=True)
    add_part(acc, row_max, row_sum, out, part_max, part_sum)


def backward_part(
    problem: Problem,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dbias: Tensor | None,
    dgate: Tensor | None,
) -> None:
    """Adds a part's gradients to the last five tensors."""
    sums = dquery, dkey, dvalue, dgate
    found = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in sums]
    rows = row_max.contiguous(), row_sum.contiguous()
    with _device_of(out):
        part = passes.backward(
            _without_rank(problem), out, *rows, dout, dlse, *found, needs_dbias=dbias is not None, is_part=True
        )
    for total, gradient in zip(sums, found, strict=True):
        if total is not None and gradient is not None:
            total.add_(gradient)
    if dbias is not None and part is not None:
        dbias.add_(part if problem.bias_gate is None else part.unsqueeze(-2))


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one: Triton launches there."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
