"""BLOOM, MPT and Falcon with ALiBi on this package equal their own attention."""

import pytest
import torch
import transformers_cases as cases
from transformers_cases import Case, transformers

BATCH, LENGTH = 3, 37
SPECIAL = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "tie_word_embeddings": False}
BLOOM = {"n_layer": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
# Falcon has two implementations. This is the name of the implementation that adds ALiBi only once.
FAMILIES = {
    "bloom": (transformers.BloomForCausalLM, transformers.BloomConfig, {**BLOOM, "hidden_size": 32, "n_head": 4}),
    "bloom, 3 heads": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig,
        {**BLOOM, "hidden_size": 36, "n_head": 3},
    ),
    "mpt, 3 heads": (
        transformers.MptForCausalLM,
        transformers.MptConfig,
        {
            "d_model": 36,
            "n_layers": 2,
            "n_heads": 3,
            "max_seq_len": 64,
            "attn_config": {"attn_pdrop": 0, "clip_qkv": 1.0},
        },
    ),
    "falcon": (transformers.FalconForCausalLM, transformers.FalconConfig, {**FALCON, "multi_query": False}),
    "falcon, one key head": (transformers.FalconForCausalLM, transformers.FalconConfig, FALCON),
    "falcon, grouped heads": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
}


def _mask(padding: str) -> torch.Tensor | None:
    if padding == "none":
        return None
    mask = cases.padded(BATCH, LENGTH)
    if padding == "holes":
        mask[0, 5:9] = 0
        mask[1, 20] = 0
    return mask


def _case(family: str, padding: str) -> Case:
    model_class, config_class, own = FAMILIES[family]
    mask = _mask(padding)
    is_falcon = config_class is transformers.FalconConfig

    def inputs() -> dict[str, torch.Tensor]:
        ids = cases.tokens(BATCH, LENGTH, 0)
        if mask is None:
            return {"input_ids": ids, "labels": ids}
        # Predictions at padding tokens do not count.
        is_predicted = mask.bool() & torch.nn.functional.pad(mask, (1, 0))[:, :-1].bool()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(is_predicted, -100)}

    return Case(
        family,
        lambda: cases.randomized(model_class, config_class(**{**SPECIAL, **own}), "sdpa" if is_falcon else "eager"),
        inputs,
        None if mask is None else mask.bool,
        # BLOOM and MPT mask with float64's lowest number, which is -inf for their float32 softmax.
        torch.float64 if is_falcon or mask is None else torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["none", "ends", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_every_gradient_equal_the_models_own_attention(family, padding, dtype):
    """BLOOM and Falcon do not count padding between tokens as positions. MPT does."""
    cases.assert_equals_eager(_case(family, padding), dtype)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["bloom", "mpt, 3 heads", "falcon"])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    """Each layer is computed again for its gradient."""
    case = _case(family, "ends")
    fast = cases.checkpointed(cases.enabled_copy(case.build()), use_reentrant)
    cases.assert_equals_eager(case, torch.float32, fast)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_generated_tokens_equal_the_models_own_attention(family, options):
    """Prompts are padded on their left, or on their right, which leaves a hole.

    Falcon's own attention has no static cache.
    """
    if "static" in options.values() and family.startswith("falcon"):
        options = {}
    cases.assert_generates_as_eager(_case(family, "ends"), **options)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_static_cache_compiles_as_one_graph_after_padded_prompts(family):
    """Only the device knows the number of keys there. Padding leaves a hole in one sequence."""
    case = _case(family, "ends")
    model = cases.enabled_copy(case.build())
    inputs = {name: x[:, :9] for name, x in case.inputs().items() if name != "labels"}
    inputs["attention_mask"][2, 6:] = 0
    config = transformers.CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # on CPUs too
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_generated_in_bfloat16_are_those_of_exact_attention(family):
    """Tokens are left out where rounding decides between two."""
    cases.assert_bfloat16_generates_what_rounding_leaves_decided(_case(family, "none"))


def test_falcons_slopes_are_rounded_as_its_own_are():
    """Rounding to bfloat16 changes most slopes of 32 heads. The rounded slopes' multiples by 0, 1 and 2 are exact."""
    config = {**SPECIAL, **FALCON, "hidden_size": 64, "num_attention_heads": 32}
    model = cases.randomized(transformers.FalconForCausalLM, transformers.FalconConfig(**config), "sdpa")
    ids = cases.tokens(2, 3, 0)
    torch.testing.assert_close(cases.enabled_copy(model)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_mpts_positions_are_an_error_as_in_its_own_attention():
    """MPT makes a bias for max_seq_len positions."""
    model = cases.enabled_copy(_case("mpt, 3 heads", "none").build())
    with pytest.raises(ValueError, match=r"`max_seq_len` must be at least .* 65, got 64"):
        model(cases.tokens(1, 65, 0))
