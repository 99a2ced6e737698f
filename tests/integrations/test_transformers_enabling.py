"""`enable_offset_bias`: what it leaves unchanged, and which models it refuses."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_cases import transformers
from transformers_models import LONG

from triton_offset_bias.integrations.transformers import SERVED, disable_offset_bias, enable_offset_bias


def test_disabling_gives_the_model_its_own_attention_back():
    """Classes, attributes, configuration and bits of the output are the same. Parameters were never touched."""
    model = models.t5()
    inputs = models.t5_inputs()
    logits = model(**inputs).logits
    pointers = {name: x.data_ptr() for name, x in model.state_dict().items()}
    attributes = [(type(module), set(vars(module))) for module in model.modules()]
    enable_offset_bias(model)
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == pointers
    assert not torch.equal(model(**inputs).logits, logits)
    disable_offset_bias(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == attributes
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_an_enabled_model_are_enabled(copied):
    """A copy can be disabled without the original."""
    model = models.t5()
    inputs = models.t5_inputs()
    fast = cases.enabled_copy(model)
    twin = copied(fast)
    assert torch.equal(twin(**inputs).logits, fast(**inputs).logits)
    disable_offset_bias(twin)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="`model` must be one that"):
        disable_offset_bias(twin)


def test_a_saved_model_knows_nothing_of_this_package(tmp_path):
    """It loads like any other model."""
    fast = models.bloom()
    enable_offset_bias(fast)
    fast.save_pretrained(tmp_path)
    assert "offset_bias" not in (tmp_path / "config.json").read_text()
    model = transformers.BloomForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(model(LONG).logits, fast(LONG).logits, rtol=1e-4, atol=1e-4)


def test_models_that_share_a_configuration_are_not_affected():
    """A configuration names the implementation of attention."""
    model = models.bloom()
    enable_offset_bias(transformers.BloomForCausalLM(model.config))
    assert model.config._attn_implementation == "eager"


def _with_attentions(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    model.config.output_attentions = True
    return model


def _enabled(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    enable_offset_bias(model)
    return model


def _bert() -> transformers.BertModel:
    return transformers.BertModel(transformers.BertConfig(**models.MPNET))


REFUSED_MODELS = {
    "no model": (
        lambda: torch.nn.Linear(2, 2),
        TypeError,
        "`model` must be a transformers.PreTrainedModel or hold one, got Linear that holds none",
    ),
    "another type": (_bert, ValueError, rf"`model` .*{', '.join(SERVED)}\), got 'bert'"),
    "enabled already": (lambda: _enabled(models.t5()), ValueError, "`model` must not be enabled already"),
    "attention weights": (
        lambda: _with_attentions(models.t5()),
        ValueError,
        "`model.config.output_attentions` .*False",
    ),
    "global tokens": (
        lambda: models.longt5(encoder_attention_type="transient-global"),
        NotImplementedError,
        "longt5 is not served with encoder_attention_type='transient-global'",
    ),
    "rotary positions": (
        lambda: models.falcon(alibi=False),
        NotImplementedError,
        "falcon is not served with alibi=False",
    ),
    "no bias": (
        lambda: models.beit(use_relative_position_bias=False),
        NotImplementedError,
        "beit is not served with use_relative_position_bias=False",
    ),
}


@pytest.mark.parametrize(("build", "error", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_a_model_that_is_not_served_is_refused_with_the_reason(build, error, message):
    """For a model of an unknown type, the error lists the types that are served."""
    model = build()
    with pytest.raises(error, match=message):
        enable_offset_bias(model)


def test_an_unknown_backend_is_refused_before_anything_is_changed():
    """The message lists the backends that exist."""
    model = models.t5()
    with pytest.raises(ValueError, match=r"`backend` must be one of 'auto', .*, got 'cuda'"):
        enable_offset_bias(model, "cuda")
    assert model.config._attn_implementation == "eager"


def test_the_package_never_imports_transformers_by_itself():
    """Users import the integration by its own name."""
    code = (
        "import sys, triton_offset_bias.modules, triton_offset_bias.integrations; print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_model_built_from_an_enabled_ones_configuration_is_an_error_not_a_wrong_answer():
    """This holds even if transformers knows the name, because a T5 was enabled in the process."""
    t5, mpt = models.t5(), models.mpt()
    enable_offset_bias(t5)
    enable_offset_bias(mpt)
    with pytest.raises(ValueError, match="offset_bias"):
        type(mpt)(mpt.config)
    stranger = type(t5)(t5.config)
    with pytest.raises(TypeError, match=r"`config` must not come from a model .*attn_implementation='eager'"):
        stranger(**models.t5_inputs())


def test_another_implementation_chosen_while_enabled_is_an_error_that_says_what_to_call():
    """The chosen attention would get a table where it expects a dense bias."""
    model = models.t5()
    enable_offset_bias(model)
    for module in model.modules():  # what set_attn_implementation does in transformers 5.24, and in part in 5.15
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="until disable_offset_bias"):
        model(**models.t5_inputs())
