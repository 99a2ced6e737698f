"""The forward pass by the kernel that is for Hopper alone: which calls it serves, and its launch.

No device has run it, so `TRITON_OFFSET_BIAS_HOPPER=1` has to ask for it. Calls that it does not serve take
`forward_kernel` then too: on other hardware the variable changes nothing.
"""

import contextvars
import os

import torch
import triton
from torch import Tensor

from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.call import Call
from triton_offset_bias.backends.triton.kernels.arguments import Loops, Outputs, constants
from triton_offset_bias.backends.triton.kernels.hopper.forward import hopper_forward_kernel
from triton_offset_bias.backends.triton.launch import Launch, TunedLaunch, blocked_launch, with_rest
from triton_offset_bias.backends.triton.plan import Plan

HOPPER_VARIABLE = "TRITON_OFFSET_BIAS_HOPPER"
HEAD_DIMS = (64, 128)
_UNSERVED = (
    "bias_gate",
    "key_padding_mask",
    "query_positions",
    "cu_seqlens_q",
    "key_lengths",
    "seed",
)  # a seed is dropout's


def is_chosen(call: Call, out: Tensor) -> bool:
    """Whether the user asks for the kernel, and it serves the call."""
    return os.environ.get(HOPPER_VARIABLE) == "1" and not unserved_reasons(call, out)


def unserved_reasons(call: Call, out: Tensor) -> list[str]:
    """Why the kernel cannot serve a call that writes to `out`. This is the one place that decides."""
    target, problem, inputs = call.plan.target, call.problem, call.inputs
    reasons = []
    if not (target.is_hopper or target.backend == "interpreter"):
        reasons.append(f"serves Hopper, got {target.backend}:{target.arch}")
    if configs.TRITON < (3, 6):
        reasons.append(f"needs Triton 3.6 or newer, got {triton.__version__}")
    if out.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"serves float16 and bfloat16, got {out.dtype}")
    head_dims = inputs.q.shape[3], inputs.v.shape[3]
    if head_dims[0] not in HEAD_DIMS or head_dims[0] != head_dims[1]:
        reasons.append(f"serves head dims {' and '.join(map(str, HEAD_DIMS))}, one for all tensors, got {head_dims}")
    reasons += [f"serves no {name}" for name in _UNSERVED if getattr(problem, name) is not None]
    tensors = {"query": inputs.q, "key": inputs.k, "value": inputs.v, "output": out}
    return reasons + [reason for name, x in tensors.items() for reason in _undescribable(name, x)]


def _undescribable(name: str, x: Tensor) -> list[str]:
    """Why a descriptor of the tensor memory accelerator cannot describe the rows of a head of `x`, if it cannot."""
    *strides, stride_d = x.stride()
    in_bytes = [stride * x.element_size() for stride in strides]
    if stride_d == 1 and in_bytes[-1] > 0 and not any(number % 16 for number in (x.data_ptr(), *in_bytes)):
        return []
    return [
        f"the {name} must begin at a multiple of 16 bytes, its head dim must be contiguous, and its other strides must "
        f"be multiples of 16 bytes, got address {x.data_ptr():#x} and strides {x.stride()}"
    ]


def launch_forward(call: Call, outputs: Outputs) -> None:
    """Launches the kernel.

    Descriptors lie in memory that Triton asks its allocator for, during the launch. The allocator belongs to the user,
    who keeps theirs: ours is set in a copy of the context.
    """
    plan, out = call.plan, outputs.out
    launch = plan.launch((hopper_forward_kernel, out.stride()), lambda: _forward_launch(plan, out))
    contextvars.copy_context().run(_launch_with_memory, launch, call, outputs)


def _launch_with_memory(launch: Launch | TunedLaunch, call: Call, outputs: Outputs) -> None:
    triton.set_allocator(_allocate)
    launch(call.is_aligned, call.inputs, outputs)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory on the current device from torch's allocator, aligned to 512 bytes.

    It is used in the order of the current stream, on which Triton launches, so it may be freed before the kernel ends;
    during the capture of a CUDA graph it belongs to the graph.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _forward_launch(plan: Plan, out: Tensor) -> Launch | TunedLaunch:
    loops = plan.strip.loops  # without the empty ones that other kernels need
    sizes = {"len_q": plan.len_q, "len_k": plan.len_k, "BLOCK_N": configs.HOPPER_KEYS}
    rest = with_rest({"FORM": plan.form, "LOOPS": loops, **sizes}, "len_k").REST
    config = configs.hopper_forward_config(plan.block_d, loops._replace(REST=rest.value))
    numbers = (plan.layout(out=out), *plan.integers, plan.factors, plan.dropout)
    blocks = (plan.batch * plan.num_heads, plan.len_q, "BLOCK_M")
    named = {"FORM": plan.form, "LOOPS": Loops(*constants(loops))}
    return blocked_launch(hopper_forward_kernel, config, blocks, "len_k", numbers, named)
