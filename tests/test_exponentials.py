"""The weights that the engine makes of scores: powers of 2 as accurate as float32 allows, at every score.

A query has two keys, with the scores x and 0 in bits and the values 1 and 0. So its output is 2^x / (2^x + 1).
"""

import math

import pytest
import torch
from torch import Tensor

from triton_offset_bias import offset_bias_attention

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
# The polynomial is right to 1.8e-7. The sum, its reciprocal and the product with it round by 0.6e-7 each.
TOLERANCE = 4e-7
SMALLEST = -126.0  # of normal numbers, as a power of 2


def _scores() -> Tensor:
    """Scores between integers, at them, and next to them, where a step of the power meets the next one."""
    whole = torch.arange(SMALLEST, 1)
    beside = [torch.nextafter(whole, whole + 1)[:-1], torch.nextafter(whole, whole - 1)[1:]]
    small = -torch.logspace(-30, 0, 2000)
    return torch.cat([torch.linspace(SMALLEST, 0, 40_000), whole, *beside, small])


def _weights(scores: Tensor, is_decoding: bool) -> tuple[Tensor, Tensor]:
    """The weights of scores as the output has them, and as the gradient of the value has them.

    All scores are queries of one sequence, or each has a sequence of its own, which takes the path of decoding.
    """
    shape = (len(scores), 1, 1, 1) if is_decoding else (1, 1, len(scores), 1)
    query = scores.reshape(shape)
    key, value = (torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1).repeat(shape[0], 1, 1, 1) for _ in range(2))
    value.requires_grad_()
    # The scale times log2(e) is 1, so that a score in bits is the product of query and key.
    out = offset_bias_attention(query, key, value, None, scale=math.log(2), query_start=0, backend="cpp")
    (gradient,) = torch.autograd.grad(out, value, torch.ones_like(out))
    return out.detach().flatten(), gradient[:, 0, 0, 0]


@pytest.mark.parametrize("is_decoding", [False, True])
def test_weights_are_as_accurate_as_float32_allows_at_every_score(is_decoding):
    """The relative error is bounded down to the smallest normal number."""
    scores = _scores()
    power = torch.exp2(scores.double())
    expected = power / (power + 1)
    out, gradient = _weights(scores, is_decoding)
    assert (out / expected - 1).abs().max() < TOLERANCE
    if is_decoding:  # otherwise it is the sum over all queries
        assert (gradient / expected - 1).abs().max() < TOLERANCE


@pytest.mark.parametrize("is_decoding", [False, True])
def test_weights_of_extreme_scores(is_decoding):
    """A score of 0 has the weight 1, scores far below it have the weight 0, and NaN stays NaN."""
    lowest = torch.finfo(torch.float32).min
    scores = torch.tensor([0.0, -0.0, -127.0, -127.5, -1000.0, -1e30, lowest])
    out, _ = _weights(scores, is_decoding)
    assert out.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0]
    below_normal, _ = _weights(torch.linspace(SMALLEST - 1, SMALLEST, 100)[:-1], is_decoding)
    assert (below_normal >= 0).all()
    assert (below_normal < 2.0**SMALLEST).all()
    assert _weights(torch.tensor([math.nan, -math.nan]), is_decoding)[0].isnan().all()
