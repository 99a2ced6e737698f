"""`enable_offset_bias` makes models of timm attend through this package, and `disable_offset_bias` undoes it."""

from torch import nn

from triton_offset_bias.integrations.holders import check_backend, modules_of, replaced_modules
from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement, replace, restore
from triton_offset_bias.integrations.timm import beit, levit, relative, swin

_CLASSES: dict[type, type[Replacement]] = {
    cls.replaced: cls for adapter in (swin, beit, relative, levit) for cls in adapter.REPLACEMENTS
}


def enable_offset_bias(model: object, backend: str = "auto") -> dict[str, str]:
    """Makes a model of timm attend through `offset_bias_attention`, in place.

    Serves Swin, Swin V2, BEiT (with a bias per layer or a shared one), ViT with relative positions, MaxViT, CoAtNet and
    their relatives, and LeViT. Outputs and gradients equal those of timm's own attention up to rounding. No (tokens,
    tokens) tensor of biases or scores is built, except for the masks of shifted windows, which timm itself makes.
    Parameters, `state_dict` and saved files stay as they are. Image and window sizes may be changed before and after
    the call.

    Regions of a shifted window do not see each other at all, whereas timm weighs pairs of different regions by
    exp(-100).

    Args:
        model: a model of timm, a module that holds such models at any depth, or another object that holds such modules
            in its dict `components`, or as its attributes.
        backend: "auto", "triton", "cpp" or "reference", as in `offset_bias_attention`.

    Returns:
        The models that were enabled: the class of each by its name in `model`, such as {"": "SwinTransformer"}. The
        name is "" for `model` itself, as in `named_modules`.

    Raises:
        TypeError: `model` holds no module.
        ValueError: `model` holds no attention that is served, it is enabled already, or `backend` is unknown.
        NotImplementedError: a wrapper around one of the modules keeps the module's own attention out of reach. Nothing
            is changed then.

    Source:
        Liu et al. 2021 (Swin, arXiv:2103.14030), equation 4; Liu et al. 2022 (Swin V2, arXiv:2111.09883), section 3.3;
        Bao et al. 2022 (BEiT, arXiv:2106.08254); Tu et al. 2022 (MaxViT, arXiv:2204.01697), section 3.2; Dai et al.
        2021 (CoAtNet, arXiv:2106.04803), equation 3; Graham et al. 2021 (LeViT, arXiv:2104.01136), section 4.2.
    """
    modules = list(modules_of(model))
    if not modules:
        raise TypeError(f"`model` must be a module or hold one, got {type(model).__name__} that holds none")
    check_backend(backend)
    if any(isinstance(module, Replacement) for _, module in modules):
        raise ValueError("`model` must not be enabled already: call `disable_offset_bias` first to change the backend")
    replaced = {name: replaced_modules(each, _CLASSES, prefix=name) for name, each in _outermost(modules).items()}
    served = {name: found for name, found in replaced.items() if any(_attends(cls) for _, cls in found)}
    if not served:
        raise ValueError(
            f"`model` must hold an attention of timm that is served ({', '.join(_names())}), "
            f"got {type(model).__name__} with none"
        )
    for found in served.values():
        for module, cls in found:
            replace(module, cls, backend)
    names = dict(modules)
    return {name: type(names[name]).__name__ for name in served}


def disable_offset_bias(model: object) -> None:
    """Gives models their own attention back.

    Args:
        model: the object that `enable_offset_bias` was called with, a copy of it, or a part.

    Raises:
        ValueError: the object holds nothing that is enabled.
    """
    enabled = [module for _, module in modules_of(model) if isinstance(module, Replacement)]
    if not enabled:
        raise ValueError("`model` must be one that `enable_offset_bias` was called with")
    for module in enabled:
        restore(module)


def _outermost(modules: list[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """The modules whose classes are timm's, by name, without their parts."""
    found: dict[str, nn.Module] = {}
    for name, module in modules:  # a module comes before its parts
        is_part = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if any(cls.__module__.startswith("timm.") for cls in type(module).__mro__) and not is_part:
            found[name] = module
    return found


def _attends(cls: type[Replacement]) -> bool:
    return issubclass(cls, ReplacedAttention)


def _names() -> list[str]:
    """The served attention classes, each with its file in timm."""
    return [f"{own.__module__.rpartition('.')[2]}.{own.__name__}" for own, cls in _CLASSES.items() if _attends(cls)]
