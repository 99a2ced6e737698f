"""`Call`: the arguments that all launches for one problem share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.kernels.arguments import (
    Form,
    Inputs,
    Loops,
    SharedStrides,
    Sizes,
    Strides,
    constants,
)
from triton_offset_bias.backends.triton.strip import Strip
from triton_offset_bias.backends.triton.target import current_target, precision
from triton_offset_bias.problem import Problem


class Call:
    """The arguments of every kernel that works on `problem`. The constructor launches nothing; `start` does.

    Attributes:
        query_factor: factor on the queries. The kernels want a positive scale, so its sign, or a scale of 0, goes here.
        inputs: the kernels' `Inputs`, once started.
        block_d: the larger of the padded head dims.
    """

    inputs: Inputs

    def __init__(self, problem: Problem) -> None:
        query, key = problem.query, problem.key
        self.problem = problem
        self.target = current_target()
        self.query_factor = 1.0 if problem.scale > 0 else -1.0 if problem.scale < 0 else 0.0
        self.scale = abs(problem.scale) or 1.0
        self.scale_log2 = self.scale * math.log2(math.e)
        self.is_packed = problem.cu_seqlens_q is not None
        self.batch, self.num_heads = problem.num_sequences, query.shape[1]
        self.len_q, self.len_k = problem.max_seqlen_q, problem.max_seqlen_k
        self.group = self.num_heads // key.shape[1]
        self.sizes = Sizes(self.num_heads, self.group, self.len_q, self.len_k, query.shape[2], key.shape[2])
        self.block_d = max(padded(query), padded(problem.value))
        is_bias_in_acc = configs.is_bias_in_acc(self.target, query.dtype, self.scale_log2)
        self.strip = Strip(problem, 1 / self.scale if is_bias_in_acc else math.log2(math.e))
        self.form = self._form(is_bias_in_acc)
        self.loops = Loops(*constants(self._loops()))
        self.largest_dropped, self.kept_scale = _dropout_numbers(problem)

    def start(self) -> None:
        """Fills the strip and collects the inputs."""
        problem = self.problem
        self.strip.fill()
        mask = problem.key_padding_mask
        self.inputs = Inputs(
            q=problem.query if self.query_factor == 1.0 else problem.query * self.query_factor,
            k=problem.key,
            v=problem.value,
            strip=self.strip.values,
            key_mask=None if mask is None else mask.contiguous().view(torch.uint8),
            query_positions=_contiguous(problem.query_positions),
            key_positions=_contiguous(problem.key_positions),
            cu_seqlens_q=_contiguous(problem.cu_seqlens_q),
            cu_seqlens_k=_contiguous(problem.cu_seqlens_k),
            key_lengths=_contiguous(problem.key_lengths),
            seed=problem.seed,
        )

    @property
    def input_strides(self) -> tuple[Strides, Strides, Strides]:
        """The strides of queries, keys and values."""
        return self.strides(self.inputs.q), self.strides(self.inputs.k), self.strides(self.inputs.v)

    @property
    def shared_strides(self) -> SharedStrides:
        """The strides of the strip and the positions, which heads or sequences may share."""
        strip, query_positions, key_positions = (
            self.strip.values,
            self.inputs.query_positions,
            self.inputs.key_positions,
        )
        strip_b, strip_h = (0, 0) if strip is None else strip.expand(self.batch, self.num_heads, -1).stride()[:2]
        return SharedStrides(strip_b, strip_h, _batch_stride(query_positions), _batch_stride(key_positions))

    def strides(self, x: Tensor) -> Strides:
        """Strides of a (B, H, L, D) tensor for a launch; all packed sequences lie in one batch element.

        The stride of rows is compiled into the kernel where it depends on heads and head dim, but not on lengths or
        batch. This saves the registers that hold pointers.
        """
        b, h, row, d = x.stride()
        row = tl.constexpr(row) if row <= 4 * x.shape[1] * x.shape[3] else row
        return Strides(0 if self.is_packed else b, h, row, d)

    def _form(self, is_bias_in_acc: bool) -> Form:
        problem = self.problem
        query, value = problem.query, problem.value
        form = Form(
            HEAD_DIM=query.shape[3],
            HEAD_DIM_V=value.shape[3],
            BLOCK_D=padded(query),
            BLOCK_DV=padded(value),
            HAS_BIAS=problem.bias is not None,
            BIAS_IN_ACC=is_bias_in_acc,
            HAS_MASK=problem.key_padding_mask is not None,
            HAS_POSITIONS=problem.query_positions is not None,
            IS_PACKED=self.is_packed,
            HAS_LENGTHS=problem.key_lengths is not None,
            DROPOUT_ROUNDS=0 if problem.seed is None else dropout.ROUNDS,
            SPLIT_LSE=query.dtype == torch.float32,
            USE_ASM=self.target.backend == "cuda",
            PRECISION=precision(self.target, query.dtype),
            WAIT=configs.needs_wait(self.target, query.dtype),
        )
        return Form(*constants(form))

    def _loops(self) -> Loops:
        problem, loops = self.problem, self.strip.loops
        if problem.bias is not None and problem.query_positions is None and configs.needs_far_loop(self.target):
            return loops._replace(FAR_LEFT=True, FAR_RIGHT=True)
        return loops


def padded(x: Tensor) -> int:
    """The head dim of the kernels' tiles: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(x.shape[3]))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _batch_stride(positions: Tensor | None) -> int:
    return 0 if positions is None or positions.dim() == 1 else positions.stride(0)


def _dropout_numbers(problem: Problem) -> tuple[int, float]:
    """The largest dropped word, as an int32 of the same bits, and the factor on kept weights."""
    if problem.seed is None:
        return 0, 1.0
    word = dropout.largest_dropped(problem.dropout_p)
    return word - 2**32 if word >= 2**31 else word, dropout.kept_scale(problem.dropout_p)
