"""GPUs multiply float32 by torch's settings, whichever of its switches was used, and by nothing else."""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from cases import Case, build
from conftest import AVAILABLE

from triton_offset_bias import offset_bias_attention

target = pytest.importorskip(
    "triton_offset_bias.backends.triton.target", reason="Triton is not installed", exc_type=ImportError
)
HAS_SWITCHES = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and later
EMULATED = "triton_offline" in sys.modules and "triton" in AVAILABLE
HOPPER = target.Target("cuda", 90, 232448)
# What a user does, and whether float32 may then be multiplied in TF32.
OLDER = {
    "nothing": (lambda: None, False),
    "allow_tf32": (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
    "set_float32_matmul_precision": (lambda: torch.set_float32_matmul_precision("high"), True),
}


def _use_all_and_one(everywhere: str, for_matmul: str) -> None:
    torch.backends.fp32_precision = everywhere
    torch.backends.cuda.matmul.fp32_precision = for_matmul


NEWER = {
    "matmul.fp32_precision": (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
    "fp32_precision": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), True),
    "tf32, but not for products": (lambda: _use_all_and_one("tf32", "ieee"), False),
    "ieee, but for products": (lambda: _use_all_and_one("ieee", "tf32"), True),
    "ieee": (lambda: setattr(torch.backends, "fp32_precision", "ieee"), False),
}
SETTINGS = {**OLDER, **(NEWER if HAS_SWITCHES else {})}


@pytest.fixture(autouse=True)
def _restored_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if HAS_SWITCHES:  # the line above has set them too
        for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            place.fp32_precision = "none"
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("change", "is_allowed"), SETTINGS.values(), ids=SETTINGS)
def test_float32_is_multiplied_as_torch_is_told_to(change, is_allowed):
    """The older switch, the newer switch, or its parent decides. There is one way to multiply 16-bit numbers."""
    change()
    assert target.precision(HOPPER, torch.float32) == ("tf32" if is_allowed else "ieee")
    assert target.precision(HOPPER, torch.bfloat16) == target.precision(HOPPER, torch.float16) == "ieee"


@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_torch_without_the_newer_switch_is_asked_by_the_older(monkeypatch, is_allowed):
    """torch 2.6 to 2.8 have no newer switch."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(allow_tf32=is_allowed))
    assert target.precision(HOPPER, torch.float32) == ("tf32" if is_allowed else "ieee")


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [("cuda", 75, False), ("cuda", 80, True), ("cuda", 121, True), ("hip", "gfx942", True), ("hip", "gfx950", False)],
)
def test_tf32_is_asked_for_where_triton_has_it(backend, arch, expected):
    """For other targets Triton's compiler would refuse."""
    assert target.Target(backend, arch, 65536).has_tf32 == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the emulator leaves open
@pytest.mark.skipif(not EMULATED, reason="PTXEMU names no folder with the PTX emulator")
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("switch", ["matmul.fp32_precision", "fp32_precision"] if HAS_SWITCHES else ["allow_tf32"])
def test_calls_are_served_after_a_switch(switch, compiles):
    """bfloat16 is served as well. TF32 shows in the digits of float32, compared with the same call without TF32."""
    attention = torch.compile(offset_bias_attention, backend="aot_eager", fullgraph=True)
    if not compiles:
        attention = offset_bias_attention
    torch.compiler.reset()

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        call = build(Case("switched", (40, 50), (32, 32), batch=1, columns=21, dtype=dtype))
        out = attention(call.q, call.k, call.v, call.bias, backend="triton")
        return [out, *torch.autograd.grad(out, [call.q, call.k, call.v, call.bias], call.dout)]

    float32, bfloat16 = results(torch.float32), results(torch.bfloat16)
    SETTINGS[switch][0]()
    assert torch.equal(results(torch.bfloat16)[0], bfloat16[0])
    for before, after in zip(float32, results(torch.float32), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
    assert not torch.equal(results(torch.float32)[0], float32[0])
