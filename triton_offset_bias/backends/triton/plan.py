"""`Plan`: what all launches of a call share, and what follows from shapes, strides, dtypes and options alone."""

import math
import threading
from collections.abc import Callable, Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.kernels.arguments import (
    Dropout,
    Factors,
    Form,
    Layout,
    Loops,
    Place,
    Strides,
    StripStrides,
    constants,
)
from triton_offset_bias.backends.triton.launch import Launch, TunedLaunch, compiler_settings, is_tuned
from triton_offset_bias.backends.triton.strip import Strip
from triton_offset_bias.backends.triton.target import allows_tf32, current_target, precision
from triton_offset_bias.problem import NUM_TENSORS, Problem

MOST_PLANS = 1024
_plans: dict[Hashable, "Plan"] = {}
_lock = threading.Lock()


class Plan:
    """Everything that launches for a problem need but its tensors, so that it serves each call of the same layout.

    Attributes:
        query_factor: the sign of the scale, a factor on the queries, since kernels need a positive scale; or 0.
        block_d: the larger of the padded head dims.
        integers: the members of `Sizes` but the group, and of `Bounds`, which kernels take one by one.
        factors: see `Factors`.
        dropout: see `Dropout`.
    """

    def __init__(self, problem: Problem, *, is_part: bool = False) -> None:
        query, key = problem.query, problem.key
        self.target = current_target()
        self.query_factor = 1.0 if problem.scale > 0 else -1.0 if problem.scale < 0 else 0.0
        scale = abs(problem.scale) or 1.0
        scale_log2 = scale * math.log2(math.e)
        self.is_packed = problem.cu_seqlens_q is not None
        self.has_positions = problem.query_positions is not None
        self.batch, self.num_heads = problem.num_sequences, query.shape[1]
        self.key_heads = key.shape[1]
        self.len_q, self.len_k = problem.max_seqlen_q, problem.max_seqlen_k
        self.group = self.num_heads // self.key_heads
        self.dtype = query.dtype
        self.block_d = max(padded(query), padded(problem.value))
        is_bias_in_acc = configs.is_bias_in_acc(self.target, query.dtype, scale_log2)
        self.strip = Strip(problem, 1 / scale if is_bias_in_acc else math.log2(math.e), is_part=is_part)
        self.form = self._form(problem, is_bias_in_acc)
        self.loops = Loops(*constants(self._loops(problem)))
        self.factors, self.dropout = Factors(scale, scale_log2), _dropout_of(problem)
        sizes = (self.num_heads, self.len_q, self.len_k, query.shape[2], key.shape[2])
        self.integers = (*sizes, *self.strip.bounds)
        # The product of queries and a factor is contiguous, whatever the queries are.
        scaled = query if self.query_factor == 1.0 else torch.empty(query.shape, device="meta")
        q, k, v = map(self.strides, (scaled, key, problem.value))
        self._layout = Layout(q, k, v, StripStrides(*self.strip.strides))
        self._launches: dict[Hashable, Launch | TunedLaunch] = {}

    def launch(self, key: Hashable, make: Callable[[], Launch | TunedLaunch]) -> Launch | TunedLaunch:
        """The launch that `key` names, made at its first use."""
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches.setdefault(key, make())
        return launch

    def layout(self, **others: Tensor | None) -> Layout:
        """The layout of a kernel's tensors: the inputs, and others by their names in `Layout`."""
        return self._layout._replace(**{name: None if x is None else self.strides(x) for name, x in others.items()})

    def strides(self, x: Tensor) -> Strides:
        """Strides of a (B, H, L, D) tensor for a launch; all packed sequences lie in one batch element.

        The stride of rows is compiled into the kernel where it depends on heads and head dim, but not on lengths or
        batch. This saves the registers that hold pointers.
        """
        b, h, row, d = x.stride()
        row = tl.constexpr(row) if row <= 4 * x.shape[1] * x.shape[3] else row
        return Strides(0 if self.is_packed else b, h, row, d)

    def _form(self, problem: Problem, is_bias_in_acc: bool) -> Form:
        query, value = problem.query, problem.value
        form = Form(
            HEAD_DIM=query.shape[3],
            HEAD_DIM_V=value.shape[3],
            BLOCK_D=padded(query),
            BLOCK_DV=padded(value),
            GROUP=self.group,
            HAS_BIAS=problem.bias is not None,
            HAS_GATE=problem.bias_gate is not None,
            IS_CUT=self.strip.is_cut,
            BIAS_IN_ACC=is_bias_in_acc,
            HAS_MASK=problem.key_padding_mask is not None,
            HAS_POSITIONS=self.has_positions,
            OWN_QUERY_POSITIONS=_are_own(problem.query_positions),
            OWN_KEY_POSITIONS=_are_own(problem.key_positions),
            IS_CAUSAL_BY_INDEX=problem.is_causal_by_index,
            IS_PACKED=self.is_packed,
            HAS_LENGTHS=problem.key_lengths is not None,
            HAS_STARTS=problem.query_starts is not None,
            DROPOUT_ROUNDS=0 if problem.seed is None else dropout.ROUNDS,
            HAS_PLACE=problem.seed is not None and problem.dropout_place is not None,
            SPLIT_LSE=query.dtype == torch.float32,
            USE_ASM=self.target.backend == "cuda",
            PRECISION=precision(self.target, query.dtype),
            FOLD=configs.folds_rows(self.target, self.block_d),
            KEEP_SUMS=configs.keeps_sums(self.block_d),
            STACKED=self.target.is_asynchronous,
            COPY=configs.needs_copy(self.target, query.dtype),
            WAIT=configs.needs_wait(self.target, query.dtype),
        )
        return Form(*constants(form))

    def _loops(self, problem: Problem) -> Loops:
        loops = self.strip.loops
        if problem.bias is not None and not self.has_positions and configs.needs_far_loop(self.target):
            return loops._replace(FAR_LEFT=True, FAR_RIGHT=True)
        return loops


def plan_of(problem: Problem, *, is_part: bool = False) -> Plan:
    """The plan of a problem, remembered from an earlier call of the same layout. It holds no tensors.

    A part has results in float32, and a table that counts from 0.
    """
    key = (
        is_part,
        triton.runtime.driver._active,
        problem.query.device,
        *[None if x is None else (x.shape, x.stride(), x.dtype) for x in problem.tensors],
        *problem[NUM_TENSORS:],
        problem.query.dtype == torch.float32 and allows_tf32(),
        configs.gathering(),
        is_tuned(),
        compiler_settings(),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(problem, is_part=is_part)
        with _lock:
            if len(_plans) >= MOST_PLANS:
                del _plans[next(iter(_plans))]  # the oldest
            _plans[key] = plan
    return plan


def padded(x: Tensor) -> int:
    """The head dim of the kernels' tiles: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(x.shape[3]))


def _are_own(positions: Tensor | None) -> bool:
    """Whether every sequence has positions of its own."""
    return positions is not None and positions.dim() > 1


def _dropout_of(problem: Problem) -> Dropout:
    if problem.seed is None:
        return Dropout(0, 1.0)
    word = dropout.largest_dropped(problem.dropout_p)
    signed = word - 2**32 if word >= 2**31 else word
    place = None if problem.dropout_place is None else Place(*problem.dropout_place)
    return Dropout(signed, dropout.kept_scale(problem.dropout_p), place)
