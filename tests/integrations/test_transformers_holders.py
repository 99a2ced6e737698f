"""`enable_offset_bias` finds the models that another object holds, and says which it enabled."""

import copy

import pytest
import torch
import transformers_models as models
from bare import skip_without
from texts import TEXTS, tokenizer
from transformers_models import transformers

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.transformers import disable_offset_bias, enable_offset_bias


class Holder:
    """An object that is no module, and holds what it is given as attributes."""

    def __init__(self, **parts: object) -> None:
        self.__dict__.update(parts)


def _is_enabled(model: torch.nn.Module) -> bool:
    return any(isinstance(module, ReplacedAttention) for module in model.modules())


def _upernet() -> transformers.UperNetForSemanticSegmentation:
    """A segmentation model, which is not served itself, with Swin as its backbone."""
    backbone = transformers.SwinConfig(**models.SWIN, out_features=["stage1"])
    config = transformers.UperNetConfig(backbone_config=backbone, use_auxiliary_head=False, hidden_size=8)
    return models.randomized(transformers.UperNetForSemanticSegmentation, config)


HOLDERS = {
    "a model": (models.t5, {"": "t5"}),
    "a module": (lambda: torch.nn.ModuleList([torch.nn.Linear(2, 2), models.mpnet()]), {"1": "mpnet"}),
    "two models": (
        lambda: torch.nn.ModuleDict({"text": models.t5(), "image": models.swin()}),
        {"text": "t5", "image": "swin"},
    ),
    "a backbone": (_upernet, {"backbone": "swin"}),
    "attributes": (lambda: Holder(model=models.bloom(), steps=3), {"model": "bloom"}),
    "components": (
        lambda: Holder(components={"encoder": models.mpnet(), "steps": 3}, other=models.t5()),
        {"encoder": "mpnet"},
    ),
    "twice the same": (lambda: Holder(**dict.fromkeys(("first", "second"), models.mpnet())), {"first": "mpnet"}),
    "compiled": (lambda: torch.compile(models.mpnet(), backend="eager"), {"_orig_mod": "mpnet"}),
}


@pytest.mark.parametrize(("build", "expected"), HOLDERS.values(), ids=HOLDERS)
def test_all_served_models_are_enabled_and_named_and_disabled_again(build, expected):
    """A part of a model, such as T5's encoder, is not named on its own."""
    held = build()
    parts = held.components if hasattr(held, "components") else vars(held)
    modules = [held] if isinstance(held, torch.nn.Module) else [x for x in parts.values() if hasattr(x, "modules")]
    assert enable_offset_bias(held) == expected
    assert all(_is_enabled(module) for module in modules)
    disable_offset_bias(held)
    assert not any(isinstance(x, Replacement) for module in modules for x in module.modules())
    with pytest.raises(ValueError, match="`model` must be one that"):
        disable_offset_bias(held)


def test_a_segmentation_model_with_a_swin_backbone_computes_the_same():
    """The backbone has a configuration of its own. Swin pads the windows of an image that they do not fill."""
    own = _upernet()
    fast = copy.deepcopy(own)
    enable_offset_bias(fast)
    images = torch.randn(2, 3, 72, 56)
    expected, got = own(images).logits, fast(images).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    expected.square().mean().backward()
    got.square().mean().backward()
    for (name, x), y in zip(own.named_parameters(), fast.parameters(), strict=True):
        if x.grad is not None:
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_nothing_is_changed_if_one_of_several_models_cannot_be_served():
    """The error comes before the first model is touched, and names the place in the holder."""
    held = torch.nn.ModuleDict({"first": models.t5(), "second": models.bloom()})
    attention = held["second"].transformer.h[1].self_attention
    attention.forward = eval("lambda *args, **kwargs: type(me).forward(me, *args, **kwargs)", {"me": attention})
    with pytest.raises(NotImplementedError, match=r"'second\.transformer\.h\.1\.self_attention'"):
        enable_offset_bias(held)
    assert not any(isinstance(module, Replacement) for module in held.modules())


def test_a_pipeline_of_transformers_is_served():
    """The pipeline is no module."""
    model = models.randomized(transformers.MPNetModel, transformers.MPNetConfig(**{**models.MPNET, "vocab_size": 200}))
    pipeline = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer(), device="cpu")
    expected = pipeline(list(TEXTS))
    assert enable_offset_bias(pipeline) == {"model": "mpnet"}
    for got, wanted in zip(pipeline(list(TEXTS)), expected, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert _is_enabled(model)


@skip_without("peft")
@pytest.mark.parametrize("is_first", [True, False], ids=["adapters first", "enabled first"])
def test_low_rank_adapters_are_trained_as_by_the_models_own_attention(is_first):
    """PEFT puts its own modules in the place of projections."""
    import peft

    config = peft.LoraConfig(target_modules=["q", "v"], r=2, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model, inputs = models.t5(), models.t5_inputs()
    fast = copy.deepcopy(model)
    if not is_first:
        enable_offset_bias(fast)
    own, fast = (torch.manual_seed(1) and peft.get_peft_model(x, config) for x in (model, fast))
    if is_first:
        assert enable_offset_bias(fast) == {"base_model.model": "t5"}
    for each in (own, fast):
        each(**inputs).loss.backward()
    gradients = {name: x.grad for name, x in own.named_parameters() if x.grad is not None}
    assert any("lora" in name for name in gradients)
    for name, x in fast.named_parameters():
        if name in gradients:
            torch.testing.assert_close(x.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    assert _is_enabled(fast)
    disable_offset_bias(fast)
    torch.testing.assert_close(fast(**inputs).logits, own(**inputs).logits, rtol=1e-5, atol=1e-5)


@skip_without("diffusers")
def test_the_text_encoder_of_a_diffusers_pipeline_is_served():
    """A pipeline is no module, and names its parts in `components`."""
    import diffusers

    config = transformers.T5Config(**{**models.T5, "vocab_size": 200})
    encoder = models.randomized(transformers.T5EncoderModel, config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"scheduler": scheduler, "text_encoder": encoder, "tokenizer": tokenizer()}
    pipeline = diffusers.LTXPipeline(**parts, vae=None, transformer=None)
    prompts = {"prompt": list(TEXTS), "do_classifier_free_guidance": False, "device": "cpu", "max_sequence_length": 32}
    expected, mask, *_ = pipeline.encode_prompt(**prompts)
    assert enable_offset_bias(pipeline) == {"text_encoder": "t5"}
    got, *_ = pipeline.encode_prompt(**prompts)
    assert _is_enabled(encoder)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    disable_offset_bias(pipeline)
    assert torch.equal(pipeline.encode_prompt(**prompts)[0], expected)


@skip_without("chronos")
def test_a_chronos_bolt_pipeline_forecasts_the_same():
    """The model of the forecasts is a T5 that transformers does not know. Missing values are padding."""
    import chronos
    from chronos.chronos_bolt import ChronosBoltModelForForecasting

    config = transformers.T5Config(**{**models.T5, "vocab_size": 2, "feed_forward_proj": "relu", "pad_token_id": 0})
    lengths = {"context_length": 64, "prediction_length": 8, "input_patch_size": 8, "input_patch_stride": 8}
    config.chronos_config = {**lengths, "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True}
    model = models.randomized(ChronosBoltModelForForecasting, config)
    pipeline = chronos.ChronosBoltPipeline(model)
    series = torch.randn(3, 50, device="cpu").cumsum(-1)
    series[1, :20] = float("nan")
    expected = pipeline.predict(series, prediction_length=8)
    assert enable_offset_bias(pipeline) == {"inner_model": "t5"}
    assert _is_enabled(model)
    torch.testing.assert_close(pipeline.predict(series, prediction_length=8), expected, rtol=1e-4, atol=1e-4)
    disable_offset_bias(pipeline)
    assert torch.equal(pipeline.predict(series, prediction_length=8), expected)
