"""Queries with no key to attend to, and rows that look similar: tables of very low numbers, NaN."""

import pytest
import torch
from oracle import oracle

from triton_offset_bias import offset_bias_attention

EMPTY_ROWS = {
    "causal, the first queries before every key": {"query_start": -4, "is_causal": True},
    "a sequence whose keys are all padding": {"key_padding_mask": torch.tensor([[False] * 9, [True] * 9])},
    "a sequence with fewer keys than queries, one with none": {"key_lengths": torch.tensor([5, 0]), "is_causal": True},
    "a window that ends before the last keys": {"query_start": 6, "window_size": (2, -1)},
}


@pytest.mark.parametrize("options", EMPTY_ROWS.values(), ids=EMPTY_ROWS)
def test_a_query_with_nothing_to_attend_to_gives_zero_output_and_no_gradient(backend, options):
    """The output is exactly 0, the log-sum-exp -inf, the query's gradient 0.

    The square of that -inf in a loss brings no NaN.
    """
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 17, requires_grad=True)
    out, lse = offset_bias_attention(q, k, v, bias, **options, return_lse=True, backend=backend)
    empty = oracle(q, k, v, bias, **options).lse == float("-inf")
    assert empty.any()
    assert not empty.all()
    assert (out[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()
    (out.sum() + lse.square().sum()).backward()
    assert (q.grad[empty] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, bias))


@pytest.mark.parametrize("options", EMPTY_ROWS.values(), ids=EMPTY_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_with_nothing_to_attend_to_takes_no_part_whatever_its_incoming_gradient_is(backend, options, dtype):
    """A loss may have no finite slope at an output of 0, for example the output's direction.

    No gradient becomes NaN.
    """
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 17, requires_grad=True)
    empty = oracle(q, k, v, bias, **options).lse == float("-inf")
    out = offset_bias_attention(q, k, v, bias, **options, backend=backend)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v, bias), dout, retain_graph=True)
    for poison in (float("nan"), float("inf")):
        dout[empty] = poison
        got = torch.autograd.grad(out, (q, k, v, bias), dout, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("options", EMPTY_ROWS.values(), ids=EMPTY_ROWS)
def test_a_query_with_nothing_to_attend_to_gives_zero_whatever_the_values_are(backend, options):
    """A value to which no query attends may be any number."""
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    v[:, :, ::4] = float("nan")
    empty = oracle(q, k, v, None, **options).lse == float("-inf")
    out = offset_bias_attention(q, k, v, None, **options, backend=backend)
    assert (out[empty] == 0).all()


@pytest.mark.parametrize("lowest", [-1e31, torch.finfo(torch.float32).min])
def test_a_table_of_very_negative_finite_numbers_forbids_nothing(backend, lowest):
    """Only -inf forbids.

    Equal biases, however low, leave every key an equal share, because the rest is rounded away.
    """
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    table = torch.full((41,), lowest)
    table[0] = 0.0  # no offset reaches this column; it keeps the table from being constant, and its constant from use
    out, lse = offset_bias_attention(q, k, v, table, return_lse=True, backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(out.shape))
    if lowest == -1e31:  # in bits, as the engine counts, the lowest float32 is beyond float32
        torch.testing.assert_close(lse, torch.full_like(lse, lowest))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_nan_and_infinite_inputs_are_not_hidden(backend):
    """Results that are NaN in SDPA are NaN here.

    A query's NaN or infinity reaches its row, a key's reaches every row.
    """
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    for poisoned in (float("nan"), float("inf")):
        bad_query, bad_key = q.clone(), k.clone()
        bad_query[0, 0, 3, 2] = bad_key[0, 0, 4, 1] = poisoned
        out = offset_bias_attention(bad_query, k, v, None, backend=backend)
        assert out.isnan().any(-1).flatten().nonzero().tolist() == [[3]]
        scores_are_inf = (q @ bad_key.mT)[..., 4].isnan() | ((q @ bad_key.mT)[..., 4] > 0)
        out = offset_bias_attention(q, bad_key, v, None, backend=backend)
        assert torch.equal(out.isnan().any(-1), scores_are_inf)
