"""FIRE beyond its threshold: tables and a gate that interpolate it, against the formula for every pair."""

import pytest
import torch
from torch import Tensor

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import FireBias

HEADS, THRESHOLD = 3, 40
SERVING = ["cpp", "reference"]  # gates of any rank


def _fire() -> FireBias:
    """Weights that bend much more than those of a trained network."""
    bias = FireBias(HEADS, THRESHOLD, hidden_size=16)
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        bias.limit.fill_(THRESHOLD + 7.5)
    return bias


def _formula(bias: FireBias, positions: Tensor, len_k: int) -> Tensor:
    """The paper's bias of every pair, (H, Lq, Lk)."""
    distances = (positions[:, None] - torch.arange(len_k)).abs()
    scale = torch.maximum(positions.float(), bias.limit.clamp(min=THRESHOLD))
    x = torch.log1p(bias.c.abs() * distances) / torch.log1p(bias.c.abs() * scale)[:, None]
    return bias.out(torch.relu(bias.hidden(x.unsqueeze(-1)))).permute(2, 0, 1)


def _interpolated(bias: FireBias, positions: Tensor, len_k: int, rank: int) -> Tensor:
    """The bias of every pair from the tables and the gate, (H, Lq, Lk)."""
    start = int(positions[0])
    table, gate = bias.gated(len(positions), len_k, query_start=start, rank=rank)
    columns = positions[:, None] - torch.arange(len_k) + len_k - 1 - start
    return (gate @ table).gather(-1, columns.expand(HEADS, -1, -1))


@pytest.mark.parametrize("rank", [2, 7, 16])
@pytest.mark.parametrize(("start", "len_q", "len_k"), [(0, 200, 200), (150, 50, 200), (0, 90, 30), (300, 1, 301)])
def test_the_error_is_within_its_bound(start, len_q, len_k, rank):
    """The docstring's bound holds for every pair; queries up to L are exact but for rounding."""
    bias, positions = _fire(), start + torch.arange(len_q)
    error = (_interpolated(bias, positions, len_k, rank) - _formula(bias, positions, len_k)).abs()
    psi = torch.log1p(bias.c.abs() * (positions[:, None] - torch.arange(len_k)).abs())
    inverse = 1 / torch.log1p(bias.c.abs() * torch.stack([bias.limit[0], positions[-1].clamp(min=bias.limit[0])]))
    step = (inverse[0] - inverse[1]) / (rank - 1)
    bends = (bias.out.weight * bias.hidden.weight.T).abs().sum(1)
    bound = psi * step / 4 * bends[:, None, None]
    assert (error <= bound + 1e-5).all()
    assert (error[:, positions <= bias.limit] < 1e-5).all()


def test_more_tables_are_closer():
    """The largest error of a long sequence falls with the rank."""
    bias, positions = _fire(), torch.arange(400)
    errors = [
        (_interpolated(bias, positions, 400, rank) - _formula(bias, positions, 400)).abs().max()
        for rank in (2, 8, 32, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize("backend", SERVING)
def test_attention_beyond_the_threshold(backend):
    """Output and the gradients of all parameters, against dense attention with the formula's bias."""
    length, bias = 120, _fire()
    q, k, v = (torch.randn(2, HEADS, length, 8) for _ in range(3))
    dout = torch.randn(2, HEADS, length, 8)
    table, gate = bias.gated(length, length, rank=64)
    gate = gate.expand(2, HEADS, -1, -1)
    out = offset_bias_attention(q, k, v, table, bias_gate=gate, is_causal=True, backend=backend)
    got = torch.autograd.grad(out, list(bias.parameters()), dout)
    scores = q @ k.mT * 8**-0.5 + _formula(bias, torch.arange(length), length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected_out = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    expected = torch.autograd.grad(expected_out, list(bias.parameters()), dout)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=5e-3)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * float(y.abs().max()) + 1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((0, 5), {}), ValueError, "`len_q` must be at least 1, got 0"),
        (((5, 3), {}), ValueError, "`query_start` must be at least 0, got -2"),
        (((5, 5), {"rank": 1}), ValueError, "`rank` must be between 2 and 256, got 1"),
        (((5, 5), {"rank": 2.0}), TypeError, "`rank` must be an int, got 2.0"),
    ],
    ids=["no query", "queries before keys", "one table", "a fraction"],
)
def test_wrong_arguments_are_errors_that_name_them(arguments, error, message):
    """The message says what was expected and what came."""
    with pytest.raises(error, match=message):
        FireBias(2, 4).gated(*arguments[0], **arguments[1])
