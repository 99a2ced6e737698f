"""Modules of x-transformers that are wrapped or replaced, before the adapter is used or afterwards."""

import copy
import functools

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from x_transformers import Decoder
from x_transformers.attend import Attend

from triton_offset_bias.integrations.x_transformers import use_offset_bias
from triton_offset_bias.modules import ALiBiBias

OPTIONS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 16}


def _hooked(module: nn.Module) -> None:
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def _bound(module: nn.Module) -> None:
    module.forward = module.forward


def _partial(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


@pytest.mark.parametrize("wrap", [_hooked, _bound, _partial])
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_what_wraps_the_forward_of_a_module_does_not_lose_the_table(wrap, when):
    """Every module is wrapped, as accelerate does it. Copies and unwrapped modules attend alike."""
    old = Decoder(alibi_pos_bias=True, rotary_pos_emb=True, verbose=False, **OPTIONS)
    new = Decoder(attn_flash=True, rotary_pos_emb=True, verbose=False, **OPTIONS)
    new.load_state_dict(old.state_dict())
    inner = [module for module in new.modules() if module is not new]
    for module in inner if when != "after" else []:
        wrap(module)
    use_offset_bias(new, ALiBiBias(4))
    for module in inner if when != "before" else []:
        wrap(module)
    x = torch.randn(2, 15, 32)
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)
    if wrap is _hooked:
        remove_hook_from_module(new, recurse=True)
        torch.testing.assert_close(copy.deepcopy(new)(x), old(x), rtol=1e-4, atol=1e-5)


class _OtherAttend(Attend):
    pass


def _own_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, None]:
    return v, None


def _apart(attend: Attend) -> None:
    attend.forward = copy.deepcopy(attend).forward


def _replaced(attend: Attend) -> None:
    attend.forward = _own_attention


def _with_flash_attn(attend: Attend) -> None:
    attend.flash_attn = attend.flash_attn


def _of_another_class(attend: Attend) -> None:
    attend.__class__ = _OtherAttend


@pytest.mark.parametrize("change", [_apart, _replaced, _with_flash_attn, _of_another_class])
def test_an_attention_that_would_not_come_here_is_refused_by_name(change):
    """After the error nothing is changed."""
    layers = Decoder(attn_flash=True, **OPTIONS)
    attends = [module for module in layers.modules() if isinstance(module, Attend)]
    change(attends[1])
    with pytest.raises(ValueError, match=r"`layers` must attend by x-transformers' own .* in layers\.2\.1\.attend"):
        use_offset_bias(layers, ALiBiBias(4))
    assert layers.rel_pos is None
    assert type(attends[0]) is Attend


def test_an_attention_that_is_wrapped_later_and_does_not_come_here_raises():
    """It cannot read the table."""
    new = Decoder(attn_flash=True, **OPTIONS)
    use_offset_bias(new, ALiBiBias(4))
    attend = next(module for module in new.modules() if isinstance(module, Attend))
    attend.forward = Decoder(attn_flash=True, **OPTIONS).layers[0][1].attend.forward
    for length in (1, 7):
        with pytest.raises(AttributeError, match=r"`Attend` must run through triton_offset_bias.*uses `expand`"):
            new(torch.randn(1, length, 32))
    attend.forward = Decoder(**OPTIONS).layers[0][1].attend.forward
    with pytest.raises(TypeError, match="Tensor' and 'OffsetTable'"):
        new(torch.randn(1, 7, 32))
