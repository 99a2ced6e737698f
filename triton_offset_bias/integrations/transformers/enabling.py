"""`enable_offset_bias` makes a model attend through this package, and `disable_offset_bias` undoes it."""

import copy
from importlib import import_module

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.integrations.replacement import (
    Replacement,
    replace,
    replacement_for,
    restore,
    unreplaceable_reason,
)
from triton_offset_bias.integrations.transformers.masks import NUMBERED, PLAIN, TABLE

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
    "swin": "windows",
    "swinv2": "windows",
    "beit": "beit",
}
# The kind of mask that a model's attention asks for, where it is not `PLAIN`.
_MASKS = {"bloom": NUMBERED, "falcon": NUMBERED, **{name: TABLE for name, adapter in SERVED.items() if adapter == "t5"}}
_STATE = "_offset_bias_configs"


def enable_offset_bias(model: PreTrainedModel, backend: str = "auto") -> None:
    """Makes a Hugging Face model train and generate through `offset_bias_attention`, in place.

    Logits, loss, gradients and generated tokens equal those of the model's eager attention up to rounding. No (queries,
    keys) tensor of biases, scores or masks is built, except for the masks of Swin's shifted windows and of LongT5's
    blocks, which the models themselves make. Parameters, `state_dict` and saved files stay as they are.

    Three results differ. A query whose keys are all padding gets 0 from attention, not an average over the padding.
    Regions of Swin's shifted windows do not see each other at all, whereas Swin weighs pairs of different regions by
    exp(-100). Falcon is compared with its default, ``attn_implementation="sdpa"``, because its eager attention adds
    ALiBi twice. Falcon rounds slope times position to bfloat16, and this package rounds the slope alone. Both are equal
    up to position 256 for slopes that are powers of 2, and approximately equal for others.

    The model gets its own copy of its configuration, because other models may share the configuration. Hooks and
    wrappers, such as accelerate's, may be on the model before the call, and may come and go afterwards.

    Args:
        model: a model of one of the `SERVED` types, with any head.
        backend: "auto", "triton", "cpp" or "reference", as in `offset_bias_attention`.

    Raises:
        TypeError: `model` is no `PreTrainedModel`.
        ValueError: the model's type is not served, the model is enabled already or returns attention weights, or
            `backend` is unknown.
        NotImplementedError: the model's type is served, but not with this configuration; or a wrapper around one of the
            modules keeps the module's own attention out of reach. Nothing is changed then.

    Source:
        Raffel et al. 2020 (T5, arXiv:1910.10683), section 2.1; Press et al. 2022 (ALiBi, arXiv:2108.12409), section 3;
        Liu et al. 2021 (Swin, arXiv:2103.14030), equation 4.
    """
    classes = _replacements(model)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")
    replaced = _replaced_modules(model, classes)
    configs = _own_configs(model)
    setattr(model, _STATE, [(config, config._attn_implementation) for config in configs])
    for config in configs:
        config._attn_implementation = _MASKS.get(model.config.model_type, PLAIN)
    for module, cls in replaced:
        replace(module, cls, backend)


def disable_offset_bias(model: PreTrainedModel) -> None:
    """Gives a model its own attention back.

    Args:
        model: the model that `enable_offset_bias` was called with, or a copy of it.

    Raises:
        ValueError: the model is not enabled.
    """
    if _STATE not in getattr(model, "__dict__", {}):
        raise ValueError("`model` must be one that `enable_offset_bias` was called with")
    configs = getattr(model, _STATE)
    delattr(model, _STATE)
    for config, implementation in configs:
        config._attn_implementation = implementation
    for module in model.modules():
        restore(module)
        config = vars(module).get("config")
        if getattr(config, "_attn_implementation", None) in (PLAIN, TABLE, NUMBERED):  # a copied layer's own copy
            config._attn_implementation = configs[0][1]


def _replacements(model: PreTrainedModel) -> dict[type, type[Replacement]]:
    """The replacement of each of the model's own classes. Raises if the model cannot be served."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers.PreTrainedModel, got {type(model).__name__}")
    model_type = model.config.model_type
    if model_type not in SERVED:
        raise ValueError(f"`model` must be of a served type ({', '.join(SERVED)}), got {model_type!r}")
    if any(isinstance(module, Replacement) for module in model.modules()):
        raise ValueError("`model` must not be enabled already: call `disable_offset_bias` first to change the backend")
    if model.config.output_attentions:
        raise ValueError("`model.config.output_attentions` must be False: attention weights are never stored, got True")
    adapter = import_module(f"triton_offset_bias.integrations.transformers.{SERVED[model_type]}")
    reason = adapter.unserved_reason(model.config)
    if reason is not None:
        raise NotImplementedError(f"{model_type} is not served with {reason}")
    return {cls.replaced: cls for cls in adapter.REPLACEMENTS}


def _replaced_modules(
    model: PreTrainedModel, classes: dict[type, type[Replacement]]
) -> list[tuple[nn.Module, type[Replacement]]]:
    """The modules that are to be replaced, each with its new class."""
    replaced = []
    for name, module in model.named_modules():
        cls = replacement_for(module, classes)
        if cls is None:
            continue
        reason = unreplaceable_reason(module, cls)
        if reason is not None:
            raise NotImplementedError(
                f"`model` has {name!r}, which cannot be made to attend through triton_offset_bias: {reason}"
            )
        replaced.append((module, cls))
    if not replaced:
        raise NotImplementedError(
            f"`model` must hold one of {', '.join(sorted(cls.__name__ for cls in classes))}, got none: "
            "build it with attn_implementation='eager'"
        )
    return replaced


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
