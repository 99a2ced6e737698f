"""Dense attention with factors from the query, as models write it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Inputs


def eager_gated(inputs: Inputs) -> Callable[..., Tensor]:
    """Matmuls, the gated bias of every pair, and softmax, as models write it.

    A gate of one number multiplies a view of the table (WavLM). More numbers are multiplied with the tables' columns of
    all offsets, and a view of the product, with rows one number longer, is skewed (Transformer-XL).
    """
    length, is_causal = inputs.q.shape[2], inputs.is_causal
    future = torch.full((length, length), float("-inf"), device=inputs.q.device).triu(1) if is_causal else None

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        beyond = length - 1 - inputs.reach
        rows = (F.pad(table, (beyond, beyond), mode="replicate") if beyond else table).flip(-1)  # by key - query
        if gate.shape[-1] == 1:
            bias = gate * rows[:, 0].unfold(-1, length, 1).flip(1)  # (B, H, L, L)
        else:
            skewed = F.pad(gate @ rows, (0, 1)).flatten(2)[..., : length * (2 * length - 1)]
            bias = skewed.unflatten(2, (length, 2 * length - 1))[..., length - 1 :]
        scores = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5)
        scores = scores.unflatten(0, q.shape[:2])
        return (scores if future is None else scores + future).softmax(-1) @ v

    return run
