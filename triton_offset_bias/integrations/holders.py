"""The modules that an object holds, and those among them that are to be replaced."""

from collections.abc import Iterator

from torch import nn

from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.integrations.replacement import Replacement, replacement_for, unreplaceable_reason


def modules_of(holder: object) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module that an object holds, once, with its name; a module holds itself, under the name ""."""
    if isinstance(holder, nn.Module):
        yield from holder.named_modules()
        return
    components = getattr(holder, "components", None)
    parts = components if isinstance(components, dict) else getattr(holder, "__dict__", {})
    seen: set[nn.Module] = set()
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            yield from ((f"{part}.{name}" if name else part, x) for name, x in module.named_modules(memo=seen))


def replaced_modules(
    model: nn.Module, classes: dict[type, type[Replacement]], prefix: str
) -> list[tuple[nn.Module, type[Replacement]]]:
    """The modules of a model that are to be replaced, each with its new class. `prefix` is the model's name.

    Raises:
        NotImplementedError: the attention of one of the modules is out of reach.
    """
    replaced = []
    for name, module in model.named_modules(prefix=prefix):
        cls = replacement_for(module, classes)
        if cls is None:
            continue
        reason = unreplaceable_reason(module, cls)
        if reason is not None and not cls.is_needed:
            continue
        if reason is not None:
            raise NotImplementedError(
                f"`model` has {name!r}, which cannot be made to attend through triton_offset_bias: {reason}"
            )
        replaced.append((module, cls))
    return replaced


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is the name of a backend, or "auto"."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")
