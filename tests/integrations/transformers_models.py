"""One small model of each kind, for tests that need any."""

import torch
from transformers_cases import padded, randomized, tokens, transformers

T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
BLOOM = {
    "vocab_size": 60,
    "hidden_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
FALCON = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MPNET = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LONG = tokens(1, 256, 0)
BEIT = {
    "image_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2],
    "num_heads": [2],
    "window_size": 4,
    "drop_path_rate": 0.0,
}


def t5(**own: object) -> transformers.T5ForConditionalGeneration:
    """T5 of 2 + 2 layers."""
    return randomized(transformers.T5ForConditionalGeneration, transformers.T5Config(**{**T5, **own}))


def longt5(**own: object) -> transformers.LongT5ForConditionalGeneration:
    """LongT5."""
    config = transformers.LongT5Config(**{**T5, "local_radius": 20, **own})
    return randomized(transformers.LongT5ForConditionalGeneration, config)


def bloom() -> transformers.BloomForCausalLM:
    """BLOOM."""
    return randomized(transformers.BloomForCausalLM, transformers.BloomConfig(**BLOOM))


def falcon(implementation: str = "eager", **own: object) -> transformers.FalconForCausalLM:
    """Falcon."""
    return randomized(transformers.FalconForCausalLM, transformers.FalconConfig(**{**FALCON, **own}), implementation)


def mpnet() -> transformers.MPNetForMaskedLM:
    """MPNet."""
    config = transformers.MPNetConfig(**MPNET, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return randomized(transformers.MPNetForMaskedLM, config)


def mpt() -> transformers.MptForCausalLM:
    """MPT."""
    config = transformers.MptConfig(
        vocab_size=60, d_model=16, n_heads=2, n_layers=2, max_seq_len=256, attn_config={"attn_pdrop": 0}
    )
    return randomized(transformers.MptForCausalLM, config)


def beit(**own: object) -> transformers.BeitForImageClassification:
    """BEiT for images of 16 x 16 patches."""
    config = transformers.BeitConfig(**{**BEIT, "patch_size": 4, "use_relative_position_bias": True, **own})
    return randomized(transformers.BeitForImageClassification, config)


def swin() -> transformers.SwinForImageClassification:
    """Swin for images of 16 x 16 patches."""
    return randomized(transformers.SwinForImageClassification, transformers.SwinConfig(**SWIN))


def swinv2() -> transformers.Swinv2ForImageClassification:
    """Swin V2 for images of 16 x 16 patches."""
    config = transformers.Swinv2Config(**SWIN, pretrained_window_sizes=[0])
    return randomized(transformers.Swinv2ForImageClassification, config)


def donut_swin() -> transformers.DonutSwinForImageClassification:
    """Donut's encoder for images of 16 x 16 patches."""
    return randomized(transformers.DonutSwinForImageClassification, transformers.DonutSwinConfig(**SWIN))


def maskformer_swin() -> transformers.PreTrainedModel:
    """MaskFormer's backbone for images of 16 x 16 patches."""
    from transformers.models.maskformer.configuration_maskformer_swin import MaskFormerSwinConfig

    return randomized(transformers.MaskFormerSwinBackbone, MaskFormerSwinConfig(**SWIN))


def swin2sr() -> transformers.Swin2SRForImageSuperResolution:
    """Swin2SR for images of 64 x 64 pixels."""
    config = transformers.Swin2SRConfig(**{**SWIN, "patch_size": 1, "image_size": 16, "window_size": 4})
    return randomized(transformers.Swin2SRForImageSuperResolution, config)


def clap_audio(**own: object) -> transformers.ClapAudioModelWithProjection:
    """CLAP's audio encoder for spectrograms of 16 x 16 patches."""
    sizes = {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "depths": [2], "window_size": 4}
    heads = {"num_attention_heads": [2], "hidden_size": 8, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0}
    config = transformers.ClapAudioConfig(**{**sizes, **heads, **own})
    return randomized(transformers.ClapAudioModelWithProjection, config)


def data2vec_vision(implementation: str = "eager", **own: object) -> transformers.Data2VecVisionForImageClassification:
    """Data2Vec for images of 16 x 16 patches."""
    config = {**BEIT, "patch_size": 4, "use_relative_position_bias": True, **own}
    built = transformers.Data2VecVisionConfig(**config)
    return randomized(transformers.Data2VecVisionForImageClassification, built, implementation)


def t5_inputs() -> dict[str, torch.Tensor]:
    """Inputs of T5: 3 sequences, the first whole, the second padded on its left, the third on its right."""
    return {"input_ids": tokens(3, 30, 0), "attention_mask": padded(3, 30), "labels": tokens(3, 20, 1)}


def _relative_of_t5(name: str, **own: object) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**T5, **own})
    return randomized(getattr(transformers, f"{name}ForConditionalGeneration"), config)


_SWITCH = {"num_experts": 2, "num_sparse_encoder_layers": 1, "router_jitter_noise": 0.0, "expert_capacity": 200}
_TEXT_PAIR = {"input_ids": tokens(2, 13, 0), "decoder_input_ids": tokens(2, 7, 1)}
_TEXT = {"input_ids": tokens(2, 13, 0)}
_IMAGES = {"pixel_values": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), device="cpu")}
SPECTROGRAMS = {"input_features": torch.rand(2, 1, 256, 16, generator=torch.Generator().manual_seed(0), device="cpu")}
# One model of each served type, and the inputs of its call.

SPEECH = {
    "vocab_size": 20,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "pad_token_id": 0,
}


def wavlm(**own: object) -> transformers.WavLMForCTC:
    """WavLM, whose distances from 16 on share a bucket."""
    config = transformers.WavLMConfig(**{**SPEECH, "num_buckets": 16, "max_bucket_distance": 16, **own})
    return randomized(transformers.WavLMForCTC, config)


def wav2vec2_conformer(**own: object) -> transformers.Wav2Vec2ConformerForCTC:
    """wav2vec2-conformer with relative positions."""
    config = transformers.Wav2Vec2ConformerConfig(**{**SPEECH, "conv_depthwise_kernel_size": 5, **own})
    return randomized(transformers.Wav2Vec2ConformerForCTC, config)


def wav2vec2_bert(**own: object) -> transformers.Wav2Vec2BertForCTC:
    """w2v-BERT with relative keys up to 12 to the left and 3 to the right."""
    names = ("conv_dim", "conv_kernel", "conv_stride", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups")
    config = {name: x for name, x in SPEECH.items() if name not in names}
    config |= {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5, "max_source_positions": 64}
    config |= {"left_max_position_embeddings": 12, "right_max_position_embeddings": 3, "conformer_conv_dropout": 0.0}
    return randomized(transformers.Wav2Vec2BertForCTC, transformers.Wav2Vec2BertConfig(**{**config, **own}))


INKLING = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 6,
    "d_rel": 3,
    "rel_extent": 10,
    "log_scaling_n_floor": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,  # all are taken: rounding decides about no expert
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "pad_token_id": 0,
    "num_mtp_layers": 0,
}


def inkling() -> "transformers.InklingForCausalLM":
    """Inkling's text model: windows of 6 keys and whole layers, profiles of 10 distances."""
    return randomized(transformers.InklingForCausalLM, transformers.InklingTextConfig(**INKLING))


WAVES = {
    "input_values": torch.sin(torch.arange(480.0, device="cpu") ** 1.3).view(2, 240).to(torch.get_default_device())
}
FRAMES = {"input_features": WAVES["input_values"].view(2, 15, 16)}

EVERY_TYPE = {
    "t5": (t5, _TEXT_PAIR),
    "mt5": (lambda: _relative_of_t5("MT5"), _TEXT_PAIR),
    "umt5": (lambda: _relative_of_t5("UMT5"), _TEXT_PAIR),
    "longt5": (longt5, _TEXT_PAIR),
    "switch_transformers": (lambda: _relative_of_t5("SwitchTransformers", **_SWITCH), _TEXT_PAIR),
    "pop2piano": (
        lambda: _relative_of_t5("Pop2Piano"),
        {"inputs_embeds": torch.ones(2, 13, 16), "decoder_input_ids": tokens(2, 7, 1)},
    ),
    "mpnet": (mpnet, _TEXT),
    "bloom": (bloom, _TEXT),
    "falcon": (lambda: falcon("sdpa", alibi=True), _TEXT),
    "mpt": (mpt, _TEXT),
    "swin": (swin, _IMAGES),
    "swinv2": (swinv2, _IMAGES),
    "swin2sr": (swin2sr, {"pixel_values": 5 * _IMAGES["pixel_values"][..., :16, :16]}),
    "donut-swin": (donut_swin, _IMAGES),
    "maskformer-swin": (maskformer_swin, _IMAGES),
    "clap_audio_model": (clap_audio, SPECTROGRAMS),
    "beit": (beit, _IMAGES),
    "data2vec-vision": (data2vec_vision, _IMAGES),
    "wavlm": (wavlm, WAVES),
    "wav2vec2-conformer": (wav2vec2_conformer, WAVES),
    "wav2vec2-bert": (wav2vec2_bert, FRAMES),
}
# Types that are served, and that an old transformers does not have.
ABSENT = set() if hasattr(transformers, "InklingTextConfig") else {"inkling_text"}
if not ABSENT:
    EVERY_TYPE["inkling_text"] = (inkling, _TEXT)
