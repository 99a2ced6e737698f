"""Speech models whose bias has a factor from the query equal their eager attention."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_cases import Case

from triton_offset_bias.integrations.transformers import enable_offset_bias

# WavLM's own attention hands masks of two types to torch.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
BATCH, FRAMES = 3, 57
LENGTHS = (57, 40, 13)  # of the sequences that are padded
MODELS = {
    "wavlm": models.wavlm,
    "wavlm, norms before": lambda: models.wavlm(do_stable_layer_norm=True, feat_extract_norm="layer"),
    "wav2vec2-conformer": models.wav2vec2_conformer,
    "w2v-BERT, relative keys": models.wav2vec2_bert,
    "w2v-BERT, relative": lambda: models.wav2vec2_bert(position_embeddings_type="relative"),
    "w2v-BERT, an adapter": lambda: models.wav2vec2_bert(add_adapter=True, num_adapter_layers=1),
}


def _case(name: str, is_padded: bool) -> Case:
    generator = torch.Generator("cpu").manual_seed(0)

    def inputs() -> dict[str, torch.Tensor]:
        generator.manual_seed(0)
        if name.startswith("w2v"):
            sound, samples = {"input_features": torch.randn(BATCH, FRAMES, 16, generator=generator, device="cpu")}, 1
        else:  # two convolutions with a stride of 2
            length = 4 * FRAMES + 6
            sound, samples = {"input_values": torch.randn(BATCH, length, generator=generator, device="cpu")}, 4
        if not is_padded:
            return sound
        longest = next(iter(sound.values())).shape[1]
        kept = torch.tensor([[min(samples * n + 6, longest) if samples > 1 else n] for n in LENGTHS], device="cpu")
        return {**sound, "attention_mask": (torch.arange(longest, device="cpu") < kept).long()}

    counted = None
    if is_padded and "adapter" not in name:

        def counted() -> torch.Tensor:
            return torch.arange(FRAMES, device="cpu") < torch.tensor([[n] for n in LENGTHS], device="cpu")

    return Case(name, MODELS[name], inputs, counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_eager_attention(name, is_padded, dtype):
    """Gates, tables, projections of positions and the vectors u and v have gradients too."""
    case = _case(name, is_padded)
    cases.assert_equals_eager(case, dtype)
    names = [n for n, _ in case.build().named_parameters()]
    assert any(part in n for n in names for part in ("rel_attn_embed", "linear_pos", "distance_embedding"))


def test_rotary_embeddings_are_refused_by_name():
    """They are no bias."""
    model = models.wav2vec2_conformer(position_embeddings_type="rotary")
    with pytest.raises(
        NotImplementedError, match=r"wav2vec2-conformer is not served with .*'rotary', which is no bias"
    ):
        enable_offset_bias(model)


def test_attention_weights_are_refused_by_name():
    """They are never stored."""
    model = models.wavlm()
    enable_offset_bias(model)
    with pytest.raises(NotImplementedError, match="`output_attentions` must be False"):
        model(**models.WAVES, output_attentions=True)
