"""`enable_offset_bias` makes models attend through this package, and `disable_offset_bias` undoes it."""

import copy
from importlib import import_module

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from triton_offset_bias.integrations.holders import check_backend, modules_of, replaced_modules
from triton_offset_bias.integrations.replacement import Replacement, replace, restore
from triton_offset_bias.integrations.transformers.masks import NUMBERED, PLAIN, SLIDING, TABLE

# The model types that are served, each with the module that holds its adapter.
SERVED: dict[str, str] = {
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "longt5": "t5",
    "switch_transformers": "t5",
    "pop2piano": "t5",
    "mpnet": "mpnet",
    "bloom": "alibi",
    "falcon": "alibi",
    "mpt": "alibi",
    "swin": "swin",
    "swinv2": "swin",
    "swin2sr": "swin",
    "donut-swin": "swin",
    "maskformer-swin": "swin",
    "clap_audio_model": "swin",
    "beit": "beit",
    "data2vec-vision": "beit",
    "wavlm": "speech",
    "wav2vec2-conformer": "speech",
    "wav2vec2-bert": "speech",
    "inkling_text": "inkling",
}
# The kind of mask that a model's attention asks for, where it is not `PLAIN`.
_MASKS = {
    "bloom": NUMBERED,
    "falcon": NUMBERED,
    "inkling_text": SLIDING,
    **{name: TABLE for name, adapter in SERVED.items() if adapter == "t5"},
}
_STATE = "_offset_bias_configs"


def enable_offset_bias(model: object, backend: str = "auto") -> dict[str, str]:
    """Makes a Hugging Face model train and generate through `offset_bias_attention`, in place.

    The model may be held by another object: a `SentenceTransformer`, a pipeline of diffusers, transformers or Chronos,
    a model of PEFT, `DistributedDataParallel`, a compiled model, a segmentation model with a Swin backbone. All models
    of a served type that the object holds are enabled.

    Logits, loss, gradients and generated tokens equal those of the model's eager attention up to rounding. No (queries,
    keys) tensor of biases, scores or masks is built, except for the masks of Swin's shifted windows and of LongT5's
    blocks, which the models themselves make. Parameters, `state_dict` and saved files stay as they are.

    Four results differ. A query whose keys are all padding gets 0 from attention, not an average over the padding. On a
    CPU, encoders of MPNet, T5, mT5 and UMT5 give 0 for padding behind the tokens, because they do not compute it.
    Regions of Swin's shifted windows do not see each other at all, whereas Swin weighs pairs of different regions by
    exp(-100). Falcon is compared with its default, ``attn_implementation="sdpa"``, because its eager attention adds
    ALiBi twice. Falcon rounds slope times position to bfloat16, and this package rounds the slope alone. Both are equal
    up to position 256 for slopes that are powers of 2, and approximately equal for others.

    Each model gets its own copy of its configuration, because other models may share the configuration. Hooks and
    wrappers, such as accelerate's, may be on the model before the call, and may come and go afterwards.

    Args:
        model: a model of one of the `SERVED` types, with any head; or a module that holds such models, at any depth; or
            another object that holds such modules in its dict `components`, or as its attributes.
        backend: "auto", "triton", "cpp" or "reference", as in `offset_bias_attention`.

    Returns:
        The models that were enabled: the type of each by its name in `model`, such as {"text_encoder_2": "t5"}. The
        name is "" for `model` itself, as in `named_modules`.

    Raises:
        TypeError: `model` is no `PreTrainedModel` and holds none.
        ValueError: no model is of a served type, a model is enabled already or returns attention weights, or `backend`
            is unknown.
        NotImplementedError: a model's type is served, but not with this configuration; or a wrapper around one of the
            modules keeps the module's own attention out of reach. Nothing is changed then.

    Source:
        Raffel et al. 2020 (T5, arXiv:1910.10683), section 2.1; Press et al. 2022 (ALiBi, arXiv:2108.12409), section 3;
        Liu et al. 2021 (Swin, arXiv:2103.14030), equation 4.
    """
    held = _held_models(model)
    check_backend(backend)
    replaced = {name: _replaced_modules(name, each) for name, each in held.items()}
    for name, each in held.items():
        _enable(each, replaced[name], backend)
    return {name: each.config.model_type for name, each in held.items()}


def disable_offset_bias(model: object) -> None:
    """Gives a model, or every model that an object holds, its own attention back.

    Args:
        model: the object that `enable_offset_bias` was called with, or a copy of it.

    Raises:
        ValueError: the object holds no model that is enabled.
    """
    enabled = [module for _, module in modules_of(model) if _STATE in vars(module)]
    if not enabled:
        raise ValueError("`model` must be one that `enable_offset_bias` was called with")
    for each in enabled:
        _disable(each)


def _held_models(holder: object) -> dict[str, PreTrainedModel]:
    """The models of served types that an object holds, by their names in it, without their parts.

    Raises:
        TypeError: the object holds no model of transformers.
        ValueError: it holds no model of a served type.
    """
    models = {name: x for name, x in modules_of(holder) if isinstance(x, PreTrainedModel)}
    if not models:
        raise TypeError(
            f"`model` must be a transformers.PreTrainedModel or hold one, got {type(holder).__name__} that holds none"
        )
    served: dict[str, PreTrainedModel] = {}
    for name, model in models.items():  # a model comes before its parts
        is_part = any(not outer or name.startswith(f"{outer}.") for outer in served)
        if model.config.model_type in SERVED and not is_part:
            served[name] = model
    if not served:
        found = ", ".join(dict.fromkeys(repr(model.config.model_type) for model in models.values()))
        raise ValueError(f"`model` must be, or hold, a model of a served type ({', '.join(SERVED)}), got {found}")
    return served


def _enable(model: PreTrainedModel, replaced: list[tuple[nn.Module, type[Replacement]]], backend: str) -> None:
    configs = _own_configs(model)
    setattr(model, _STATE, [(config, config._attn_implementation) for config in configs])
    for config in configs:
        config._attn_implementation = _MASKS.get(model.config.model_type, PLAIN)
    for module, cls in replaced:
        replace(module, cls, backend)


def _disable(model: nn.Module) -> None:
    configs: list[tuple[PretrainedConfig, str]] = getattr(model, _STATE)
    delattr(model, _STATE)
    for config, implementation in configs:
        config._attn_implementation = implementation
    for module in model.modules():
        restore(module)
        config = vars(module).get("config")
        is_ours = getattr(config, "_attn_implementation", None) in (PLAIN, TABLE, NUMBERED, SLIDING)
        if config is not None and is_ours:  # a copied layer's own copy
            config._attn_implementation = configs[0][1]


def _replaced_modules(name: str, model: PreTrainedModel) -> list[tuple[nn.Module, type[Replacement]]]:
    """The modules of a model that are to be replaced, each with its new class. `name` is the model's name."""
    classes = _replacements(model)
    replaced = replaced_modules(model, classes, prefix=name)
    if not replaced:
        raise NotImplementedError(
            f"`model` must hold one of {', '.join(sorted(cls.__name__ for cls in classes))}, got none: "
            "build it with attn_implementation='eager'"
        )
    return replaced


def _replacements(model: PreTrainedModel) -> dict[type, type[Replacement]]:
    """The replacement of each of the model's own classes. Raises if the model cannot be served."""
    model_type = model.config.model_type
    if any(isinstance(module, Replacement) for module in model.modules()):
        raise ValueError("`model` must not be enabled already: call `disable_offset_bias` first to change the backend")
    if model.config.output_attentions:
        raise ValueError("`model.config.output_attentions` must be False: attention weights are never stored, got True")
    adapter = import_module(f"triton_offset_bias.integrations.transformers.{SERVED[model_type]}")
    reason = adapter.unserved_reason(model.config)
    if reason is not None:
        raise NotImplementedError(f"{model_type} is not served with {reason}")
    return {cls.replaced: cls for cls in adapter.REPLACEMENTS}


def _own_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Gives the model copies of its configurations, which name the implementation of attention; returns the copies."""
    copies: dict[int, PretrainedConfig] = {}
    originals = []
    for module in model.modules():
        config = vars(module).get("config")
        if not isinstance(config, PretrainedConfig):
            continue
        if id(config) not in copies:
            originals.append(config)  # keeps the object alive, so that no other object gets its id
            copies[id(config)] = copy.deepcopy(config)
        module.config = copies[id(config)]
    return list(copies.values())
