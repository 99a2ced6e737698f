"""Models of timm compute the same on this package as on their own attention."""

import copy

import pytest
import timm_models as models
import torch
from timm_models import BUILDERS, build, images, timm
from tolerance import assert_accurate

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.timm import disable_offset_bias, enable_offset_bias

ROUNDING = 16  # a model has many layers, each of which rounds


def _enabled_copy(model: torch.nn.Module) -> torch.nn.Module:
    fast = copy.deepcopy(model)
    enable_offset_bias(fast)
    assert any(isinstance(module, ReplacedAttention) for module in fast.modules())
    return fast


def _with_fused_attention(model: torch.nn.Module) -> torch.nn.Module:
    """The model on SDPA with a dense bias, where timm can do that."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model


def _results_of(model: torch.nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits and every gradient."""
    inputs = inputs.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    model.zero_grad()
    logits = model(inputs)
    logits.square().sum().backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits.detach(), "image": inputs.grad, **gradients}


def _assert_equal_results(fast: torch.nn.Module, model: torch.nn.Module, inputs: torch.Tensor) -> None:
    expected = _results_of(model, inputs)
    for name, x in _results_of(fast, inputs).items():
        limit = 1e-4 * float(expected[name].abs().max().clamp(min=1.0))
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=limit, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_gradients_are_timms(name, dtype):
    """The error is at most twice the error of timm's own fused attention in the same dtype, against float64."""
    model = _with_fused_attention(build(name).to(dtype))
    inputs = images(model)
    got, same_dtype = (_results_of(x, inputs) for x in (_enabled_copy(model), model))
    expected = _results_of(model.double(), inputs)
    assert got.keys() == expected.keys()
    for key, wanted in expected.items():
        assert_accurate(key, got[key], wanted, same_dtype[key], ROUNDING * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", BUILDERS)
def test_disabling_gives_the_model_its_own_attention_back(name):
    """Parameters were never touched, and buffers stay."""
    model = build(name)
    inputs = images(model)
    with torch.no_grad():
        expected = model(inputs)
        pointers = {key: x.data_ptr() for key, x in model.state_dict().items()}
        classes = [type(module) for module in model.modules()]
        assert list(enable_offset_bias(model)) == [""]
        assert {key: x.data_ptr() for key, x in model.state_dict().items()} == pointers
        assert not torch.equal(model(inputs), expected)
        disable_offset_bias(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(inputs), expected)
    with pytest.raises(ValueError, match="`model` must be one that"):
        disable_offset_bias(model)


RESIZED = {
    "swin": ((48, 40), {"window_size": (6, 5)}),
    "swin_v2": ((48, 40), {"window_size": (6, 5)}),
    "beit": ((24, 16), {}),
    "beit, shared bias": ((24, 16), {}),
    "relpos": ((24, 16), {}),
    "relpos, class token": ((24, 16), {}),
    "relpos, network": ((24, 16), {}),
    "maxvit": ((64, 64), {}),
    "coatnet": ((48, 64), {}),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")  # timm's interpolation
@pytest.mark.parametrize("is_first", [True, False], ids=["resized first", "enabled first"])
@pytest.mark.parametrize("name", RESIZED)
def test_images_and_windows_may_change_their_size(name, is_first):
    """timm interpolates the tables, and makes new parameters of them."""
    size, options = RESIZED[name]
    model = build(name)
    fast = copy.deepcopy(model)
    if not is_first:
        enable_offset_bias(fast)
    for each in (model, fast):
        each.set_input_size(img_size=size, **options)
    if is_first:
        enable_offset_bias(fast)
    _assert_equal_results(fast, model, torch.randn(2, 3, *size))


def test_windows_that_an_image_does_not_fill_are_padded():
    """The padding has tokens of its own, in regions of their own."""
    model = models.SwinTransformer(img_size=36, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4)
    model = models.randomized(model)
    _assert_equal_results(_enabled_copy(model), model, torch.randn(2, 3, 36, 36))


@pytest.mark.parametrize("name", [name for name in BUILDERS if "levit" not in name])
def test_layers_may_be_computed_again_for_their_gradients(name):
    """timm's own switch for activation checkpointing."""
    model = build(name)
    fast = _enabled_copy(model)
    inputs = images(model)
    for each in (model, fast):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout | torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        each.training = True
        fast.set_grad_checkpointing()
    _assert_equal_results(fast, model, inputs)


@pytest.mark.parametrize("name", ["swin", "swin_v2", "beit", "relpos, shared", "maxvit", "levit"])
def test_compiled_models_compute_the_same(name):
    """A model may be compiled before it is enabled, and afterwards."""
    model = build(name)
    inputs = images(model)
    fast = copy.deepcopy(model)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    for is_enabled in (False, True):
        if is_enabled:
            assert list(enable_offset_bias(compiled)) == ["_orig_mod"]
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["swin", "swin_v2", "beit", "relpos", "maxvit", "maxvit, channels last"])
def test_weights_are_dropped_in_training_only(name):
    """Dropping every weight leaves nothing of the values; timm's own attention does the same."""
    model = build(name)
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 1.0
    fast = _enabled_copy(model)
    inputs = images(model)
    attentions = [module for module in fast.modules() if isinstance(module, ReplacedAttention)]
    torch.testing.assert_close(fast(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    for module in (*attentions, *(x for x in model.modules() if hasattr(x, "attn_drop"))):
        module.training = True
        module.attn_drop.training = True
    assert not torch.allclose(fast(inputs), fast.eval()(inputs), rtol=1e-3, atol=1e-3)


def test_models_inside_of_other_modules_are_enabled_and_named():
    """The outermost class of timm gives the name."""
    held = torch.nn.ModuleDict({"image": build("swin"), "head": torch.nn.Linear(5, 2), "other": build("coatnet")})
    assert enable_offset_bias(held) == {"image": "SwinTransformer", "other": "MaxxVit"}
    disable_offset_bias(held["other"])
    assert not any(isinstance(module, Replacement) for module in held["other"].modules())
    disable_offset_bias(held)


REFUSED = {
    "no module": (lambda: object(), {}, TypeError, "`model` must be a module or hold one, got object"),
    "no bias": (
        lambda: timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2),
        {},
        ValueError,
        r"swin_transformer\.WindowAttention, .*got VisionTransformer with none",
    ),
    "enabled already": (lambda: _enabled_copy(build("beit")), {}, ValueError, "`model` must not be enabled already"),
    "no backend": (lambda: build("beit"), {"backend": "cuda"}, ValueError, "`backend` must be one of 'auto', .*'cuda'"),
}


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(make, options, error, message):
    """The error lists the attention classes that are served."""
    with pytest.raises(error, match=message):
        enable_offset_bias(make(), **options)
