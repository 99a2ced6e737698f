"""Small models of transformers with random weights, and the comparison of their eager attention with this package's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from tolerance import assert_accurate

from triton_offset_bias.integrations.transformers import enable_offset_bias

# A float64 model of transformers is not float64 throughout: its norms and some softmaxes are float32.
ROUNDING = 16
TABLES = ("relative_attention_bias", "relative_position_bias_table", "rel_attn_embed", "distance_embedding")


@dataclass
class Case:
    """A model and the inputs of its call."""

    name: str
    build: Callable[[], transformers.PreTrainedModel]
    inputs: Callable[[], dict[str, torch.Tensor]]
    # (batch, length) bool: the tokens whose logits are compared, which are no padding. None: all tokens.
    counted: Callable[[], torch.Tensor] | None = None
    # The dtype in which the truth is computed.
    exact: torch.dtype = torch.float64


def randomized(model_class: type, config: transformers.PretrainedConfig, implementation: str = "eager"):
    """A model in eval mode whose every weight matters: tables too, which many models start at 0."""
    config._attn_implementation = implementation
    model = model_class(config).eval()
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                spread = 1.0 if any(table in name for table in TABLES) else 0.2
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return model


def enabled_copy(model: transformers.PreTrainedModel, backend: str = "auto") -> transformers.PreTrainedModel:
    """A copy of the model on this package."""
    fast = copy.deepcopy(model)
    enable_offset_bias(fast, backend)
    return fast


def checkpointed(model: transformers.PreTrainedModel, use_reentrant: bool) -> transformers.PreTrainedModel:
    """The model in training mode, computing each layer again for its gradient."""
    newest = getattr(model, "activation_checkpointing_enable", None)
    (newest or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    return model.train()


def _inputs_for(model: transformers.PreTrainedModel, case: Case) -> dict[str, torch.Tensor]:
    dtypes = {name: model.dtype if x.is_floating_point() else x.dtype for name, x in case.inputs().items()}
    return {name: x.to(model.device, dtypes[name]) for name, x in case.inputs().items()}


def logits_of(output: transformers.utils.ModelOutput) -> torch.Tensor:
    """The logits, or what a model without logits is made for."""
    names = ("logits", "reconstruction", "feature_maps", "audio_embeds")
    found = next(name for name in names if name in output)
    return output[found][-1] if found == "feature_maps" else output[found]


def _random_sum(logits: torch.Tensor) -> torch.Tensor:
    """A loss that no norm before it makes constant."""
    weights = torch.randn(logits.shape, generator=torch.Generator("cpu").manual_seed(2), device="cpu")
    return (logits * weights.to(logits)).mean()


def results_of(model: transformers.PreTrainedModel, case: Case) -> dict[str, torch.Tensor]:
    """The loss, the logits and every parameter's gradient of one call."""
    inputs = _inputs_for(model, case)
    model.zero_grad()
    output = model(**inputs)
    logits = logits_of(output)
    loss = _random_sum(logits) if output.get("loss") is None else output.loss
    loss.backward()
    results = {"loss": loss.detach(), "logits": logits.detach()}
    if case.counted is not None:
        results["logits"] = results["logits"][case.counted().to(model.device)]
    return results | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_eager(case: Case, dtype: torch.dtype, fast: transformers.PreTrainedModel | None = None) -> None:
    """Asserts the rule of accuracy for a model on this package: it allows the error of eager attention in `dtype`."""
    eager = case.build().to(dtype)
    fast = enabled_copy(eager) if fast is None else fast.to(dtype)
    got, same_dtype = results_of(fast, case), results_of(eager, case)
    expected = results_of(eager.to(case.exact), case)
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_accurate(name, got[name], wanted.double(), same_dtype[name], ROUNDING * torch.finfo(dtype).eps)


def assert_generates_as_eager(case: Case, **options: object) -> None:
    """Asserts that both generate the same tokens, and that these are not all alike."""
    eager = case.build()
    inputs = _inputs_for(eager, case)
    del inputs["labels"]
    tokens = [
        model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        for model in (eager, enabled_copy(eager))
    ]
    assert torch.equal(*tokens)
    assert len(tokens[0][:, -12:].unique()) > 2, "too uniform to tell a difference"


def assert_bfloat16_generates_what_rounding_leaves_decided(case: Case) -> None:
    """Asserts that tokens are the float64 model's where they lead by more than eager attention's error in bfloat16."""
    eager = case.build().bfloat16()
    inputs = _inputs_for(eager, case)
    del inputs["labels"]
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = enabled_copy(eager).generate(**inputs, **options)
    rounded = eager.generate(**inputs, **options)
    exact = eager.double().generate(**inputs, **options)
    error = (rounded.logits[0] - exact.logits[0]).abs().max()
    best, second = torch.stack(exact.logits, 1).topk(2).values.unbind(-1)
    is_decided = (best - second > error).cumprod(1).bool()
    assert is_decided.sum() > 3, "too little is decided"
    expected = exact.sequences[:, -is_decided.shape[1] :][is_decided]
    assert torch.equal(got.sequences[:, -len(got.logits) :][:, : is_decided.shape[1]][is_decided], expected)


def padded(batch: int, length: int) -> torch.Tensor:
    """A mask (batch, length) int64: the first sequence whole, the second padded on its left, the third on its right."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1, : length // 4] = 0
    mask[2, -(length // 3) :] = 0
    return mask


def tokens(batch: int, length: int, seed: int, vocabulary: int = 60) -> torch.Tensor:
    """Tokens (batch, length) int64 from 4 on; lower numbers are special tokens."""
    return torch.randint(
        4, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed), device="cpu"
    ).to(torch.get_default_device())
