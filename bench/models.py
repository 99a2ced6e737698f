"""The suite `models`: whole models with this package's attention beside the same models with their own.

A model has layers of base size and random weights. Attention is a part of a model's time, so these ratios are smaller
than those of attention alone. Forward is inference, forward+backward a training step without dropout. The case
`sentences` is `SentenceTransformer.encode` with all layers of all-mpnet-base-v2.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.case import FORWARD, ModelCase
from bench.provider import AbsentError
from bench.steps import Step
from bench.torchvision_operators import declare_operators_of_torchvision

declare_operators_of_torchvision()  # timm and transformers import torchvision where it is installed
NUM_LAYERS = 2
ALL_LAYERS = 12  # of a model of base size
# Largest error of an output or gradient, as a fraction of the largest number or of 1 if that is larger. T5 has sharp
# softmaxes, in which rounding grows.
TOLERANCE = 2e-2
VOCABULARY = 2000
# What a model attends by. The names are the suite's providers.
ATTENTIONS = {
    "ours": "This package.",
    "own_eager": "The model's own attention, written out.",
    "own_sdpa": "The model's own attention by SDPA with a dense bias.",
}


@dataclass(frozen=True)
class Subject:
    """A kind of model.

    Attributes:
        build: makes the model that attends by one of `ATTENTIONS`, float32.
        run: (model, inputs) to the output.
        inputs: makes the inputs of a case.
        is_trainable: whether the suite trains it.
    """

    build: Callable[[str], nn.Module]
    run: Callable[[Any, Any], Tensor]
    inputs: Callable[[ModelCase], Any]
    is_trainable: bool = True


def model_steps(case: ModelCase, attentions: tuple[str, ...], modes: tuple[str, ...]) -> dict[str, dict[str, Step]]:
    """The step of each mode by each attention that the model has, `steps[mode][attention]`.

    Outputs and gradients are compared before, in float32: in bfloat16 a table's gradient is mostly rounding. Attentions
    that are absent are left out, with a line that says why.

    Raises:
        ArithmeticError: the results with this package's attention are not those with the model's own.
    """
    subject, dtype = MODELS[case.model], getattr(torch, case.dtype)
    models: dict[str, nn.Module] = {}
    for name in attentions:
        try:
            torch.manual_seed(0)
            models[name] = subject.build(name).eval()
        except (AbsentError, ImportError) as error:
            tqdm.write(f"models {case.name}: {name} is absent: {error}")
    _check(subject, models, subject.inputs(replace(case, dtype="float32")), TOLERANCE)
    inputs = subject.inputs(case)
    return {
        mode: {name: _step(subject, model.to(dtype), inputs, mode) for name, model in models.items()}
        for mode in modes
        if mode == FORWARD or subject.is_trainable
    }


def _step(subject: Subject, model: nn.Module, inputs: Any, mode: str) -> Step:
    def infer(_: object) -> Tensor:
        with torch.inference_mode():
            return subject.run(model, inputs)

    def train(_: object) -> None:
        out = subject.run(model, inputs)
        out.backward(torch.ones_like(out))

    return Step(infer) if mode == FORWARD else Step(train, before=lambda: model.zero_grad(set_to_none=True))


def _check(subject: Subject, models: dict[str, nn.Module], inputs: Any, tolerance: float) -> None:
    results = {}
    for name, model in models.items():
        out = subject.run(model, inputs)
        results[name] = [out.detach()]
        if subject.is_trainable:
            out.backward(torch.ones_like(out))
            results[name] += [x.grad for x in model.parameters() if x.grad is not None]
    own = next((name for name in models if name != "ours"), None)
    if own is None or "ours" not in models:
        return
    for got, expected in zip(results["ours"], results[own], strict=True):
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not error <= tolerance:
            raise ArithmeticError(f"a result differs from the model's own by {error:.1e} (shape {tuple(got.shape)})")


def _enabled(model: nn.Module, attention: str) -> nn.Module:
    if attention == "ours":
        from triton_offset_bias.integrations.transformers import enable_offset_bias

        enable_offset_bias(model)
    return model


def _mpnet(attention: str, num_layers: int = NUM_LAYERS) -> nn.Module:
    import transformers

    if attention == "own_sdpa":
        raise AbsentError("MPNet has eager attention only")
    config = transformers.MPNetConfig(
        num_hidden_layers=num_layers,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _enabled(transformers.MPNetModel(config, add_pooling_layer=False), attention)


def _t5_encoder(attention: str) -> nn.Module:
    import transformers

    sizes = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": NUM_LAYERS, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, dropout_rate=0.0)
    config._attn_implementation = "sdpa" if attention == "own_sdpa" else "eager"
    return _enabled(transformers.T5EncoderModel(config), attention)


def _timm(name: str) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import timm

        from triton_offset_bias.integrations.timm import enable_offset_bias

        model = timm.create_model(name, drop_path_rate=0.0)
        attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
        if attention == "own_sdpa" and not attentions:
            raise AbsentError(f"{name} has eager attention only")
        for module in attentions:
            module.fused_attn = attention == "own_sdpa"
        if attention == "ours":
            enable_offset_bias(model)
        return model

    return build


def _sentence_transformer(attention: str) -> nn.Module:
    import transformers
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, VOCABULARY)}}
    pieces = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as folder:
        _mpnet("own_eager" if attention == "ours" else attention, ALL_LAYERS).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)
        return _enabled(SentenceTransformer(folder, device="cpu"), attention)


def _lengths(case: ModelCase) -> Tensor:
    longest = torch.full((case.batch,), case.length)
    if not case.is_padded:
        return longest
    lengths = torch.linspace(case.length // 4, case.length, case.batch).long()
    return lengths[torch.randperm(case.batch, generator=torch.Generator().manual_seed(0))]


def _tokens(case: ModelCase) -> dict[str, Tensor]:
    """Token ids and a mask, (batch, length) each. An unpadded batch has a mask too, as tokenizers make it."""
    mask = torch.arange(case.length) < _lengths(case)[:, None]
    tokens = torch.randint(4, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.where(mask, 1), "attention_mask": mask.long()}


def _sentences(case: ModelCase) -> list[str]:
    """Sentences of 4 to `case.length` tokens. Their lengths are log-normal, with a median of 24 tokens."""
    shares = (torch.arange(case.batch) + 0.5) / case.batch
    lengths = (24 * (0.7 * torch.special.ndtri(shares)).exp()).round().long().clamp(4, case.length)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, VOCABULARY, (case.batch, case.length), generator=generator).tolist()
    order = torch.randperm(case.batch, generator=generator).tolist()
    return [" ".join(f"w{number}" for number in words[row][: int(lengths[row]) - 2]) for row in order]


def _images(side: int) -> Callable[[ModelCase], Tensor]:
    """What makes a case's images, (batch, 3, side, side)."""

    def make(case: ModelCase) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(case.batch, 3, side, side, generator=generator).to(getattr(torch, case.dtype))

    return make


def _attended_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states of the tokens that are no padding. Those of padding mean nothing."""
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def _embeddings(model: Any, inputs: list[str]) -> Tensor:
    return model.encode(inputs, convert_to_tensor=True, show_progress_bar=False)


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)


MODELS = {
    "mpnet": Subject(_mpnet, _attended_states, _tokens),
    "t5_encoder": Subject(_t5_encoder, _attended_states, _tokens),
    "sentences": Subject(_sentence_transformer, _embeddings, _sentences, is_trainable=False),
    "swin_t": Subject(_timm("swin_tiny_patch4_window7_224"), _logits, _images(224)),
    "swinv2_t_w8": Subject(_timm("swinv2_tiny_window8_256"), _logits, _images(256)),
    "swinv2_t_w16": Subject(_timm("swinv2_tiny_window16_256"), _logits, _images(256)),
    "beit_b": Subject(_timm("beit_base_patch16_224"), _logits, _images(224)),
    "maxvit_t": Subject(_timm("maxvit_tiny_tf_224"), _logits, _images(224)),
}
