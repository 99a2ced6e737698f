"""Dropout: which weights are dropped, and how results and gradients follow from them."""

import numpy as np
import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from oracle import NAMES, Results, oracle
from philox import dropout_factors, philox
from tolerance import assert_accurate

from triton_offset_bias import dropout, offset_bias_attention, offset_bias_attention_varlen

BF16 = torch.bfloat16
CASES = [
    Case("plain", (37, 41), through_lse=True, options={"dropout_p": 0.3}),
    Case("causal, longer than a block of 96", (130, 111), options={"dropout_p": 0.5, "is_causal": True}),
    Case("grouped heads, holes", (50, 70), heads=(4, 2), mask="holes", options={"dropout_p": 0.1}),
    Case("a window, blocks that begin anywhere", (90, 230), columns=21,
         options={"dropout_p": 0.4, "window_size": (50, 20), "query_start": 77}),
    Case("no table", (33, 65), bias=None, options={"dropout_p": 0.25}),
    Case("one query", (1, 90), heads=(2, 1), options={"dropout_p": 0.25}),
    Case("bfloat16", (70, 70), (32, 24), dtype=BF16, options={"dropout_p": 0.2}),
    Case("deterministic", (70, 50), options={"dropout_p": 0.2, "deterministic": True}),
    Case("positions", (20, 30), columns=21,
         options={"dropout_p": 0.2, "query_positions": torch.arange(20) // 2 * 3,
                  "key_positions": torch.arange(30).flip(0)}),
    Case("so few that hardly any is dropped", (37, 41), options={"dropout_p": 1e-4}),
    Case("nearly all", (37, 41), options={"dropout_p": 0.97}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_every_result_is_that_of_the_listed_weights(backend, case):
    """Output, log-sum-exp and gradients have the weights dropped that an independent Philox names."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, backend))


def test_packed_sequences_drop_as_a_batch_of_them_would(backend):
    """A weight's place is its sequence, and its query and key counted from the sequence's own first."""
    lengths, dropout_p = [20, 1, 35], 0.3
    bounds = torch.tensor([0, 20, 21, 56], dtype=torch.int32)
    q, k, v = (torch.randn(56, 2, 16, requires_grad=True) for _ in range(3))
    bias, dout = torch.randn(2, 15, requires_grad=True), torch.randn(56, 2, 16)
    seeded = torch.manual_seed(5)
    out, lse = offset_bias_attention_varlen(
        q, k, v, bias, bounds, bounds, 35, 35, dropout_p=dropout_p, return_lse=True, backend=backend
    )
    got = Results(out, lse, *torch.autograd.grad(out, [q, k, v, bias], dout))
    state, parts = torch.manual_seed(5).get_state(), []
    for index, sequence in enumerate(zip(*(x.detach().split(lengths) for x in (q, k, v, dout)), strict=True)):
        batched = [x.transpose(0, 1).unsqueeze(0) for x in sequence]
        seeded.set_state(state)
        factors = dropout_factors(dropout_p, (1, 2, lengths[index], lengths[index]), first_sequence=index)
        pair = [oracle(*batched[:3], bias.detach(), dout=batched[3], factors=factors, dtype=dtype)
                for dtype in (torch.float64, torch.float32)]  # fmt: skip
        parts.append(pair)
    for name in NAMES:
        whole = []
        for results in zip(*parts, strict=True):
            values = [getattr(part, name) for part in results]
            if name == "dbias":
                whole.append(torch.stack(values).sum(0))
            else:
                packed = torch.cat([x[0].transpose(0, 1) for x in values])
                whole.append(packed.T if name == "lse" else packed)
        summed = sum(part.summed for part, _ in parts) if name == "dbias" else None
        assert_accurate(name, getattr(got, name), *whole, torch.finfo(torch.float32).eps, summed)


def test_philox_gives_the_published_words():
    """Random123 publishes words for counter and key of zeros, for 7 and for 10 rounds."""
    counter = (np.uint64(0),) * 4
    assert philox((0, 0), counter, 7) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((0, 0), counter, 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def test_the_share_of_dropped_weights_is_p_and_neighbours_are_independent():
    """Shares over all weights, rows, columns, heads and pairs of neighbours lie within four standard deviations."""
    dropout_p, size = 0.3, 512
    kept = dropout.kept(torch.tensor(123), dropout_p, 0, 1, 4, size, size).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5

    def assert_mean(x: torch.Tensor, mean: float, deviation: float, count: int) -> None:
        assert (x - mean).abs().max() <= 5 * deviation / count**0.5

    assert_mean(kept.mean(), 1 - dropout_p, deviation, 4 * size**2)
    assert_mean(kept.mean((2, 3)), 1 - dropout_p, deviation, size**2)
    assert_mean(kept.mean(2), 1 - dropout_p, deviation, size)
    assert_mean(kept.mean(3), 1 - dropout_p, deviation, size)
    centred = kept - (1 - dropout_p)
    for step in ((0, 1), (1, 0), (8, 0), (0, 8), (16, 0), (8, 8)):
        moved = centred.roll(step, (2, 3))
        assert_mean((centred * moved).mean(), 0.0, deviation**2, 4 * size**2)
    assert_mean((centred[:, :1] * centred[:, 1:]).mean((2, 3)), 0.0, deviation**2, size**2)


def test_torchs_generator_decides(backend):
    """Equal seeds drop equally. A second call drops other weights. A call without dropout draws no seed."""
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))

    def attend(dropout_p: float = 0.5) -> torch.Tensor:
        return offset_bias_attention(q, k, v, None, dropout_p=dropout_p, backend=backend)

    torch.manual_seed(3)
    first, second = attend(), attend()
    torch.manual_seed(3)
    attend(0.0)
    assert torch.equal(attend(), first)
    assert torch.equal(attend(), second)
    assert not torch.equal(first, second)


def test_all_weights_dropped_is_zero(backend):
    """With p = 1, as in SDPA, output and gradients are 0. The log-sum-exp does not change."""
    call = build(Case("all", (20, 20)))
    lse = results_of(call, backend).lse
    call.options["dropout_p"] = 1.0
    got = results_of(call, backend)
    assert torch.equal(got.lse, lse)
    for name in ("out", "dq", "dk", "dv", "dbias"):
        assert getattr(got, name).count_nonzero() == 0, name
