"""Facts about gradients that need no oracle: finite differences, sums that vanish, and which tensors get a gradient."""

from dataclasses import replace

import pytest
import torch
from cases import Case, build, padding_mask, results_of
from oracle import attended_pairs, pair_offsets
from torch.autograd import gradcheck, gradgradcheck

from triton_offset_bias import offset_bias_attention

CHECKED = [
    Case("the default", (5, 7), (3, 2), batch=1, columns=9),
    Case("causal, grouped heads", (7, 5), (2, 3), batch=1, heads=(4, 2), bias="N", options={"is_causal": True}),
    Case(
        "a window, holes, no bias beyond a table per sequence",
        (6, 6),
        (2, 2),
        bias="BHN",
        columns=5,
        mask="holes",
        options={"window_size": (4, 2), "beyond": "zero"},
    ),
]

SHARING_SCORES = [
    Case("no table", (40, 50), (64, 64), bias=None),
    Case("no table, one key", (40, 1), (64, 64), bias=None),
    Case("no table, holes", (40, 50), (64, 64), bias=None, mask="holes"),
    Case("no table, causal", (50, 50), (64, 64), bias=None, options={"is_causal": True}),
    Case("a table", (40, 50), (64, 64)),
    Case(
        "a table, positions",
        (40, 50),
        (64, 64),
        options={"query_positions": torch.arange(40) * 3 % 41, "key_positions": torch.arange(50)},
    ),
]


def _inputs64(case: Case) -> tuple[list[torch.Tensor], dict]:
    call = build(case)
    return [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v, call.bias)], call.options


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.reason)
def test_gradients_are_finite_differences_in_float64(precise_backend, case, return_lse):
    """torch's `gradcheck` takes the output alone, and the output together with the log-sum-exp."""
    inputs, options = _inputs64(case)

    def attend(*inputs: torch.Tensor):
        result = offset_bias_attention(*inputs, **options, return_lse=return_lse, backend=precise_backend)
        # A row without keys has the constant -inf, which finite differences cannot subtract.
        return (result[0], result[1].masked_fill(result[1] == float("-inf"), 0)) if return_lse else result

    assert gradcheck(attend, inputs)


def test_the_reference_has_a_second_derivative():
    """torch's `gradgradcheck` compares the derivative of the derivative with finite differences."""
    inputs, options = _inputs64(Case("small", (3, 4), (2, 2), batch=1, heads=(1, 1), columns=5))
    assert gradgradcheck(lambda *x: offset_bias_attention(*x, **options, return_lse=True, backend="reference"), inputs)


def _loss_and_inputs(backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    call = build(Case("small", (9, 9)))
    out = offset_bias_attention(call.q, call.k, call.v, call.bias, backend=backend)
    return out.square().sum(), [call.q, call.k, call.v, call.bias]


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_a_second_derivative_by_backward_is_an_error_on_the_engine():
    """The error comes in backward of a function of a gradient, which `backward(create_graph=True)` made."""
    loss, (q, *_) = _loss_and_inputs("cpp")
    with pytest.warns(UserWarning, match="create_graph"):
        loss.backward(create_graph=True)
    penalty = q.grad.square().sum()
    with pytest.raises(NotImplementedError, match="second derivative"):
        penalty.backward()


@pytest.mark.needs_engine
@pytest.mark.cpu_only
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_a_second_derivative_by_grad_is_an_error_on_the_engine(first, second):
    """`torch.autograd.grad(..., inputs)` takes another path through autograd. It must not be silently wrong."""
    loss, inputs = _loss_and_inputs("cpp")
    (gradient,) = torch.autograd.grad(loss, inputs[first], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(gradient.square().sum(), inputs[second])


SUMS = [
    Case("everything inside the table"),
    Case("causal, the table clamped", columns=15, options={"is_causal": True}),
    Case("a window that leaves the last queries nothing", options={"window_size": (40, 11), "query_start": 0}),
    Case("grouped heads, holes, lse", heads=(4, 2), mask="holes", through_lse=True),
    Case("causal, lse", (110, 130), through_lse=True, options={"is_causal": True}),
]


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.reason)
def test_the_tables_gradient_sums_to_that_of_the_log_sum_exp(precise_backend, case):
    """Every row of dS sums to dlse.

    Where "zero" drops no offset, a head's dbias sums to the sum of its dlse, or to 0.
    """
    lengths = (130, 110) if case.lengths == (29, 31) else case.lengths
    call = build(replace(case, lengths=lengths, dtype=torch.float64, bias_dtype=torch.float64))
    dbias = results_of(call, precise_backend).dbias
    expected = torch.zeros(case.heads[0]).double() if call.dlse is None else call.dlse.sum((0, 2))
    assert dbias.abs().max() > 0.1
    torch.testing.assert_close(dbias.sum(-1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 64.0, 4096.0])
@pytest.mark.parametrize("case", SHARING_SCORES, ids=lambda case: case.reason)
def test_backward_makes_the_scores_that_forward_made(precise_backend, case, scale):
    """Large scores agree to the last bit as well. Otherwise a row of P would not sum to 1, nor dV to the sum of dO."""
    call = build(replace(case, options={**case.options, "scale": scale}))
    call.dout.fill_(1.0)
    dv = results_of(call, precise_backend).dv
    torch.testing.assert_close(dv.sum(2), torch.full_like(dv[:, :, 0], call.q.shape[2]), rtol=5e-6, atol=0)


def test_a_constant_added_to_the_table_changes_nothing_but_lse(precise_backend):
    """Softmax does not see the constant.

    Output and gradients are equal, and the log-sum-exp is larger by the constant.
    """
    case = Case(
        "shifted",
        (61, 53),
        dtype=torch.float64,
        bias_dtype=torch.float64,
        columns=31,
        options={"is_causal": True, "query_start": 5},
    )
    call = build(case)
    before = results_of(call, precise_backend)
    call.bias = (call.bias.detach() + 3.0).requires_grad_()
    after = results_of(call, precise_backend)
    for name in ("out", "dq", "dk", "dv", "dbias"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=1e-12)
    torch.testing.assert_close(after.lse, before.lse + 3.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("through_lse", [False, True])
def test_offsets_that_no_pair_attends_to_have_gradient_exactly_zero(backend, through_lse):
    """Causality, a window, padding or -inf in the table forbid offsets.

    Their gradient is exactly 0, and others' is not.
    """
    forbidden = (100, 104, 117)
    case = Case(
        "masked",
        (90, 100),
        mask="left padding",
        forbidden=forbidden,
        through_lse=through_lse,
        options={"is_causal": True, "window_size": (50, -1)},
    )
    call = build(case)
    got = results_of(call, backend)
    offsets = pair_offsets(90, 100, None, None, None)
    mask = padding_mask("left padding", 2, 100)
    columns = offsets[attended_pairs(offsets, True, (50, -1), mask)[:1]] + 99
    used = torch.zeros(199, dtype=torch.bool)
    used[columns] = True
    used[list(forbidden)] = False
    assert (got.dbias[:, ~used] == 0).all()
    assert (got.dbias[:, used] != 0).all()
    assert (got.dk[~mask.unsqueeze(1).expand(2, 2, 100)] == 0).all()
    assert (got.dv[~mask.unsqueeze(1).expand(2, 2, 100)] == 0).all()


NEEDS = [
    Case("grouped, causal", (40, 37), heads=(4, 2), options={"is_causal": True}),
    Case("lse too, half", (33, 50), dtype=torch.bfloat16, through_lse=True),
]


@pytest.mark.parametrize("case", NEEDS, ids=lambda case: case.reason)
@pytest.mark.parametrize("needed", ["q", "k", "v", "bias"])
def test_a_gradient_asked_for_alone_is_the_same(backend, case, needed):
    """The engine gives the same bits whatever other gradients are left out, because its order of sums is fixed."""
    expected = results_of(build(case), backend)
    call = build(case)
    for name in {"q", "k", "v", "bias"} - {needed}:
        getattr(call, name).requires_grad_(False)
    inputs = (call.q, call.k, call.v, call.bias)
    out, lse = offset_bias_attention(*inputs, **call.options, return_lse=True, backend=backend)
    pairs = [(out, call.dout)]
    if call.dlse is not None and lse.requires_grad:  # in the reference, lse has no gradient for v alone
        pairs.append((lse, call.dlse))
    torch.autograd.backward(*zip(*pairs, strict=True))
    exact = {"rtol": 0.0, "atol": 0.0} if backend == "cpp" else {}
    torch.testing.assert_close(getattr(call, needed).grad, getattr(expected, "d" + needed), **exact)
    assert all(getattr(call, name).grad is None for name in {"q", "k", "v", "bias"} - {needed})
