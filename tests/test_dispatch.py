"""The choice of a backend for a call, and the error when none can serve it."""

import warnings

import pytest
import torch

from triton_offset_bias import DenseFallbackWarning, dispatch, offset_bias_attention
from triton_offset_bias.backends.contract import BACKENDS, TORCH_BACKENDS

POSITIONS = {"query_positions": torch.arange(5), "key_positions": torch.arange(5) ** 2}


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """Query, key, value and table of a small call."""
    return [torch.randn(1, 2, 5, 8) for _ in range(3)] + [torch.randn(2, 9)]


@pytest.fixture
def served_by(monkeypatch) -> list[str]:
    """The names of the backends that computed, in order."""
    served = []
    for name, module in BACKENDS.items():
        function = "attention" if name in TORCH_BACKENDS else "forward"
        original = getattr(module, function)

        def compute(*args, name=name, original=original):
            served.append(name)
            return original(*args)

        monkeypatch.setattr(module, function, compute)
    return served


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_auto_takes_the_engine_for_tensors_on_the_cpu(inputs, served_by):
    """The answer equals the answer of backend="cpp" bit for bit."""
    out = offset_bias_attention(*inputs)
    assert served_by == ["cpp"]
    assert torch.equal(out, offset_bias_attention(*inputs, backend="cpp"))


def test_auto_goes_to_the_reference_where_the_engine_has_reasons(inputs, served_by):
    """The engine does not serve head dims above 256. The result equals SDPA's."""
    q, k, v = (torch.randn(1, 2, 5, 300) for _ in range(3))
    with pytest.warns(DenseFallbackWarning):
        out = offset_bias_attention(q, k, v, None)
    assert served_by == ["reference"]
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def _fallbacks(call) -> list[warnings.WarningMessage]:
    """The warnings about the reference that a call shows."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        call()
    return [warning for warning in shown if warning.category is DenseFallbackWarning]


@pytest.fixture
def nothing_shown(monkeypatch) -> None:
    """No cause has been warned of yet."""
    monkeypatch.setattr(dispatch, "_shown", set())


@pytest.mark.usefixtures("nothing_shown")
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_auto_warns_once_for_each_cause_that_leads_to_the_reference(inputs, monkeypatch, compiles):
    """The text has the reasons of the backend for the tensors' device, and the warning has the caller's line."""
    device = inputs[0].device.type
    (mine,) = (name for name, backend in dispatch.FUSED_BACKENDS.items() if device in backend.DEVICES)
    attend = offset_bias_attention
    if compiles:
        attend = torch.compile(attend, backend="eager", fullgraph=True)
    for cause in ("it is tired", "it is old"):
        for name in dispatch.FUSED_BACKENDS:
            why = cause if name == mine else "it is elsewhere"
            monkeypatch.setattr(BACKENDS[name], "unsupported_reasons", lambda problem, why=why: [why])
        torch.compiler.reset()
        shown = _fallbacks(lambda: attend(*inputs))
        assert len(shown) == 1
        text = str(shown[0].message)
        assert f"{mine}: {cause}" in text
        assert "elsewhere" not in text
        assert 'pass backend="reference"' in text
        assert compiles or shown[0].filename == __file__
        torch.compiler.reset()
        assert not _fallbacks(lambda: (attend(*inputs), offset_bias_attention(*inputs)))


@pytest.mark.usefixtures("nothing_shown")
def test_a_reference_that_is_asked_for_warns_of_nothing(inputs):
    """Tensors on the meta device have no memory to save."""
    assert not _fallbacks(lambda: offset_bias_attention(*inputs, backend="reference"))
    assert not _fallbacks(lambda: offset_bias_attention(*(x.to("meta") for x in inputs)))


@pytest.mark.usefixtures("nothing_shown")
def test_a_device_that_no_fused_backend_is_made_for_is_named(inputs, monkeypatch):
    """No other device's reasons are given."""
    for backend in dispatch.FUSED_BACKENDS.values():
        monkeypatch.setattr(backend, "DEVICES", ("xpu",))
        monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: ["it is elsewhere"])
    with pytest.warns(DenseFallbackWarning, match=f"because\n  no fused backend is made for {inputs[0].device.type} "):
        offset_bias_attention(*inputs)


@pytest.mark.needs_engine
def test_a_fallback_that_nobody_expects_fails_a_test(nothing_shown):
    """The warning is an error in these tests, and stays one in the next call."""
    query = torch.randn(1, 2, 5, 300)
    for _ in range(2):
        with pytest.raises(DenseFallbackWarning, match="head dims up to 256"):
            offset_bias_attention(query, query, query, None)


@pytest.mark.needs_engine
@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [POSITIONS, {"dropout_p": 0.25}], ids=["positions", "dropout"])
def test_positions_and_dropout_do_not_leave_the_engine(inputs, served_by, options):
    """With the same seed the engine drops the weights that the reference drops."""
    torch.manual_seed(3)
    expected = offset_bias_attention(*inputs, **options, backend="reference")
    served_by.clear()
    torch.manual_seed(3)
    torch.testing.assert_close(offset_bias_attention(*inputs, **options), expected)
    assert served_by == ["cpp"]


def test_a_named_backend_never_falls_back_and_lists_all_of_its_reasons():
    """One error names the backend and every reason it has."""
    q, k, v = (torch.randn(1, 2, 5, 300, device="meta") for _ in range(3))
    with pytest.raises(NotImplementedError) as raised:
        offset_bias_attention(q, k, v, None, backend="cpp")
    for part in ("cpp", "256", "CPU tensors, got meta"):
        assert part in str(raised.value)


def test_the_gpu_backend_does_not_serve_tensors_on_the_cpu(inputs):
    """It says why, in one line after its name."""
    with pytest.raises(NotImplementedError, match=r"triton: .+"):
        offset_bias_attention(*(x.cpu() for x in inputs), backend="triton")


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(inputs):
    """A typing mistake must not mean "auto"."""
    with pytest.raises(ValueError, match=r"`backend` .*'auto', 'cpp', 'triton', 'reference', got 'tritn'"):
        offset_bias_attention(*inputs, backend="tritn")


def test_when_no_backend_serves_one_error_lists_each_with_its_reasons(inputs, monkeypatch):
    """The error has one line for each backend."""
    for name, module in BACKENDS.items():
        monkeypatch.setattr(module, "unsupported_reasons", lambda problem, name=name: [f"{name} is tired", "and old"])
    with pytest.raises(NotImplementedError) as raised:
        offset_bias_attention(*inputs)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("no backend supports")
    assert [line.strip() for line in lines[1:]] == [f"{name}: {name} is tired; and old" for name in BACKENDS]
