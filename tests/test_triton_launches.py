"""The GPU kernels that a backward pass launches. None works for gradients that nobody asks for."""

import pytest
import torch
from cases import Case, build
from conftest import AVAILABLE

from triton_offset_bias import offset_bias_attention

launch = pytest.importorskip("triton_offset_bias.backends.triton.launch", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)
BY_TILES = {"deterministic": True}
LAUNCHES = {
    "all": ("q k v bias", {}, ["prepare", "dkey_dvalue", "fold"]),
    "all, deterministic": ("q k v bias", BY_TILES, ["prepare", "dquery none", "dkey_dvalue", "dbias", "fold"]),
    "a frozen table": ("q k v", {}, ["prepare", "dkey_dvalue"]),
    "a frozen table, deterministic": ("q k v", BY_TILES, ["prepare", "dquery none", "dkey_dvalue"]),
    "frozen queries": ("k v bias", {}, ["prepare", "dquery diagonals", "dkey_dvalue", "fold"]),
    "queries alone": ("q", {}, ["prepare", "dquery none"]),
    "keys alone": ("k", {}, ["prepare", "dkey_dvalue"]),
    "values alone": ("v", {}, ["prepare", "dkey_dvalue"]),
    "the table alone": ("bias", {}, ["prepare", "dquery diagonals", "fold"]),
    "the table alone, deterministic": ("bias", BY_TILES, ["prepare", "dbias", "fold"]),
}


@pytest.mark.parametrize(("needed", "options", "expected"), LAUNCHES.values(), ids=LAUNCHES)
def test_only_what_is_asked_for_is_launched(monkeypatch, needed, options, expected):
    """The test compares the kernels' names, and the way in which the dQ kernel adds up the table's gradient."""
    launched = []

    def record(self, *arguments):
        name = self.kernel.__name__.removesuffix("_kernel")
        launched.append(" ".join([name, *([self.constants["DBIAS"]] if name == "dquery" else [])]))
        return launch_it(self, *arguments)

    call = build(Case("launches", (40, 40), columns=9, dtype=torch.float16))
    for name in ("q", "k", "v", "bias"):
        getattr(call, name).requires_grad_(name in needed.split())
    out = offset_bias_attention(call.q, call.k, call.v, call.bias, **options, backend="triton")
    launch_it = launch.Launch.__call__
    monkeypatch.setattr(launch.Launch, "__call__", record)
    out.backward(call.dout)
    assert launched == expected


def test_a_remembered_plan_serves_its_layout_alone():
    """Calls of equal shapes follow one another, with strides, options and dtypes that come back."""
    shape, table = (1, 2, 40, 16), torch.randn(2, 9)
    plain = torch.randn(3, *shape)
    transposed = plain.transpose(2, 3).contiguous().transpose(2, 3)
    for q, k, v in (plain, transposed, plain, plain.half(), transposed):
        for is_causal in (False, True, False):
            options = {"is_causal": is_causal, "scale": -0.5 if is_causal else None}
            got, expected = (
                offset_bias_attention(q, k, v, table, **options, backend=name) for name in ("triton", "reference")
            )
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("poisoned_memory")
def test_sums_of_the_tables_gradient_begin_at_zero_in_each_call():
    """Memory holds NaN before, and the same layout comes twice."""
    call = build(Case("sums", (40, 40), columns=9, dtype=torch.float16))
    for _ in range(2):
        (dbias,) = torch.autograd.grad(
            offset_bias_attention(call.q, call.k, call.v, call.bias, deterministic=False, backend="triton"),
            call.bias,
            call.dout,
        )
        assert dbias.isfinite().all()


def test_without_gradients_nothing_is_kept_for_a_backward_pass():
    """Inference has no graph."""
    call = build(Case("inference", (40, 40)))
    with torch.no_grad():
        assert offset_bias_attention(call.q, call.k, call.v, call.bias, backend="triton").grad_fn is None
