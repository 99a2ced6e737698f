"""Classes that take the place of other libraries' classes in modules that exist already.

A module changes its class and keeps its parameters, hooks and name. Other code changes modules as well. accelerate's
hooks and many wrappers put a `forward` on the instance, which calls the `forward` that it found there. `fully_shard`
and parametrizations derive a class. These changes come in any order. After each of them a module must run the attention
that it should run:

* `replace` finds the module's own `forward` wherever a wrapper keeps it, and puts the `forward` of the replacement in
  its place. If a wrapper keeps it out of reach, `unreplaceable_reason` says so before anything is changed.
* A wrapper may still hold the `forward` of a replacement when the module has its own class back. That `forward` then
  runs the module's own.
* A call of a `ReplacedAttention` that does not end in `offset_bias_attention` raises.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from triton_offset_bias.integrations.packing import packed_attention
from triton_offset_bias.spreadable import SpreadableAttention


class Replacement:
    """Base of the classes that instances of other libraries' modules are turned into.

    The last base of such a class is the class that it replaces. A replacement takes that class's name, because
    libraries look modules up by the names of their classes. It adds no parameters, buffers or submodules.

    Attributes:
        replaced: the class that is replaced.
        is_needed: whether a model is refused if one of its modules cannot be replaced. If not, that module stays.
        offset_bias_backend: the `backend` argument of the module's calls of `offset_bias_attention`.
    """

    replaced: ClassVar[type[nn.Module]]
    is_needed: ClassVar[bool] = True
    forward: Callable[..., Any]
    offset_bias_backend: str

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Completes a new class if its last base is a module that is not a replacement itself."""
        super().__init_subclass__(**kwargs)
        own = cls.__bases__[-1]
        if not issubclass(own, nn.Module) or issubclass(own, Replacement):
            return
        cls.replaced = own
        cls.__name__ = own.__name__  # __qualname__, by which pickle finds the class, stays
        if cls.forward is not own.forward:
            cls.forward = _while_replaced(cls, cls.forward)

    def _get_name(self) -> str:
        """The name that `print` shows."""
        return type(self).__qualname__


class ReplacedAttention(Replacement, SpreadableAttention):
    """A replacement that attends, and whose calls are watched."""

    is_spreadable = False
    _last_attention: object = None
    _is_compiled = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Calls the module, through whatever is wrapped around it.

        Raises:
            RuntimeError: the call did not reach `attention`.
        """
        if not isinstance(self, ReplacedAttention):  # the module is restored, but a wrapper still holds this method
            return nn.Module.__call__(self, *args, **kwargs)
        before = self._last_attention
        result = nn.Module.__call__(self, *args, **kwargs)  # type: ignore[arg-type]
        # Every call of `attention`, in any thread, leaves a new object. Compiled calls are not watched.
        if self._last_attention is before and not (self._is_compiled or torch.compiler.is_compiling()):
            raise RuntimeError(
                f"{self.replaced.__name__} must attend through triton_offset_bias until it is disabled, but a "
                "`forward` that was put on the module since it was enabled attends in its own way"
            )
        return result

    def attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        """Calls `offset_bias_attention` on this module's backend, and lays heads side by side: (B, Lq, Hq * Dv).

        With the option `bounds` it calls `packed_attention`.

        Raises:
            ValueError: ranks hold parts of the sequence, and the call has packed sequences or keys of a cache.
        """
        if self._ranks > 1:
            _check_part(query, key, options)
        if torch.compiler.is_compiling():
            self._is_compiled = True
        else:
            self._last_attention = object()
        attend = packed_attention if "bounds" in options else self._attend
        out = attend(query, key, value, bias, backend=self.offset_bias_backend, **options)
        return out.transpose(1, 2).flatten(2)


def _check_part(query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    """Raises ValueError if a call has more than this rank's part of plain sequences."""
    if "bounds" in options:
        raise ValueError(
            "`position_ids` must not pack sequences that are spread over ranks, got packed sequences: use "
            "triton_offset_bias.distributed.offset_bias_attention_varlen"
        )
    if options.get("is_causal") and query.shape[2] != key.shape[2]:
        raise ValueError(
            "`use_cache` must be False where a sequence is spread over ranks, "
            f"got {query.shape[2]} queries and {key.shape[2]} keys"
        )


def replacement_for(module: nn.Module, replacements: dict[type, type[Replacement]]) -> type[Replacement] | None:
    """The replacement of the first class that has one, from the module's class up through its base classes."""
    return next((replacements[cls] for cls in type(module).__mro__ if cls in replacements), None)


def unreplaceable_reason(module: nn.Module, replacement: type[Replacement]) -> str | None:
    """The reason why `replace` would not work on a module; None if it would."""
    own = replacement.replaced
    lines = [cls.__mro__[: cls.__mro__.index(own)] for cls in (type(module), replacement)]
    derived, added = ({name for cls in line if cls is not Replacement for name in vars(cls)} for line in lines)
    overridden = sorted(name for name in derived & added if not name.startswith("__"))
    if overridden:
        return f"its class {type(module).__name__} overrides {', '.join(overridden)} of {own.__name__}"
    for cls in lines[0]:
        methods = {name: x for name, x in vars(cls).items() if isinstance(x, FunctionType) and name != "__init__"}
        if names := sorted(name for name, x in methods.items() if "__class__" in x.__code__.co_freevars):
            return f"its class {cls.__name__} calls super() in {', '.join(names)}, which a class derived from it cannot"
    if "forward" in vars(module) and not any(True for _ in _places(module, own.forward, replacement.forward)):
        return (
            f"a `forward` was put on it that keeps {own.__name__}'s own out of reach: wrap the module after enabling it"
        )
    return None


def replace(module: nn.Module, replacement: type[Replacement], backend: str) -> None:
    """Makes the module an instance of `replacement`, under whatever was wrapped around it."""
    for put in list(_places(module, replacement.replaced.forward, replacement.forward)):
        put()
    module.__class__ = _exchanged(type(module), replacement.replaced, replacement)
    vars(module)["offset_bias_backend"] = backend


def restore(module: nn.Module) -> None:
    """Gives a module its own class back, if it is replaced."""
    for cls in type(module).__mro__:
        if issubclass(cls, Replacement) and "replaced" in vars(cls):
            module.__class__ = _exchanged(type(module), cls, cls.replaced)
            for name in ("offset_bias_backend", "_last_attention", "_is_compiled", "_attend", "_ranks"):
                vars(module).pop(name, None)
            return


def _while_replaced(cls: type[Replacement], forward: Callable[..., object]) -> Callable[..., object]:
    """A function that runs `forward` on instances of `cls`, and the replaced class's own `forward` on other modules."""
    own = cls.replaced.forward

    @functools.wraps(forward)
    def either(self: nn.Module, *args: object, **kwargs: object) -> object:
        return (forward if isinstance(self, cls) else own)(self, *args, **kwargs)

    return either


def _exchanged(cls: type, old: type, new: type) -> type:
    """The class `cls` with the base `new` in place of `old`."""
    if cls is old:
        return new
    bases = tuple(_exchanged(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    members = {name: x for name, x in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)


def _places(module: nn.Module, own: Callable, ours: Callable) -> Iterator[Callable[[], None]]:
    """Yields a function for each place where a wrapper on the instance keeps `own`. The function puts `ours` there."""
    seen: set[int] = set()
    for name, x in vars(module).items():
        yield from _places_in(x, functools.partial(_put_attribute, vars(module), name), own, ours, seen)


def _places_in(
    x: object, put: Callable[[object], None], own: Callable, ours: Callable, seen: set[int]
) -> Iterator[Callable[[], None]]:
    """Yields the functions of `_places` for the object `x`, which `put` replaces, and for the callables in it."""
    function = x.__func__ if isinstance(x, MethodType) else x
    if function is own or function is ours:
        yield lambda: put(MethodType(ours, x.__self__) if isinstance(x, MethodType) else ours)
    elif callable(x) and not isinstance(x, type | nn.Module | Tensor) and id(x) not in seen:
        seen.add(id(x))
        for held, put_held in _held_by(x):
            yield from _places_in(held, put_held, own, ours, seen)


def _held_by(x: object) -> Iterator[tuple[object, Callable[[object], None]]]:
    """Yields the objects that a callable holds, each with a function that puts another object in its place."""
    if isinstance(x, MethodType):
        yield from _held_by(x.__func__)
        if not isinstance(x.__self__, nn.Module | type):
            yield from _held_by(x.__self__)
        return
    if isinstance(x, functools.partial):
        parts = (x.func, *x.args)
        yield from ((part, functools.partial(_put_part, x, index)) for index, part in enumerate(parts))
        yield from ((part, functools.partial(_put_attribute, x.keywords, name)) for name, part in x.keywords.items())
    for cell in getattr(x, "__closure__", None) or () if isinstance(x, FunctionType) else ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
    for name, held in getattr(x, "__dict__", {}).items():
        if name != "__wrapped__":  # for inspection: nobody calls it
            yield held, functools.partial(_put_attribute, x.__dict__, name)


def _put_attribute(attributes: dict[str, object], name: str, x: object) -> None:
    attributes[name] = x


def _put_part(partial: functools.partial, index: int, x: object) -> None:
    """Makes `x` the function of a partial object (index 0) or one of its arguments (index 1 and up)."""
    function, *args = (x if place == index else part for place, part in enumerate((partial.func, *partial.args)))
    partial.__setstate__((function, tuple(args), partial.keywords, vars(partial)))  # type: ignore[attr-defined]
