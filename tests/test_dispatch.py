"""The choice of a backend for a call, and the error when none can serve it."""

import pytest
import torch

from triton_offset_bias import offset_bias_attention
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
    out = offset_bias_attention(q, k, v, None)
    assert served_by == ["reference"]
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


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
