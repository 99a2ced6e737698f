"""Windows of images, and ways to look at biases: dense tensors and pictures."""

import sys

import pytest
import torch
from bare import skip_without
from torch import nn

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import ALiBiBias, FireBias, OffsetBias, OffsetBias2d, dense_bias, plot_bias

WINDOWS = [(1, 1), (1, 5), (4, 1), (3, 5), (7, 7)]


def _filled(window: tuple[int, int]) -> OffsetBias2d:
    bias = OffsetBias2d(3, window)
    nn.init.normal_(bias.relative_position_bias_table)
    return bias


@pytest.mark.parametrize("window", WINDOWS)
def test_window_attention_equals_sdpa_with_the_dense_bias(window):
    """Output and every gradient are equal. No pair of tokens leaves the table."""
    bias = _filled(window)
    q, k, v, dout = (torch.randn(4, 3, window[0] * window[1], 8, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)] + [bias.relative_position_bias_table]
    p = bias.positions()
    got = offset_bias_attention(q, k, v, bias(), query_positions=p, key_positions=p, beyond="error")
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.dense().double())
    torch.testing.assert_close(got, expected)
    for gradient, want in zip(
        torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if want.dtype == torch.float32 else {}
        torch.testing.assert_close(gradient, want, **tolerance)


def test_a_window_table_is_float32_whatever_the_modules_dtype():
    """Every other module's table is float32 too."""
    bias = _filled((2, 3)).half()
    assert bias().dtype == torch.float32
    assert torch.equal(bias(), bias.relative_position_bias_table.float().T)


@pytest.mark.parametrize(("lengths", "query_start"), [((6, 6), None), ((1, 9), None), ((5, 2), None), ((4, 3), 10)])
def test_a_dense_bias_has_at_every_pair_what_attention_sees_there(lengths, query_start):
    """It is differentiable, and has the default `query_start` of attention."""
    bias = OffsetBias(2, 20)
    nn.init.normal_(bias.weight)
    dense = dense_bias(bias, *lengths, query_start)
    start = lengths[1] - lengths[0] if query_start is None else query_start
    for i in range(lengths[0]):
        for j in range(lengths[1]):
            assert torch.equal(dense[:, i, j], bias.weight[:, start + i - j + 19])
    q, k, v = torch.randn(1, 2, lengths[0], 4), torch.randn(1, 2, lengths[1], 4), torch.randn(1, 2, lengths[1], 4)
    got = offset_bias_attention(q, k, v, bias.weight, query_start=query_start)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(got, expected)
    got_grad, wanted = (torch.autograd.grad(out.square().sum(), bias.weight)[0] for out in (got, expected))
    torch.testing.assert_close(got_grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _off_screen():
    """Opens no window, and leaves no figure open."""
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


@skip_without("matplotlib")
@pytest.mark.usefixtures("_off_screen")
def test_a_plot_has_a_line_per_head_with_the_bias_over_the_offset():
    """The plot goes into new axes or the given ones. It names the heads."""
    bias = ALiBiBias(3, learnable=True)
    axes = plot_bias(bias, -4, 6)
    assert plot_bias(bias, 0, 1, ax=axes) is axes
    for head, line in enumerate(axes.lines[:3]):
        assert line.get_xdata().tolist() == list(range(-4, 7))
        assert line.get_ydata().tolist() == bias(-4, 6)[head].tolist()
        assert line.get_label() == f"head {head}"
    assert axes.get_xlabel() == "offset (query minus key)"
    assert axes.get_legend() is not None


@skip_without("matplotlib")
@pytest.mark.usefixtures("_off_screen")
def test_many_heads_are_not_named():
    """A legend of dozens would hide the lines."""
    axes = plot_bias(ALiBiBias(17), 0, 3)
    assert len(axes.lines) == 17
    assert axes.get_legend() is None


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    """Only the plot needs it."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="plot_bias needs matplotlib: pip install matplotlib"):
        plot_bias(ALiBiBias(2), 0, 3)


BAD_CALLS = {
    "no queries": (lambda: dense_bias(ALiBiBias(2), 0, 4), r"`len_q` .*1, got 0"),
    "no keys": (lambda: dense_bias(ALiBiBias(2), 4, 0), r"`len_k` .*1, got 0"),
    "beyond a threshold": (lambda: dense_bias(FireBias(2, 10), 4, 4, query_start=8), r"`max_offset` .*got 11"),
    "an empty range": (lambda: plot_bias(ALiBiBias(2), 3, 2), r"`max_offset` .*3.*got 2"),
    "a window of one side": (lambda: OffsetBias2d(2, 7), r"`window_size` must be a pair .*got 7"),
    "an empty window": (lambda: OffsetBias2d(2, (7, 0)), r"`window_size` .*1, got 0"),
}


@skip_without("matplotlib")  # one of the calls needs it
@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(call, message):
    """The error comes before anything is computed."""
    with pytest.raises(ValueError, match=message):
        call()
