"""T5, mT5, UMT5, LongT5, Switch Transformers and Pop2Piano on this package equal their eager attention."""

import pytest
import torch
import transformers_cases as cases
from transformers_cases import Case, transformers

BATCH, LENGTH, TARGET = 3, 37, 21
SMALL = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, {}),
    "mt5": (transformers.MT5ForConditionalGeneration, transformers.MT5Config, {}),
    "umt5": (transformers.UMT5ForConditionalGeneration, transformers.UMT5Config, {}),
    "longt5": (transformers.LongT5ForConditionalGeneration, transformers.LongT5Config, {"local_radius": 5}),
    "switch": (
        transformers.SwitchTransformersForConditionalGeneration,
        transformers.SwitchTransformersConfig,
        {"num_experts": 2, "num_sparse_encoder_layers": 1, "router_jitter_noise": 0.0, "expert_capacity": 200},
    ),
    "pop2piano": (transformers.Pop2PianoForConditionalGeneration, transformers.Pop2PianoConfig, {}),
}
# Pop2Piano generates from audio alone; Switch Transformers fails with a cache, whatever its attention.
GENERATING = [name for name in FAMILIES if name not in ("pop2piano", "switch")]


def _case(family: str, is_padded: bool = True) -> Case:
    model_class, config_class, own = FAMILIES[family]

    def inputs() -> dict[str, torch.Tensor]:
        source = {"input_ids": cases.tokens(BATCH, LENGTH, 0)}
        if family == "pop2piano":  # it takes spectrograms
            source = {
                "inputs_embeds": torch.randn(
                    BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(0), device="cpu"
                )
            }
        mask = {"attention_mask": cases.padded(BATCH, LENGTH)} if is_padded else {}
        return {**source, **mask, "labels": cases.tokens(BATCH, TARGET, 1)}

    return Case(family, lambda: cases.randomized(model_class, config_class(**{**SMALL, **own})), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_every_gradient_equal_eager_attention(family, is_padded, dtype):
    """The models have encoder, causal decoder and cross-attention. The buckets' gradients sum over all pairs."""
    cases.assert_equals_eager(_case(family, is_padded), dtype)


@pytest.mark.parametrize(
    ("family", "use_reentrant"), [*((name, False) for name in FAMILIES), *((name, True) for name in GENERATING)]
)
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    """The table passes from layer to layer through checkpoints, and so does its gradient."""
    case = _case(family)
    fast = cases.checkpointed(cases.enabled_copy(case.build()), use_reentrant)
    cases.assert_equals_eager(case, torch.float32, fast)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("family", GENERATING)
def test_the_generated_tokens_equal_eager_attention(family, options):
    """Search is greedy or by beams. The cache grows, is static, or is absent."""
    cases.assert_generates_as_eager(_case(family), **options)


@pytest.mark.parametrize("family", GENERATING)
def test_the_tokens_generated_in_bfloat16_are_those_of_exact_attention(family):
    """Tokens are left out where rounding decides between two."""
    cases.assert_bfloat16_generates_what_rounding_leaves_decided(_case(family))
