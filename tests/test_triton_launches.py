"""The GPU kernels that a backward pass launches. None works for gradients that nobody asks for."""

import pytest
import torch
from cases import Case, build
from conftest import AVAILABLE

from triton_offset_bias import offset_bias_attention

passes = pytest.importorskip("triton_offset_bias.backends.triton.passes", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)
BY_TILES = {"deterministic": True}
LAUNCHES = {
    "all": ("q k v bias", {}, {"dquery": "diagonals", "dkey_dvalue": None}),
    "all, deterministic": ("q k v bias", BY_TILES, {"dquery": "none", "dkey_dvalue": None}),
    "a frozen table": ("q k v", {}, {"dquery": "none", "dkey_dvalue": None}),
    "queries alone": ("q", {}, {"dquery": "none"}),
    "keys alone": ("k", {}, {"dkey_dvalue": None}),
    "values alone": ("v", {}, {"dkey_dvalue": None}),
    "the table alone": ("bias", {}, {"dquery": "diagonals"}),
    "the table alone, deterministic": ("bias", BY_TILES, {}),
}


@pytest.mark.parametrize(("needed", "options", "expected"), LAUNCHES.values(), ids=LAUNCHES)
def test_only_what_is_asked_for_is_launched(monkeypatch, needed, options, expected):
    """The test compares the kernels' names, and the way in which the dQ kernel adds up the table's gradient."""
    launched = {}

    def record(kernel, config, blocks, others, arguments, constants, **named):
        launched[kernel.__name__.removesuffix("_kernel")] = constants.get("DBIAS")
        return launch(kernel, config, blocks, others, arguments, constants, **named)

    call = build(Case("launches", (40, 40), columns=9))
    for name in ("q", "k", "v", "bias"):
        getattr(call, name).requires_grad_(name in needed.split())
    out = offset_bias_attention(call.q, call.k, call.v, call.bias, **options, backend="triton")
    launch = passes.run_kernel
    monkeypatch.setattr(passes, "run_kernel", record)
    out.backward(call.dout)
    assert launched == expected


def test_without_gradients_nothing_is_kept_for_a_backward_pass():
    """Inference has no graph."""
    call = build(Case("inference", (40, 40)))
    with torch.no_grad():
        assert offset_bias_attention(call.q, call.k, call.v, call.bias, backend="triton").grad_fn is None
