"""Sinks: a logit of each head without a value, against a dense softmax that has one more column."""

import re

import pytest
import torch
from cases import Case, build
from tolerance import assert_accurate

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen, table

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dsink")
CASES = [
    Case("all pairs", (40, 50), through_lse=True),
    Case("causal, grouped heads", (40, 50), heads=(4, 2), options={"is_causal": True}, through_lse=True),
    Case("holes", (40, 50), mask="holes"),
    Case("a sequence without a key", (40, 50), mask="one sequence has no key", through_lse=True),
    Case("one query", (1, 90), through_lse=True),
    Case("bfloat16", (40, 50), dtype=torch.bfloat16, through_lse=True),
]


def _dense(call, sink, dtype) -> list[torch.Tensor]:
    """Output, log-sum-exp and all gradients, with a column of sinks beside the scores."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (call.q, call.k, call.v, call.bias, sink)]
    q, k, v, bias, sink = inputs
    len_q, len_k = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    offsets = torch.arange(len_q)[:, None] + len_k - len_q - torch.arange(len_k)
    columns = (offsets + table.default_origin(bias.shape[-1])).clamp(0, bias.shape[-1] - 1)
    scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5 + bias[:, columns]
    if call.options.get("is_causal"):
        scores = scores.masked_fill(offsets < 0, -torch.inf)
    if call.options.get("key_padding_mask") is not None:
        scores = scores.masked_fill(~call.options["key_padding_mask"][:, None, None], -torch.inf)
    logits = sink.view(-1, sink.shape[-1], 1, 1).expand(*scores.shape[:3], 1)
    scores = torch.cat([scores, logits], -1)
    out, lse = scores.softmax(-1)[..., :-1] @ v.repeat_interleave(groups, 1), scores.logsumexp(-1)
    outputs, incoming = [out], [call.dout.to(dtype)]
    if call.dlse is not None:
        outputs, incoming = [out, lse], [call.dout.to(dtype), call.dlse.to(dtype)]
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, inputs, incoming)]


@pytest.mark.parametrize("shape", ["H", "BH"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_the_softmax_has_one_more_logit(backend, case, shape):
    """The weights of a row's keys and of its sink sum to 1."""
    call = build(case)
    sink = torch.randn(*(case.heads[:1] if shape == "H" else (case.batch, case.heads[0]))).requires_grad_()
    inputs = [call.q, call.k, call.v, call.bias, sink]
    out, lse = offset_bias_attention(*inputs[:4], sink=sink, **call.options, return_lse=True, backend=backend)
    outputs, incoming = ([out], [call.dout]) if call.dlse is None else ([out, lse], [call.dout, call.dlse])
    got = [out, lse, *torch.autograd.grad(outputs, inputs, incoming)]
    truth, same = (_dense(call, sink, dtype) for dtype in (torch.float64, case.dtype))
    for name, *three in zip(NAMES, got, truth, same, strict=True):
        eps = torch.finfo(case.dtype).eps
        summed = 16 * three[1].abs() if name in ("dbias", "dsink") else None
        assert_accurate(name, *three, eps, summed)


@pytest.mark.parametrize("shape", ["H", "BH"])
def test_packed_sequences_have_their_own_sinks(backend, shape):
    """The results are those of each sequence by itself; one of them is empty."""
    lengths, heads = (5, 17, 0, 30), 2
    q, k, v = (torch.randn(52, heads, 8) for _ in range(3))
    bias, sink = torch.randn(heads, 9), torch.randn(heads) if shape == "H" else torch.randn(4, heads)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    got = offset_bias_attention_varlen(
        q, k, v, bias, bounds, bounds, 30, 30, is_causal=True, sink=sink, return_lse=True, backend=backend
    )
    parts = []
    for index, (q_s, k_s, v_s) in enumerate(zip(*(x.split(lengths) for x in (q, k, v)), strict=True)):
        one = [x.transpose(0, 1).unsqueeze(0) for x in (q_s, k_s, v_s)]
        own = sink if shape == "H" else sink[index]
        parts.append(offset_bias_attention(*one, bias, is_causal=True, sink=own, return_lse=True, backend="reference"))
    torch.testing.assert_close(got[0], torch.cat([out[0].transpose(0, 1) for out, _ in parts]))
    torch.testing.assert_close(got[1], torch.cat([lse[0] for _, lse in parts], 1))


@pytest.mark.parametrize(
    ("sink", "error", "message"),
    [
        ([0.0], TypeError, "`sink` must be a torch.Tensor, got list"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "`sink` must have a floating-point dtype, got torch.int64"),
        (torch.zeros(3), ValueError, "`sink` must have shape (4,) or (2, 4), got shape (3,)"),
        (torch.zeros(4, device="meta"), ValueError, "`sink` must be on `query`'s device"),
    ],
    ids=["a list", "integers", "other heads", "another device"],
)
def test_a_wrong_sink_is_an_error_that_names_it(sink, error, message):
    """The message says what was expected and what came."""
    q = torch.zeros(2, 4, 5, 8)
    with pytest.raises(error, match=re.escape(message)):
        offset_bias_attention(q, q, q, torch.zeros(9), sink=sink)
