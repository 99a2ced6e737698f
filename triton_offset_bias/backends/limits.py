"""The sizes that all fused backends serve."""

import torch

from triton_offset_bias.problem import Problem

MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30
MAX_RANK = 256  # of gates


def exceeded_limits(problem: Problem) -> list[str]:
    """Reasons not to serve `problem` that hold for every fused backend.

    Comparing a length while tracing would make it a constant. Lengths are therefore checked when the operator runs.
    """
    reasons = []
    if problem.query.shape[3] > MAX_HEAD_DIM or problem.value.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"serves head dims up to {MAX_HEAD_DIM}")
    if problem.bias_gate is not None and problem.bias_gate.shape[3] > MAX_RANK:
        reasons.append(f"serves gates of rank up to {MAX_RANK}")
    longest = 0 if torch.compiler.is_compiling() else max(problem.query.shape[2], problem.key.shape[2])
    if longest >= MAX_LENGTH:
        reasons.append(f"serves lengths below {MAX_LENGTH}")
    return reasons
