"""`Call`: the tensors that all launches for one problem share, beside its `Plan`."""

import torch
from torch import Tensor

from triton_offset_bias.backends.triton.kernels.arguments import Inputs
from triton_offset_bias.backends.triton.plan import Plan, plan_of
from triton_offset_bias.problem import Problem


class Call:
    """A problem, its plan, and the memory that its launches share. The constructor launches no kernel of this package.

    Attributes:
        strip: (1 or B, 1 or H, columns) float32, uninitialised, see `Strip`. None without a table.
        strips: (1 or 2, ...), the strip and, if it is cut, its mask. None without a table.
        constants: (1 or B, 1 or H, 1) float32, uninitialised, see `Strip`. None where all rows count from 0.
        is_aligned: whether each tensor of the call begins at a multiple of 16 bytes, as memory of torch's own does.
    """

    def __init__(self, problem: Problem, *others: Tensor | None, plan: Plan | None = None) -> None:
        """Takes the problem's plan, unless one is given. `others` are the other tensors that kernels get."""
        self.problem = problem
        self.plan = plan = plan or plan_of(problem)
        tensors = (*problem.tensors, *others)
        self.is_aligned = not any([x.data_ptr() % 16 for x in tensors if x is not None])
        self.strips = self.strip = self.constants = None
        if problem.bias is not None:
            planes = 2 if plan.strip.is_cut else 1
            self.strips = problem.bias.new_empty(planes, *plan.strip.shape, dtype=torch.float32)
            self.strip = self.strips[0]
            if plan.strip.has_constants:
                self.constants = self.strip.new_empty(*plan.strip.shape[:2], 1)
        mask = problem.key_padding_mask
        self.inputs = Inputs(
            problem.query if plan.query_factor == 1.0 else (problem.query * plan.query_factor).contiguous(),
            problem.key,
            problem.value,
            self.strips,
            None if problem.bias_gate is None else problem.bias_gate.float().contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
            _contiguous(problem.query_positions),
            _contiguous(problem.key_positions),
            _contiguous(problem.cu_seqlens_q),
            _contiguous(problem.cu_seqlens_k),
            _contiguous(problem.key_lengths),
            _contiguous(problem.query_starts),
            problem.seed,
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
