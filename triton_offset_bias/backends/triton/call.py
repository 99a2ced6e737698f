"""What the launches of one problem share, in the order in which kernels take it."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs, strip
from triton_offset_bias.backends.triton.target import current_target, precision
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
        self.target = current_target()
        self.is_packed = problem.cu_seqlens_q is not None
        self.batch, self.num_heads = problem.num_sequences, query.shape[1]
        self.len_q, self.len_k = problem.max_seqlen_q, problem.max_seqlen_k
        self.group = self.num_heads // key.shape[1]
        self.sizes = (self.num_heads, self.group, self.len_q, self.len_k, query.shape[2], key.shape[2])
        self.bounds = strip.bounds_of(problem)
        is_bias_in_acc = configs.is_bias_in_acc(self.target, query.dtype, self.scale_log2)
        unit = 1 / self.scale if is_bias_in_acc else math.log2(math.e)
        self.constants_of_rows = strip.constants_of(problem)
        self.strip = strip.build_strip(problem, self.bounds, unit, self.constants_of_rows)
        mask = problem.key_padding_mask
        optional = (
            self.strip, None if mask is None else mask.contiguous().view(torch.uint8),
            *(None if x is None else x.contiguous() for x in problem[5:9]),  # positions, cu_seqlens
            problem.seed,
        )  # fmt: skip
        self.inputs = (self.query, key, value, *(or_dummy(x, query) for x in optional))
        self.input_strides = (*self.strides(self.query), *self.strides(key), *self.strides(value))
        self.shared_strides = (*self._strip_strides(), *map(_batch_stride, optional[2:4]))
        self.block_d = max(padded(query), padded(value))
        self.split_lse = query.dtype == torch.float32
        self.loops = strip.loops(problem, self.bounds)
        if self.strip is not None and configs.needs_far_loop(self.target) and problem.query_positions is None:
            self.loops = {**self.loops, "FAR_LEFT": True, "FAR_RIGHT": True}
        self.dropout = _dropout_arguments(problem)
        self.constants: dict[str, Any] = {
            "HEAD_DIM": query.shape[3],
            "HEAD_DIM_V": value.shape[3],
            "BLOCK_D": padded(query),
            "BLOCK_DV": padded(value),
            "HAS_BIAS": self.strip is not None,
            "BIAS_IN_ACC": is_bias_in_acc,
            "HAS_MASK": mask is not None,
            "HAS_POSITIONS": problem.query_positions is not None,
            "IS_PACKED": self.is_packed,
            "DROPOUT_ROUNDS": 0 if problem.seed is None else dropout.ROUNDS,
            "USE_ASM": self.target.backend == "cuda",
            "PRECISION": precision(self.target, query.dtype),
            "WAIT": configs.needs_wait(self.target, query.dtype),
        }

    def strides(self, x: Tensor) -> tuple[Any, ...]:
        """Strides of a (B, H, L, D) tensor for a launch; all packed sequences lie in one batch element.

        The rows' is compiled into the kernel, where it comes from heads and head dim and not from lengths or batch: it
        saves the registers that hold pointers.
        """
        b, h, row, d = x.stride()
        row = tl.constexpr(row) if row <= 4 * x.shape[1] * x.shape[3] else row
        return 0 if self.is_packed else b, h, row, d

    def _strip_strides(self) -> tuple[int, ...]:
        if self.strip is None:
            return 0, 0
        return self.strip.expand(self.batch, self.num_heads, -1).stride()[:2]


def or_dummy(tensor: Tensor | None, dummy: Tensor) -> Tensor:
    """A kernel is given some tensor for each pointer, those that it never touches too."""
    return dummy if tensor is None else tensor


def padded(x: Tensor) -> int:
    """The head dim as the kernels' tiles have it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(x.shape[3]))


def _batch_stride(positions: Tensor | None) -> int:
    return 0 if positions is None or positions.dim() == 1 else positions.stride(0)


def _dropout_arguments(problem: Problem) -> tuple[int, float]:
    """The largest dropped word, as int32 of the same bits, and what kept weights are multiplied with."""
    if problem.seed is None:
        return 0, 1.0
    word = dropout.largest_dropped(problem.dropout_p)
    return word - 2**32 if word >= 2**31 else word, dropout.kept_scale(problem.dropout_p)
