"""Trained tables are resized for other windows and lengths."""

import pytest
import torch
from torch import Tensor, nn

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import OffsetBias, OffsetBias2d

NAME = "relative_position_bias_table"


def _filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _timms(table: Tensor, new_window: tuple[int, int]) -> Tensor:
    """timm's `resize_rel_pos_bias_table_simple` and Swin's `load_pretrained`, of a square (positions, heads) table."""
    side = int(table.shape[0] ** 0.5)
    size = (2 * new_window[0] - 1, 2 * new_window[1] - 1)
    image = table.transpose(1, 0).reshape(1, -1, side, side)
    image = nn.functional.interpolate(image, size=size, mode="bicubic", align_corners=False)
    return image.view(-1, size[0] * size[1]).transpose(0, 1)


def _cubic(old: int, new: int) -> Tensor:
    """The (new, old) float64 matrix of a cubic convolution along an axis: Keys's kernel, ends repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        first = int(torch.tensor(place).floor()) - 1
        for column in range(first, first + 4):
            x = abs(place - column)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(column, 0), old - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize("window", [(12, 12), (4, 4), (5, 9), (1, 1), (7, 8)])
def test_a_square_windows_table_is_resized_as_by_swin_and_timm(window):
    """The new window is larger, smaller, not square, or a single token."""
    bias = _filled(OffsetBias2d(3, (7, 7)))
    expected = _timms(bias.relative_position_bias_table, window)
    assert torch.equal(bias.resized(window), expected)


@pytest.mark.parametrize(("old", "new"), [((3, 5), (4, 2)), ((2, 6), (6, 2)), ((1, 4), (3, 7)), ((1, 1), (2, 2))])
def test_any_windows_table_is_the_bicubic_formulas(old, new):
    """Table and gradient are compared with the formula in float64."""
    bias = _filled(OffsetBias2d(2, old))
    rows, columns = (_cubic(2 * a - 1, 2 * b - 1) for a, b in zip(old, new, strict=True))
    weight = bias.relative_position_bias_table.detach().double().requires_grad_()
    image = weight.T.unflatten(-1, (2 * old[0] - 1, 2 * old[1] - 1))
    expected = torch.einsum("ya,xb,hab->yxh", rows, columns, image).flatten(0, 1)
    got, weights = bias.resized(new), torch.randn(expected.shape)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(got, bias.relative_position_bias_table, weights)
    (wanted,) = torch.autograd.grad(expected, weight, weights.double())
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_new_window_loads_the_table_and_gives_it_to_attention():
    """A state dict carries it. The old parameter is trained through it, with the gradient of plain PyTorch."""
    old, new = _filled(OffsetBias2d(3, (4, 4))), OffsetBias2d(3, (6, 5))
    new.load_state_dict({NAME: old.resized((6, 5))})
    assert torch.equal(new(), _timms(old.relative_position_bias_table, (6, 5)).T)
    positions = new.positions()
    q, k, v = (torch.randn(2, 3, 30, 8) for _ in range(3))
    got = offset_bias_attention(q, k, v, old.resized((6, 5)).T, query_positions=positions, key_positions=positions)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=new.dense())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.square().sum(), old.relative_position_bias_table)
    dense = (_timms(old.relative_position_bias_table, (6, 5)).T)[:, positions[:, None] - positions + 49]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    (wanted,) = torch.autograd.grad(expected.square().sum(), old.relative_position_bias_table)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


LENGTHS = [(5, 9), (9, 5), (5, 7), (7, 1), (1, 4), (2, 11)]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("old", "new"), LENGTHS)
def test_a_longer_or_shorter_table_is_interpolated_about_offset_0(bidirectional, old, new):
    """Numbers and gradients follow the formula in float64. The furthest offset and offset 0 keep their numbers."""
    bias = _filled(OffsetBias(2, old, bidirectional))
    weight = bias.weight.detach().double().requires_grad_()
    columns = []
    for offset in range(1 - new if bidirectional else 0, new):
        place = abs(offset) * (old - 1) / max(new - 1, 1)
        below, above = int(place), min(int(place) + 1, old - 1)
        sign = -1 if offset < 0 else 1
        pair = [weight[:, bias.origin + sign * x] for x in (below, above)]
        columns.append(pair[0] + (place - below) * (pair[1] - pair[0]))
    expected, got = torch.stack(columns, 1), bias.resized(new)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(got.shape)
    (gradient,) = torch.autograd.grad(got, bias.weight, weights)
    (wanted,) = torch.autograd.grad(expected, weight, weights.double())
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)
    longer = OffsetBias(2, new, bidirectional)
    longer.load_state_dict({"weight": got})
    if new > 1:
        assert torch.equal(longer(new - 1, new - 1), bias(old - 1, old - 1))
    assert torch.equal(longer(0, 0), bias(0, 0))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("old", "new"), LENGTHS)
def test_an_extended_table_gives_every_offset_that_both_have_its_number(bidirectional, old, new):
    """Offsets beyond the old ends get the nearest end's number."""
    bias, other = _filled(OffsetBias(2, old, bidirectional)), OffsetBias(2, new, bidirectional)
    other.load_state_dict({"weight": bias.resized(new, method="extend")})
    reach = new + 3 if new >= old else new - 1
    assert torch.equal(other(-reach, reach), bias(-reach, reach))
    bias.resized(new, method="extend").sum().backward()
    assert bias.weight.grad.sum() == bias.weight.grad.shape[0] * other.weight.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_size_changes_nothing_and_the_dtype_stays(dtype):
    """The bits are the same, in memory of their own. Half precision is interpolated in float32."""
    for bias, size in ((OffsetBias(2, 5), 5), (OffsetBias(2, 5, False), 5), (OffsetBias2d(2, (3, 4)), (3, 4))):
        (parameter,) = _filled(bias).to(dtype).parameters()
        same = bias.resized(size)
        assert same.dtype == dtype
        assert torch.equal(same, parameter)
        assert same.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
    half, single = OffsetBias2d(2, (3, 3)).to(dtype), OffsetBias2d(2, (3, 3))
    single.load_state_dict(_filled(half).state_dict())
    if dtype != torch.float64:
        assert torch.equal(half.resized((5, 5)), single.resized((5, 5)).to(dtype))


def test_places_in_a_long_table_are_not_rounded():
    """In a table three times as long, every third number is one of the old table's, bit for bit."""
    bias = _filled(OffsetBias(1, 200_001))
    assert torch.equal(bias.resized(600_001)[:, ::3], bias.weight)


def test_a_bad_size_or_method_is_named():
    """The error says which values are expected."""
    with pytest.raises(ValueError, match=r"`window_size` must be a pair \(height, width\), got 7"):
        OffsetBias2d(2, (3, 3)).resized(7)
    with pytest.raises(ValueError, match=r"`window_size` .*1, got 0"):
        OffsetBias2d(2, (3, 3)).resized((0, 3))
    with pytest.raises(ValueError, match=r"`max_length` .*1, got 0"):
        OffsetBias(2, 3).resized(0)
    with pytest.raises(ValueError, match=r"`method` must be one of 'interpolate', 'extend', got 'bicubic'"):
        OffsetBias(2, 3).resized(4, method="bicubic")
