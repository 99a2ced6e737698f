"""The modules: the free parameter per offset, and attention built on it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import ALiBiBias, OffsetBias, OffsetBias2d, OffsetBiasAttention, T5Bias


def _filled(num_heads: int, max_length: int, bidirectional: bool) -> OffsetBias:
    bias = OffsetBias(num_heads, max_length, bidirectional)
    with torch.no_grad():
        bias.weight.normal_()
    return bias


@pytest.mark.parametrize(("bidirectional", "per_head"), [(True, 2 * 7 - 1), (False, 7)])
def test_the_number_of_parameters_is_that_of_offsets(bidirectional, per_head):
    """There are 2 M - 1 parameters a head, or M for causal attention, and no others."""
    assert sum(p.numel() for p in OffsetBias(3, 7, bidirectional).parameters()) == 3 * per_head


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("offsets", [(-6, 6), (0, 6), (-2, 3), (4, 4), (-11, 12), (9, 12), (-30, -20)])
def test_a_table_lists_the_parameter_of_each_offset_and_the_ends_outside(bidirectional, offsets):
    """Both bounds are included. Outside, offsets get the nearest parameter, whose gradient counts each use."""
    bias = _filled(2, 7, bidirectional)
    lowest = -6 if bidirectional else 0
    columns = [min(max(offset, lowest), 6) - lowest for offset in range(offsets[0], offsets[1] + 1)]
    got = bias(*offsets)
    assert got.dtype == torch.float32
    assert torch.equal(got, bias.weight[:, columns])
    got.sum().backward()
    uses = torch.bincount(torch.tensor(columns), minlength=bias.weight.shape[1]).float()
    assert torch.equal(bias.weight.grad, uses.expand(2, -1))


def test_a_table_is_float32_whatever_the_modules_dtype():
    """A module in half precision still gives a float32 table. The gradient arrives in the parameter's dtype."""
    bias = _filled(2, 5, True).bfloat16()
    table = bias(-3, 3)
    assert table.dtype == torch.float32
    assert torch.equal(table, bias.weight[:, 1:8].float())
    table.sum().backward()
    assert bias.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("num_heads", [1, 3])
def test_a_table_is_no_view_of_the_parameter(num_heads):
    """`fully_shard` frees the parameter's memory once the table is made."""
    for bias, table in ((b := OffsetBias(num_heads, 5), b(-4, 4)), (b := OffsetBias2d(num_heads, (2, 3)), b())):
        (parameter,) = bias.parameters()
        assert table.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()


BAD_CALLS = {
    "no probability": (lambda: OffsetBiasAttention(12, 4, None, dropout_p=2.0), r"`dropout_p` .*got 2.0"),
    "no heads": (lambda: OffsetBias(0, 4), r"`num_heads` .*1, got 0"),
    "no length": (lambda: OffsetBias(2, 0), r"`max_length` .*1, got 0"),
    "an empty range": (lambda: OffsetBias(2, 4)(3, 2), r"`max_offset` .*3.*got 2"),
    "a width that heads do not divide": (lambda: OffsetBiasAttention(10, 4, None), r"`embed_dim` .*4, got 10"),
    "groups that do not divide": (
        lambda: OffsetBiasAttention(12, 4, None, num_kv_heads=3),
        r"`num_kv_heads` .*4, got 3",
    ),
    "no key heads": (lambda: OffsetBiasAttention(12, 4, None, num_kv_heads=0), r"`num_kv_heads` .*1, got 0"),
    "an input without a batch": (
        lambda: OffsetBiasAttention(12, 4, None)(torch.ones(5, 12)),
        r"`x` .*\(batch, length, embed_dim=12\), got shape \(5, 12\)",
    ),
    "an input of another width": (
        lambda: OffsetBiasAttention(12, 4, None)(torch.ones(1, 5, 8)),
        r"`x` .*embed_dim=12\), got shape \(1, 5, 8\)",
    ),
    "a table of other heads": (
        lambda: OffsetBiasAttention(12, 4, OffsetBias(3, 5))(torch.ones(1, 5, 12)),
        r"`bias` .*4 heads.*got shape \(3, 9\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(call, message):
    """The error comes at construction where the mistake can be seen there."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("build", "name"),
    [(lambda: OffsetBias(2.5, 4), "num_heads"), (lambda: OffsetBiasAttention(12.0, 4, None), "embed_dim")],
)
def test_a_count_that_is_no_int_is_named(build, name):
    """The error comes before any tensor is made."""
    with pytest.raises(TypeError, match=f"`{name}` must be an int"):
        build()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: OffsetBias(2, 4, bidirectional=0), "bidirectional"),
        (lambda: T5Bias(2, bidirectional=0), "bidirectional"),
        (lambda: ALiBiBias(2, learnable=1), "learnable"),
        (lambda: OffsetBiasAttention(12, 4, None, is_causal="no"), "is_causal"),
    ],
)
def test_a_flag_that_is_no_bool_is_named(build, name):
    """A number there is most likely an argument in the wrong place."""
    with pytest.raises(TypeError, match=f"`{name}` must be a bool"):
        build()


def _plain_attention(layer: OffsetBiasAttention, x: Tensor, padding: Tensor | None) -> Tensor:
    """The layer in plain PyTorch: head h of the query uses key head h // group, and the bias is materialised."""
    batch, length, width = x.shape
    heads, group, dim = layer.num_heads, layer.num_heads // layer.num_kv_heads, width // layer.num_heads

    def split(y: Tensor, repeats: int) -> Tensor:
        return y.view(batch, length, -1, dim).permute(0, 2, 1, 3).repeat_interleave(repeats, dim=1)

    q, k, v = split(layer.q_proj(x), 1), split(layer.k_proj(x), group), split(layer.v_proj(x), group)
    offsets = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    scores = q @ k.mT / dim**0.5
    if layer.bias is not None:
        weight = layer.bias.weight
        lowest = -(layer.bias.max_length - 1) if layer.bias.bidirectional else 0
        scores = scores + weight[:, offsets.clamp(lowest, layer.bias.max_length - 1) - lowest]
    hidden = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    hidden = hidden | (offsets < 0) if layer.is_causal else hidden
    hidden = hidden if padding is None else hidden | ~padding[:, None, None, :]
    out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return layer.out_proj(out.permute(0, 2, 1, 3).reshape(batch, length, heads * dim))


LAYERS = {
    "plain": (OffsetBiasAttention(24, 4, _filled(4, 20, True)), False),
    "longer than the table": (OffsetBiasAttention(24, 4, _filled(4, 6, True)), False),
    "causal": (OffsetBiasAttention(24, 4, _filled(4, 20, False), is_causal=True), False),
    "causal with a bidirectional table": (OffsetBiasAttention(24, 4, _filled(4, 20, True), is_causal=True), False),
    "one-sided table, not causal": (OffsetBiasAttention(24, 4, _filled(4, 20, False)), False),
    "grouped heads, padding": (OffsetBiasAttention(24, 4, _filled(4, 20, True), num_kv_heads=2), True),
    "one key head, causal, padding": (
        OffsetBiasAttention(24, 4, _filled(4, 9, False), num_kv_heads=1, is_causal=True),
        True,
    ),
    "one table for all heads": (OffsetBiasAttention(24, 4, _filled(1, 20, True)), False),
    "no table": (OffsetBiasAttention(24, 4, None), True),
}


@pytest.mark.parametrize(("layer", "is_padded"), LAYERS.values(), ids=LAYERS)
def test_the_attention_layer_equals_plain_pytorch(layer, is_padded):
    """The output and the gradients of the input and of every parameter are compared in float64."""
    layer = copy.deepcopy(layer).double()
    if layer.bias is not None:  # the contract makes tables float32, so their numbers must fit into float32
        layer.bias.weight.data = layer.bias.weight.data.float().double()
    x = torch.randn(3, 17, 24, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(17) < torch.tensor([[17], [11], [4]]) if is_padded else None
    leaves = [x, *layer.parameters()]
    got, expected = layer(x, key_padding_mask=padding), _plain_attention(layer, x, padding)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    gradients = zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True)
    for name, (gradient, wanted) in zip(names, gradients, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "bias.weight" else {}
        torch.testing.assert_close(gradient, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_is_for_training_alone_and_keeps_the_mean():
    """In eval mode the layer equals the layer without dropout. In training, results vary around that layer's."""
    dropping = OffsetBiasAttention(16, 2, _filled(2, 8, True), dropout_p=0.4)
    keeping = OffsetBiasAttention(16, 2, dropping.bias, dropout_p=0.0)
    keeping.load_state_dict(dropping.state_dict())
    x = torch.randn(1, 8, 16).expand(4000, -1, -1)
    expected = keeping(x)
    assert torch.equal(dropping.eval()(x), expected)
    varied = dropping.train()(x)
    spread = varied.std(0)
    assert spread.min() > 0.01
    # The mean of 4000 draws is within five standard errors of its expectation.
    assert ((varied.mean(0) - expected[0]).abs() < 5 * spread / 4000**0.5).all()


def test_one_bias_module_may_serve_several_layers():
    """The bias's gradient is the sum over the layers, and its parameters are counted once."""
    bias = _filled(2, 9, True)
    layers = nn.Sequential(OffsetBiasAttention(8, 2, bias), OffsetBiasAttention(8, 2, bias))
    assert sum(p is bias.weight for p in layers.parameters()) == 1
    apart = copy.deepcopy(layers)
    apart[1].bias = copy.deepcopy(bias)
    x = torch.randn(2, 9, 8)
    layers(x).sum().backward()
    apart(x).sum().backward()
    torch.testing.assert_close(bias.weight.grad, apart[0].bias.weight.grad + apart[1].bias.weight.grad)


def test_a_state_dict_restores_the_layer():
    """A fresh layer that loads it gives the same bits. The names are the documented ones."""
    saved, fresh = (OffsetBiasAttention(16, 4, OffsetBias(4, 6), num_kv_heads=2, is_causal=True) for _ in range(2))
    nn.init.normal_(saved.bias.weight)
    x = torch.randn(2, 10, 16)
    assert not torch.equal(saved(x), fresh(x))
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(saved(x), fresh(x))
    assert "bias.weight" in saved.state_dict()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_modules_table_goes_with_bias_origin_minus_min_offset(bidirectional):
    """Any range that covers the attended offsets gives the same attention."""
    bias = _filled(2, 6, bidirectional)
    qkv = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    outputs = [
        offset_bias_attention(*qkv, bias(lo, hi), bias_origin=-lo, is_causal=True, beyond="error")
        for lo, hi in [(0, 8), (0, 30), (-8, 8), (-20, 9)]
    ]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("bias", ["alibi", torch.zeros(4, 9)])
def test_a_bias_that_is_no_module_is_refused_when_the_layer_is_built(bias):
    """A tensor with a table goes to `offset_bias_attention` itself."""
    with pytest.raises(TypeError, match=f"`bias` must be a module .*got {type(bias).__name__}"):
        OffsetBiasAttention(12, 4, bias)


def test_a_bias_that_goes_with_positions_is_refused_when_the_layer_is_built():
    """Such a module gives no table for a range of offsets."""
    with pytest.raises(TypeError, match="`bias` must give a table for a range of offsets, got OffsetBias2d"):
        OffsetBiasAttention(12, 4, OffsetBias2d(4, (3, 3)))
