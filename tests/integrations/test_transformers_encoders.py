"""MPNet and the models of images and sounds on this package equal their eager attention."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_cases import Case, transformers

BATCH, LENGTH = 3, 37


def _mpnet(is_padded: bool) -> Case:
    config = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 160,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": False,
    }
    length = LENGTH if is_padded else 150  # beyond the last bucket's distance
    mask = cases.padded(BATCH, length)

    def inputs() -> dict[str, torch.Tensor]:
        ids = cases.tokens(BATCH, length, 0)
        padding = {"attention_mask": mask} if is_padded else {}
        return {"input_ids": ids, **padding, "labels": ids.where(mask.bool(), -100)}

    return Case(
        "mpnet",
        lambda: cases.randomized(transformers.MPNetForMaskedLM, transformers.MPNetConfig(**config)),
        inputs,
        mask.bool,
    )


SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
BEIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}
# For each family the model, the configuration's class and arguments, and the height and width of its images.
VISION = {
    "swin": (transformers.SwinForImageClassification, transformers.SwinConfig, {**SWIN, "image_size": 32}, (32, 32)),
    "swin, images not of whole windows": (
        transformers.SwinForImageClassification,
        transformers.SwinConfig,
        {**SWIN, "image_size": 28},
        (28, 28),
    ),
    "swinv2": (
        transformers.Swinv2ForImageClassification,
        transformers.Swinv2Config,
        {**SWIN, "image_size": 32, "pretrained_window_sizes": [0, 0]},
        (32, 32),
    ),
    "donut-swin": (
        transformers.DonutSwinForImageClassification,
        transformers.DonutSwinConfig,
        {**SWIN, "image_size": 32},
        (32, 32),
    ),
    "beit, a bias per layer": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {**BEIT, "image_size": 20, "use_relative_position_bias": True},
        (20, 20),
    ),
    "beit, a shared bias": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {**BEIT, "image_size": 20, "use_shared_relative_position_bias": True},
        (20, 20),
    ),
    "beit, both, images not square": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {
            **BEIT,
            "image_size": (20, 28),
            "use_relative_position_bias": True,
            "use_shared_relative_position_bias": True,
        },
        (20, 28),
    ),
}

# The relatives of BEiT have the same configuration, and their attention exists twice.
for _implementation in ("eager", "sdpa"):
    for _name in [name for name in VISION if name.startswith("beit")]:
        _, _, _own, _size = VISION[_name]
        VISION[f"data2vec, {_implementation},{_name.partition(',')[2]}"] = (
            transformers.Data2VecVisionForImageClassification,
            transformers.Data2VecVisionConfig,
            {**_own, "attn_implementation": _implementation},
            _size,
        )


def _vision(name: str) -> Case:
    model_class, config_class, own, size = VISION[name]

    def inputs() -> dict[str, torch.Tensor]:
        pixels = torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(0), device="cpu")
        return {"pixel_values": pixels, "labels": torch.arange(BATCH)}

    def build() -> transformers.PreTrainedModel:
        config = {"num_labels": 5, **own}
        implementation = config.pop("attn_implementation", "eager")
        return cases.randomized(model_class, config_class(**config), implementation)

    return Case(name, build, inputs)


def _without_loss(name: str) -> Case:
    build, inputs = models.EVERY_TYPE[name]
    return Case(name, build, lambda: dict(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "long"])
def test_mpnets_loss_logits_and_every_gradient_equal_eager_attention(is_padded, dtype):
    """All layers share one table."""
    cases.assert_equals_eager(_mpnet(is_padded), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VISION)
def test_a_vision_models_loss_logits_and_every_gradient_equal_eager_attention(name, dtype):
    """The models have windows, shifted windows with regions, and a class token whose bias has numbers of its own."""
    cases.assert_equals_eager(_vision(name), dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("swin2sr", torch.float32),
        ("swin2sr", torch.bfloat16),
        ("maskformer-swin", torch.float32),  # older versions of it do not run in bfloat16
        ("clap_audio_model", torch.float32),
        ("clap_audio_model", torch.bfloat16),
    ],
    ids=str,
)
def test_a_model_without_a_loss_of_its_own_gives_the_same_output_and_gradients(name, dtype):
    """Swin2SR's output is an image, MaskFormer's backbone gives feature maps, CLAP encodes spectrograms."""
    cases.assert_equals_eager(_without_loss(name), dtype)


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit, a bias per layer"])
def test_gradient_checkpointing_changes_nothing(name):
    """Each layer is computed again for its gradient."""
    case = _vision(name)
    fast = cases.checkpointed(cases.enabled_copy(case.build()), use_reentrant=False)
    cases.assert_equals_eager(case, torch.float32, fast)
