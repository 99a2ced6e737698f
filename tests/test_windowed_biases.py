"""Biases for windows: of two and of three dimensions, with and without a class token."""

import itertools

import pytest
import torch
from tolerance import assert_accurate

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import OffsetBias2d, OffsetBias3d, OffsetBiasAttention
from triton_offset_bias.modules.windowed_bias import WindowedBias

HEADS = 3
WINDOWS = [(1, 1), (1, 5), (4, 1), (3, 5), (1, 1, 1), (2, 1, 3), (3, 4, 2), (1, 4, 5)]


def _filled(window: tuple[int, ...], class_token: bool) -> WindowedBias:
    bias = (OffsetBias2d if len(window) == 2 else OffsetBias3d)(HEADS, window, class_token)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    return bias


def _expected(bias: WindowedBias) -> torch.Tensor:
    """The bias of every pair, looked up one by one as the docstrings say: (HEADS, tokens, tokens)."""
    rows = bias.relative_position_bias_table.detach()
    places = list(itertools.product(*(range(size) for size in bias.window_size)))
    dense = torch.empty(HEADS, len(places), len(places))
    for (i, query), (j, key) in itertools.product(enumerate(places), enumerate(places)):
        row = 0
        for size, q, k in zip(bias.window_size, query, key, strict=True):
            row = row * (2 * size - 1) + q - k + size - 1
        dense[:, i, j] = rows[row]
    if not bias.class_token:
        return dense
    from_class, to_class, within_class = rows[-3:]
    whole = torch.empty(HEADS, len(places) + 1, len(places) + 1)
    whole[:, 1:, 1:], whole[:, 0], whole[:, :, 0] = dense, from_class[:, None], to_class[:, None]
    whole[:, 0, 0] = within_class
    return whole


@pytest.mark.parametrize("class_token", [False, True], ids=["window", "class token"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_pair_has_the_number_of_its_offset(window, class_token):
    """The class token's three numbers are in the order of BEiT."""
    bias = _filled(window, class_token)
    assert torch.equal(bias.dense(), _expected(bias))


@pytest.mark.parametrize("class_token", [False, True], ids=["window", "class token"])
@pytest.mark.parametrize("window", [(3, 5), (2, 3, 4)], ids=str)
def test_attention_and_the_parameters_gradient_are_dense_attentions(backend, window, class_token):
    """Table and positions are passed as the docstring shows."""
    bias = _filled(window, class_token)
    tokens = bias.query_positions().numel()
    query, key, value, dout = torch.randn(4, 2, HEADS, tokens, 8).unbind()
    positions = {"query_positions": bias.query_positions(), "key_positions": bias.key_positions()}
    if not class_token:
        assert torch.equal(bias.positions(), positions["query_positions"])

    def results(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return out.detach(), torch.autograd.grad(out, bias.relative_position_bias_table, dout.to(out.dtype))[0]

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (x.to(dtype) for x in (query, key, value))
        return results(torch.nn.functional.scaled_dot_product_attention(*inputs, bias.dense().to(dtype)))

    got = results(offset_bias_attention(query, key, value, bias(), **positions, backend=backend))
    for name, x, wanted, same in zip(("out", "dbias"), got, dense(torch.float64), dense(torch.float32), strict=True):
        assert_accurate(name, x, wanted.double(), same, torch.finfo(torch.float32).eps * 4)


def test_a_class_token_keeps_its_numbers_when_the_window_is_resized():
    """The window's part is interpolated as without a class token."""
    bias, plain = _filled((3, 4), True), OffsetBias2d(HEADS, (3, 4))
    numbers = bias.relative_position_bias_table
    plain.load_state_dict({"relative_position_bias_table": numbers[:-3]})
    resized = bias.resized((5, 6))
    assert torch.equal(resized[-3:], numbers[-3:])
    assert torch.equal(resized[:-3], plain.resized((5, 6)))
    new = OffsetBias2d(HEADS, (5, 6), class_token=True)
    new.load_state_dict({"relative_position_bias_table": resized})
    assert repr(new) == "OffsetBias2d(num_heads=3, window_size=(5, 6), class_token=True)"


@pytest.mark.parametrize("window", [(3, 5), (2, 3, 4)], ids=str)
def test_a_table_shares_no_memory_with_its_parameter(window):
    """`fully_shard` frees the parameter as soon as the module has returned."""
    for class_token in (False, True):
        bias = _filled(window, class_token)
        assert bias().untyped_storage().data_ptr() != bias.relative_position_bias_table.untyped_storage().data_ptr()


BAD_CALLS = {
    "two sizes of three": (lambda: OffsetBias3d(2, (3, 3)), ValueError, r"`window_size` must be a triple .*\(3, 3\)"),
    "three sizes of two": (lambda: OffsetBias2d(2, (3, 3, 3)), ValueError, r"`window_size` must be a pair"),
    "an empty window": (lambda: OffsetBias3d(2, (3, 0, 3)), ValueError, "`window_size` .*1, got 0"),
    "a flag": (lambda: OffsetBias2d(2, (3, 3), "cls"), TypeError, "`class_token` .*bool"),
    "one position of two": (lambda: OffsetBias2d(2, (3, 3), True).positions(), ValueError, "`query_positions` and"),
    "a table for positions": (
        lambda: OffsetBiasAttention(12, 2, OffsetBias3d(2, (3, 3, 3))),
        TypeError,
        "got OffsetBias3d, whose table is for positions",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(call, error, message):
    """No positions are given that would be right for queries alone."""
    with pytest.raises(error, match=message):
        call()
