"""What the launches of one problem share, in the order in which kernels take it."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_offset_bias.backends.triton import configs, strip
from triton_offset_bias.backends.triton.target import precision, target
from triton_offset_bias.problem import Problem


class Call:
    """The arguments of every kernel that works on `problem`."""

    def __init__(self, problem: Problem) -> None:
        query, key, value = problem.query, problem.key, problem.value
        # The kernels want a positive scale: its sign, or the 0 that it is, goes into the queries.
        self.query_factor = 1.0 if problem.scale > 0 else -1.0 if problem.scale < 0 else 0.0
        self.query = query if problem.scale > 0 else query * self.query_factor
        self.scale = abs(problem.scale) or 1.0
        self.scale_log2 = self.scale * math.log2(math.e)
        self.problem = problem
        self.target = target()
        self.num_heads, self.len_q, self.len_k = query.shape[1], query.shape[2], key.shape[2]
        self.sizes = (self.num_heads, self.num_heads // key.shape[1], self.len_q, self.len_k)
        self.inputs = (self.query, key, value)
        self.input_strides = (*strides(self.query), *strides(key), *strides(value))
        self.bounds = strip.bounds_of(problem)
        is_bias_in_acc = configs.is_bias_in_acc(self.target, query.dtype, self.scale_log2)
        self.strip = strip.build_strip(problem, 1 / self.scale if is_bias_in_acc else math.log2(math.e))
        self.strip_arg = or_dummy(self.strip, query)
        self.strip_strides = (0, 0) if self.strip is None else self.strip.expand(*query.shape[:2], -1).stride()[:2]
        mask = problem.key_padding_mask
        self.mask_arg = query if mask is None else mask.contiguous().view(torch.uint8)
        self.block_d = max(padded(query), padded(value))
        self.split_lse = query.dtype == torch.float32
        self.loops = self.bounds.parts(self.len_q, self.len_k)
        if self.strip is not None and configs.needs_far_loop(self.target):
            self.loops = {**self.loops, "FAR_LEFT": True, "FAR_RIGHT": True}
        self.constants: dict[str, Any] = {
            "HEAD_DIM": query.shape[3],
            "HEAD_DIM_V": value.shape[3],
            "BLOCK_D": padded(query),
            "BLOCK_DV": padded(value),
            "HAS_BIAS": self.strip is not None,
            "BIAS_IN_ACC": is_bias_in_acc,
            "HAS_MASK": mask is not None,
            "USE_ASM": self.target.startswith("cuda"),
            "PRECISION": precision(),
        }


def or_dummy(tensor: Tensor | None, dummy: Tensor) -> Tensor:
    """A kernel is given some tensor for each pointer, those that it never touches too."""
    return dummy if tensor is None else tensor


def strides(x: Tensor) -> tuple[Any, ...]:
    """Strides of a (B, H, L, D) tensor for a launch.

    The rows' is compiled into the kernel, where it comes from heads and head dim and not from lengths or batch: it
    saves the registers that hold pointers.
    """
    b, h, row, d = x.stride()
    return b, h, tl.constexpr(row) if row <= 4 * x.shape[1] * x.shape[3] else row, d


def padded(x: Tensor) -> int:
    """The head dim as the kernels' tiles have it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(x.shape[3]))
