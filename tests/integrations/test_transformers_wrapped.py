"""Models whose modules carry hooks and wrappers attend through this package, whatever was put on them and when."""

import copy
import functools
import types
from collections.abc import Callable

import accelerate
import accelerate.hooks
import pytest
import torch
import transformers_models as models
from transformers_cases import logits_of
from transformers_models import ABSENT, EVERY_TYPE, transformers

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.integrations import replacement
from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.transformers import SERVED, disable_offset_bias, enable_offset_bias


def _every_module(model: torch.nn.Module, wrap: Callable[[torch.nn.Module], object]) -> None:
    for module in list(model.modules()):
        wrap(module)


def _bind(module: torch.nn.Module) -> None:
    module.forward = module.forward


def _close_over(module: torch.nn.Module) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    module.forward = forward


class _Held:
    """A callable that keeps what it calls as an attribute."""

    def __init__(self, inner: Callable) -> None:
        self.inner = inner

    def __call__(self, *args, **kwargs):
        """The result of what it keeps."""
        return self.inner(*args, **kwargs)


def _hold(module: torch.nn.Module) -> None:
    module.forward = _Held(functools.partial(module.forward))


def _hook(module: torch.nn.Module) -> None:
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook(), append=True)


def _hook_and_unhook(module: torch.nn.Module) -> None:
    _hook(module)
    accelerate.hooks.remove_hook_from_module(module)


WRAPPERS = {
    "bound": _bind,
    "closure": _close_over,
    "callable": _hold,
    "accelerate": _hook,
    "accelerate, removed": _hook_and_unhook,
}


@pytest.fixture
def attentions(monkeypatch):
    """A list to which every attention through this package adds its query's shape."""
    seen = []

    def counted(attend):
        def call(query, *args, **kwargs):
            seen.append(query.shape)
            return attend(query, *args, **kwargs)

        return call

    monkeypatch.setattr(ReplacedAttention, "_attend", staticmethod(counted(offset_bias_attention)))
    monkeypatch.setattr(replacement, "packed_attention", counted(replacement.packed_attention))
    return seen


def _outputs(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs))


def _assert_attends_here(model, inputs, expected, attentions) -> None:
    attentions.clear()
    torch.testing.assert_close(_outputs(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(attentions) == sum(isinstance(module, ReplacedAttention) for module in model.modules())
    assert attentions


def _assert_attends_itself(model, inputs, expected, attentions) -> None:
    attentions.clear()
    assert torch.equal(_outputs(model, inputs), expected)
    assert not attentions
    assert not any(isinstance(module, Replacement) for module in model.modules())


def test_there_is_a_model_of_every_served_type():
    """The tests below run all of these models."""
    assert set(EVERY_TYPE) | ABSENT == set(SERVED)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", EVERY_TYPE)
def test_what_is_wrapped_before_attends_here_and_then_itself_again(name, wrap, attentions):
    """The model is enabled under the wrappers, disabled under them, and enabled once more."""
    build, inputs = EVERY_TYPE[name]
    model = build()
    expected = _outputs(model, inputs)
    _every_module(model, wrap)
    enable_offset_bias(model)
    _assert_attends_here(model, inputs, expected, attentions)
    disable_offset_bias(model)
    _assert_attends_itself(model, inputs, expected, attentions)
    enable_offset_bias(model)
    _assert_attends_here(model, inputs, expected, attentions)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", EVERY_TYPE)
def test_what_is_wrapped_afterwards_attends_here_and_then_itself_again(name, wrap, attentions):
    """The model is disabled under wrappers that hold this package's attention."""
    build, inputs = EVERY_TYPE[name]
    model = build()
    expected = _outputs(model, inputs)
    enable_offset_bias(model)
    _every_module(model, wrap)
    _assert_attends_here(model, inputs, expected, attentions)
    disable_offset_bias(model)
    _assert_attends_itself(model, inputs, expected, attentions)


@pytest.mark.parametrize("is_first", [True, False], ids=["hooks first", "enabled first"])
@pytest.mark.parametrize("name", EVERY_TYPE)
def test_hooks_removed_again_leave_the_attention_that_is_enabled(name, is_first, attentions):
    """accelerate puts the `forward` that a hook found back on the instance."""
    build, inputs = EVERY_TYPE[name]
    model = build()
    expected = _outputs(model, inputs)
    for step in (_hook, None) if is_first else (None, _hook):
        _every_module(model, step) if step else enable_offset_bias(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    _assert_attends_here(model, inputs, expected, attentions)
    disable_offset_bias(model)
    _assert_attends_itself(model, inputs, expected, attentions)


def _cpu_offload(model: torch.nn.Module, folder: str) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def _disk_offload(model: torch.nn.Module, folder: str) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def _dispatch(model: torch.nn.Module, folder: str) -> None:
    names = {name for name, _ in model.named_children()}
    device_map = {name: "disk" if index % 2 else "cpu" for index, name in enumerate(sorted(names))}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


# Their own attention asks a parameter on the meta device for its device, and cannot run while parameters are elsewhere.
FAIL_THEMSELVES = {"wavlm"}
OFFLOADS = {"to the CPU": _cpu_offload, "to the disk": _disk_offload, "dispatched": _dispatch}


@pytest.mark.parametrize("is_first", [True, False], ids=["offloaded first", "enabled first"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("name", EVERY_TYPE)
@pytest.mark.cpu_only
def test_parameters_that_are_elsewhere_between_calls_are_at_hand_in_them(name, offload, is_first, tmp_path, attentions):
    """Between calls they are on the meta device. Disabling also works under the hooks."""
    build, inputs = EVERY_TYPE[name]
    model = build()
    expected = _outputs(model, inputs)
    if is_first:
        offload(model, str(tmp_path))
        enable_offset_bias(model)
    else:
        enable_offset_bias(model)
        offload(model, str(tmp_path))
    assert any(x.is_meta for x in model.parameters())
    _assert_attends_here(model, inputs, expected, attentions)
    disable_offset_bias(model)
    if name not in FAIL_THEMSELVES:
        _assert_attends_itself(model, inputs, expected, attentions)


def test_copies_of_a_hooked_and_enabled_model_attend_here(attentions):
    """A copy's hooks belong to the copy."""
    build, inputs = EVERY_TYPE["mpt"]
    model = build()
    expected = _outputs(model, inputs)
    _every_module(model, _hook)
    enable_offset_bias(model)
    twin = copy.deepcopy(model)
    disable_offset_bias(model)
    _assert_attends_here(twin, inputs, expected, attentions)
    _assert_attends_itself(model, inputs, expected, attentions)


def test_an_attention_out_of_reach_is_refused_by_name_and_nothing_is_changed():
    """The wrapper calls the class's own function, and holds nothing that could be exchanged."""
    model = models.bloom()
    attention = model.transformer.h[1].self_attention
    attention.forward = eval("lambda *args, **kwargs: type(me).forward(me, *args, **kwargs)", {"me": attention})
    with pytest.raises(
        NotImplementedError, match=r"'transformer.h.1.self_attention'.*BloomAttention's own out of reach"
    ):
        enable_offset_bias(model)
    assert not any(isinstance(module, Replacement) for module in model.modules())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", [name for name in EVERY_TYPE if name != "inkling_text"])
def test_an_attention_that_is_passed_over_afterwards_raises(name):
    """The library's own forward is put back on the instance. Inkling keeps its own, which attends here as well."""
    build, inputs = EVERY_TYPE[name]
    model = build()
    enable_offset_bias(model)
    for module in model.modules():
        if isinstance(module, ReplacedAttention):
            module.forward = types.MethodType(module.replaced.forward, module)
    with pytest.raises((RuntimeError, TypeError, ValueError, KeyError)):
        _outputs(model, inputs)


@pytest.mark.parametrize("is_first", [True, False], ids=["compiled first", "enabled first"])
@pytest.mark.parametrize("way", ["module", "forward", "parent"])
@pytest.mark.parametrize("name", ["t5", "bloom", "swinv2"])
def test_attentions_that_are_compiled_one_by_one_attend_here(name, way, is_first):
    """Compiled calls are not watched. Disabling also works under compiled modules."""
    build, inputs = EVERY_TYPE[name]
    model = build()
    expected = _outputs(model, inputs)

    def compile_each() -> None:
        chosen = [
            (parent, key, x) for parent in model.modules() for key, x in parent.named_children() if is_attention(x)
        ]
        for parent, key, attention in chosen:
            if way == "module":
                attention.compile(backend="eager")
            elif way == "forward":
                attention.forward = torch.compile(attention.forward, backend="eager")
            else:
                setattr(parent, key, torch.compile(attention, backend="eager"))

    def is_attention(module: torch.nn.Module) -> bool:
        return type(module).__name__ in ("T5Attention", "BloomAttention", "Swinv2SelfAttention")

    for step in (compile_each, enable_offset_bias) if is_first else (enable_offset_bias, compile_each):
        step(*(() if step is compile_each else (model,)))
    for _ in range(2):
        torch.testing.assert_close(_outputs(model, inputs), expected, rtol=1e-4, atol=1e-4)
    disable_offset_bias(model)
    torch.testing.assert_close(_outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, Replacement) for module in model.modules())
    torch.compiler.reset()


def test_a_copied_layer_gets_its_own_attention_back():
    """The copied layer has a configuration of its own."""
    build, inputs = EVERY_TYPE["beit"]
    model = build()
    enable_offset_bias(model)
    layers = next(x for x in model.modules() if isinstance(x, torch.nn.ModuleList))
    layers[1] = copy.deepcopy(layers[0])
    expected = _outputs(model, inputs)
    disable_offset_bias(model)
    torch.testing.assert_close(_outputs(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_wrapper_that_only_names_the_attention_is_refused():
    """The wrapper keeps the `forward` that it calls in a list."""
    model = models.bloom()
    attention = model.transformer.h[0].self_attention
    kept = [attention.forward]
    attention.forward = functools.update_wrapper(lambda *args, **kwargs: kept[0](*args, **kwargs), attention.forward)
    with pytest.raises(NotImplementedError, match=r"'transformer\.h\.0\.self_attention'"):
        enable_offset_bias(model)


def test_a_dense_bias_given_by_hand_is_refused():
    """An enabled T5 layer takes tables."""
    model = models.t5()
    enable_offset_bias(model)
    with pytest.raises(ValueError, match=r"`position_bias` must be a table, .*got shape \(1, 2, 5, 5\)"):
        model.encoder.block[0].layer[0].SelfAttention(torch.randn(1, 5, 16), position_bias=torch.randn(1, 2, 5, 5))


def test_a_derived_class_is_served_unless_it_overrides_attention(attentions):
    """`fully_shard` and parametrizations derive classes. A subclass with a forward of its own is refused by name."""
    build, inputs = EVERY_TYPE["bloom"]
    model = build()
    expected = _outputs(model, inputs)
    first, second = (block.self_attention for block in model.transformer.h)
    own = type(first)
    first.__class__ = type("ShardedBloomAttention", (own,), {"shards": 2})
    enable_offset_bias(model)
    assert first.shards == 2
    _assert_attends_here(model, inputs, expected, attentions)
    second.__class__ = type("ShardedAfterwards", (type(second),), {})
    _assert_attends_here(model, inputs, expected, attentions)
    disable_offset_bias(model)
    _assert_attends_itself(model, inputs, expected, attentions)
    second.__class__ = type("OtherAttention", (own,), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(NotImplementedError, match=r"h.1.self_attention'.*class OtherAttention overrides forward of"):
        enable_offset_bias(model)

    class CallsSuper(own):
        def train(self, mode=True):
            return super().train(mode)

    second.__class__ = CallsSuper
    with pytest.raises(NotImplementedError, match=r"h.1.self_attention'.*class CallsSuper calls super\(\) in train"):
        enable_offset_bias(model)


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_the_librarys_own_code_finds_the_answers_it_found_before(name):
    """The library initialises weights again, and knows classes by their names."""
    build, inputs = EVERY_TYPE[name]
    model, fast = build(), build()
    names = [type(module).__name__ for module in model.modules()]
    enable_offset_bias(fast)
    assert [type(module).__name__ for module in fast.modules()] == names
    for each in (model, fast):
        torch.manual_seed(3)
        for parameter in each.parameters():
            parameter.data.fill_(0.5)
        for module in each.modules():
            module._is_hf_initialized = False
        each.apply(each._init_weights)
    for (key, x), y in zip(model.state_dict().items(), fast.state_dict().values(), strict=True):
        assert torch.equal(x, y), key
    torch.testing.assert_close(_outputs(fast, inputs), _outputs(model, inputs), rtol=1e-4, atol=1e-4)
