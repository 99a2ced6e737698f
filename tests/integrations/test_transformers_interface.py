"""`attn_implementation="offset_bias"` attends as eager attention does; sequences may be packed or padded."""

import copy
import inspect

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_cases import Case, transformers

from triton_offset_bias.integrations.transformers import disable_offset_bias, enable_offset_bias
from triton_offset_bias.integrations.transformers.interface import attend_through_interface

LLAMA = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def _llama(**own: object) -> transformers.LlamaForCausalLM:
    return cases.randomized(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**LLAMA, **own}))


def _bert() -> transformers.BertForMaskedLM:
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return cases.randomized(transformers.BertForMaskedLM, transformers.BertConfig(**config, **dropout, vocab_size=60))


def _mask() -> torch.Tensor:
    """Padding behind the tokens. In float64, Llama's own attention gives NaN to a query that has no key."""
    return (torch.arange(30) < torch.tensor([30, 11, 25])[:, None]).long()


def _masked_inputs() -> dict[str, torch.Tensor]:
    ids, mask = cases.tokens(3, 30, 0), _mask()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def _relative(name: str) -> transformers.PreTrainedModel:
    return models.EVERY_TYPE[name][0]()


TYPES = {
    "t5": Case("t5", models.t5, models.t5_inputs),
    "mt5": Case("mt5", lambda: _relative("mt5"), models.t5_inputs),
    "umt5": Case("umt5", lambda: _relative("umt5"), models.t5_inputs),
    "switch_transformers": Case("switch_transformers", lambda: _relative("switch_transformers"), models.t5_inputs),
    "llama": Case("llama", _llama, _masked_inputs, lambda: _mask().bool()),
    "bert": Case("bert", _bert, _masked_inputs, lambda: _mask().bool()),
}


def _loaded(model: transformers.PreTrainedModel, folder: str) -> transformers.PreTrainedModel:
    """The model, saved and loaded with this package's attention."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="offset_bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_a_loaded_model_gives_the_loss_logits_and_gradients_of_eager_attention(name, dtype, tmp_path):
    """T5's relatives bring a dense bias, of which the table is read. Llama and BERT have none."""
    fast = _loaded(TYPES[name].build(), str(tmp_path)).eval()
    cases.assert_equals_eager(TYPES[name], dtype, fast)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["t5", "umt5", "llama"])
def test_a_loaded_model_generates_the_tokens_of_eager_attention(name, cache, tmp_path):
    """The cache holds keys before the queries, and a static one also places for later keys."""
    eager = TYPES[name].build()
    fast = _loaded(eager, str(tmp_path)).eval()
    inputs = {key: x[:, :20] for key, x in TYPES[name].inputs().items() if key != "labels"}
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    tokens = [model.generate(**inputs, **options) for model in (eager, fast)]
    assert torch.equal(*tokens)


def test_a_loaded_model_may_be_enabled_and_disabled(tmp_path):
    """Enabled, it makes no dense bias; disabled, it attends through the interface again."""
    fast = _loaded(models.t5(), str(tmp_path)).eval()
    inputs = models.t5_inputs()
    expected = fast(**inputs).logits
    enable_offset_bias(fast)
    torch.testing.assert_close(fast(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    disable_offset_bias(fast)
    assert torch.equal(fast(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["mpnet", "bloom", "mpt", "falcon"])
def test_a_model_that_does_not_read_the_interface_refuses_at_its_first_call(name):
    """Its own attention would misunderstand the mask."""
    model = _relative(name)
    model.config._attn_implementation = "offset_bias"
    with pytest.raises(NotImplementedError, match=f"models of type '{name}' do not read attn_implementation"):
        model(input_ids=cases.tokens(2, 8, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 30.0}, NotImplementedError, "`softcap` must be None"),
        ({"s_aux": torch.zeros(2)}, NotImplementedError, "`s_aux` must be None"),
        ({"output_attentions": True}, NotImplementedError, "`output_attentions` must be False"),
        ({"position_bias": torch.randn(1, 2, 5, 5)}, ValueError, "must depend on the offset alone"),
        ({"position_bias": torch.zeros(3, 2, 5, 5)}, ValueError, r"shape \(3, 2, 5, 5\)"),
    ],
)
def test_what_the_function_does_not_compute_is_refused(options, error, message):
    """Nothing that changes the scores is ignored."""
    x = torch.randn(3, 2, 5, 8)
    module = torch.nn.Module()
    module.is_causal = False
    with pytest.raises(error, match=message):
        attend_through_interface(module, x, x, x, None, scaling=1.0, **options)


def _packed(build, lengths: tuple[tuple[int, ...], ...]) -> tuple[Case, list[torch.Tensor]]:
    """A model's inputs with packed sequences of these lengths in each row, and the sequences one by one."""
    ids = cases.tokens(len(lengths), sum(lengths[0]), 0)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}

    def without_cache() -> transformers.PreTrainedModel:  # with one, transformers does not look for packed sequences
        model = build()
        model.config.use_cache = False
        return model

    case = Case("packed", without_cache, lambda: inputs)
    return case, [part[None] for row, each in zip(ids, lengths, strict=True) for part in row.split(each)]


PACKED = {"llama": lambda: _llama(attention_bias=True)}
if "position_ids=position_ids,\n            # Always" in inspect.getsource(transformers.FalconModel.forward):
    PACKED["falcon"] = lambda: models.falcon("sdpa", alibi=True, new_decoder_architecture=False)  # older: not packed


@pytest.mark.parametrize("lengths", [((5, 9, 1, 7),), ((3, 19), (22,), (10, 12))], ids=["one row", "rows"])
@pytest.mark.parametrize("name", PACKED)
def test_sequences_that_position_ids_pack_do_not_see_each_other(name, lengths):
    """Packed, they have the logits that they have one by one, and gradients flow as in the model's own attention."""
    case, sequences = _packed(PACKED[name], lengths)
    own = case.build()
    fast = copy.deepcopy(own)
    if name == "llama":
        fast.set_attn_implementation("offset_bias")
    else:
        enable_offset_bias(fast)
    packed = {key: x for key, x in case.inputs().items() if key != "labels"}
    logits = fast(**packed).logits.flatten(0, 1)
    expected = torch.cat([fast(input_ids=sequence).logits[0] for sequence in sequences])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    got, wanted = cases.results_of(fast, case), cases.results_of(own, case)
    for key, x in wanted.items():
        torch.testing.assert_close(got[key], x, rtol=1e-3, atol=1e-4 * float(x.abs().max().clamp(min=1.0)), msg=key)
