"""The modules that compute a bias for every offset are compared with their papers' formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from triton_offset_bias.modules import (
    ALiBiBias,
    FireBias,
    KerpleBias,
    OffsetBiasAttention,
    SandwichBias,
    T5Bias,
    alibi_slopes,
    dense_bias,
)

HEADS = 6
THRESHOLD = 40


def _shaken(module: nn.Module) -> nn.Module:
    """The module with parameters away from their initial values, where zeros and ties would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter).abs())
    return module


def _bucket(offset: int, bidirectional: bool) -> int:
    """The paper's bucket of an offset, for 8 buckets and distances up to 20, in exact arithmetic."""
    per_direction = 4 if bidirectional else 8
    distance = abs(offset) if bidirectional else max(offset, 0)
    exact = per_direction // 2
    if distance >= exact:
        growth = math.log(distance / exact) / math.log(20 / exact)
        distance = min(exact + int(growth * (per_direction - exact)), per_direction - 1)
    return distance + (per_direction if bidirectional and offset < 0 else 0)


def _alibi(p: dict[str, Tensor], o: Tensor) -> Tensor:
    # 4 heads have the exponents 2, 4, 6, 8; the two beyond take the first and third of 8 heads' 1 to 8.
    slopes = 2.0 ** -torch.tensor([2, 4, 6, 8, 1, 3], dtype=torch.float64)
    return -p.get("slopes", slopes)[:, None] * o.abs()


def _fire(p: dict[str, Tensor], o: Tensor) -> Tensor:
    ratio = (p["c"] * o.abs() + 1).log() / (p["c"] * p["limit"] + 1).log()
    hidden = (ratio[:, None] @ p["hidden.weight"].T + p["hidden.bias"]).relu()
    return (hidden @ p["out.weight"].T + p["out.bias"]).T


def _sandwich(p: dict[str, Tensor], o: Tensor) -> Tensor:
    """The inner product of the sinusoidal embeddings of positions 100 + offset and 100."""

    def embed(positions: Tensor) -> Tensor:
        angles = positions[:, None] / 10000 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        return torch.cat([angles.sin(), angles.cos()], -1)

    product = (embed(100 + o) * embed(torch.full_like(o, 100))).sum(-1)
    return product / (torch.arange(1, HEADS + 1)[:, None] * 8 / HEADS)


def _t5(bidirectional: bool):
    return lambda p, o: p["weight"][[_bucket(int(x), bidirectional) for x in o]].T


# Each module, and its formula in float64 from its parameters and the offsets.
MODULES = {
    "T5": (lambda: T5Bias(HEADS, 8, 20), _t5(True)),
    "T5, causal": (lambda: T5Bias(HEADS, 8, 20, bidirectional=False), _t5(False)),
    "ALiBi": (lambda: ALiBiBias(HEADS), _alibi),
    "ALiBi, learnable": (lambda: ALiBiBias(HEADS, learnable=True), _alibi),
    "KERPLE, log": (
        lambda: KerpleBias(HEADS, "log"),
        lambda p, o: -p["raw_r1"].exp()[:, None] * (1 + p["raw_r2"].exp()[:, None] * o.abs()).log(),
    ),
    "KERPLE, power": (
        lambda: KerpleBias(HEADS, "power"),
        lambda p, o: -p["raw_r1"].exp()[:, None] * o.abs() ** (2 / (1 + (-p["raw_r2"]).exp()))[:, None],
    ),
    "FIRE": (lambda: FireBias(HEADS, THRESHOLD, hidden_size=8), _fire),
    "Sandwich": (lambda: SandwichBias(HEADS, 16), _sandwich),
}
every_module = pytest.mark.parametrize(("build", "formula"), MODULES.values(), ids=MODULES)


@every_module
@pytest.mark.parametrize("offsets", [(-37, 37), (0, 37), (-5, -2), (7, 7)])
def test_a_table_and_its_gradients_are_those_of_the_formula(build, formula, offsets):
    """The table is float32 and includes both ends. It and every parameter's gradient are compared with float64."""
    module = _shaken(build())
    parameters = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    expected = formula(parameters, torch.arange(offsets[0], offsets[1] + 1, dtype=torch.float64))
    got = module(*offsets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    if parameters:
        weights = torch.randn_like(got)
        gradients = torch.autograd.grad(got, list(module.parameters()), weights)
        wanted = torch.autograd.grad(expected, list(parameters.values()), weights.double())
        for name, gradient, want in zip(parameters, gradients, wanted, strict=True):
            tolerance = {"rtol": 1e-5, "atol": 1e-6 + 1e-5 * float(want.abs().max())}
            torch.testing.assert_close(
                gradient.double(), want, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@every_module
def test_a_table_is_float32_in_a_half_model_under_autocast(build, formula):
    """The bias has the bits that the rounded parameters give in float32. Without parameters nothing is rounded."""
    module = _shaken(build()).bfloat16()
    rounded = build()
    rounded.load_state_dict(module.state_dict())
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = module(-9, 30)
    assert got.dtype == torch.float32
    assert torch.equal(got, rounded(-9, 30))


@every_module
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_a_module_equals_sdpa_with_its_dense_bias(build, formula, is_causal):
    """Output and the gradients of the input and of every parameter are equal. All but the shared table is float64."""
    layer = OffsetBiasAttention(24, HEADS, _shaken(build()), is_causal=is_causal).double()
    x = torch.randn(2, 33, 24, dtype=torch.float64, requires_grad=True)
    mask = dense_bias(layer.bias, 33, 33).double()
    if is_causal:
        mask = mask.masked_fill(torch.ones(33, 33, dtype=torch.bool).triu(1), float("-inf"))
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (project(x).unflatten(-1, (HEADS, 4)).transpose(1, 2) for project in projections)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    got, dout = layer(x), torch.randn(2, 33, 24, dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    leaves = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(got, list(leaves.values()), dout)
    wanted = torch.autograd.grad(expected, list(leaves.values()), dout)
    for name, gradient, want in zip(leaves, gradients, wanted, strict=True):
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if name.startswith("bias.") else {}
        torch.testing.assert_close(gradient, want, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.abs().max() > 0, name


@every_module
def test_a_module_compiles_without_a_break_in_the_graph(build, formula):
    """A compiled model needs this of its modules."""
    module = _shaken(build())
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(-9, 30), module(-9, 30))


@every_module
def test_a_module_made_without_memory_works_once_it_has_some(build, formula):
    """The module is made on the meta device, as large models are. It then gets memory and a state dict."""
    module = _shaken(build())
    with torch.device("meta"):
        later = build()
    later.to_empty(device=torch.get_default_device())
    later.load_state_dict(module.state_dict())
    assert torch.equal(later(-9, 30), module(-9, 30))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_from_when_fires_numbers_had_no_axis_load_too(assign):
    """They also load into a module that holds the bias. The dict itself stays as it was."""
    saved, loaded = (OffsetBiasAttention(24, HEADS, FireBias(HEADS, THRESHOLD, hidden_size=8)) for _ in range(2))
    _shaken(saved)
    state = saved.state_dict()
    old = {name: x[0] if name in ("bias.c", "bias.limit") else x for name, x in state.items()}
    assert old["bias.limit"].shape == ()
    loaded.load_state_dict(old, assign=assign)
    assert old["bias.limit"].shape == ()
    assert loaded.bias.c.shape == loaded.bias.limit.shape == (1,)
    assert torch.equal(loaded.bias(-9, 30), saved.bias(-9, 30))
    with pytest.raises(RuntimeError, match=r"size mismatch for bias.c: .*torch.Size\(\[2\]\)"):
        loaded.load_state_dict({**state, "bias.c": torch.zeros(2)})


@every_module
def test_every_parameter_and_buffer_has_an_axis(build, formula):
    """`fully_shard` refuses parameters without an axis."""
    module = build()
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    assert [name for name, x in tensors.items() if x.dim() == 0] == []


@pytest.mark.parametrize("limit", [THRESHOLD, 2.5 * THRESHOLD, 0.5 * THRESHOLD])
def test_fire_is_exact_for_every_query_up_to_the_threshold(limit):
    """The paper divides by psi of the larger of L and the query's position.

    The module keeps L at the threshold or above.
    """
    bias = _shaken(FireBias(HEADS, THRESHOLD, hidden_size=8))
    nn.init.constant_(bias.limit, limit)
    p = {name: parameter.detach().double() for name, parameter in bias.named_parameters()}
    positions = torch.arange(THRESHOLD + 1, dtype=torch.float64)
    p["limit"] = positions.clamp(min=max(limit, THRESHOLD))[:, None]
    offsets = positions[:, None] - positions
    ratio = (p["c"] * offsets.abs() + 1).log() / (p["c"] * p["limit"] + 1).log()
    hidden = (ratio[..., None] * p["hidden.weight"][:, 0] + p["hidden.bias"]).relu()
    expected = (hidden @ p["out.weight"].T + p["out.bias"]).permute(2, 0, 1)
    got = dense_bias(bias, THRESHOLD + 1, THRESHOLD + 1)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


BAD_CALLS = {
    "too few buckets": (lambda: T5Bias(2, 3), r"`num_buckets` .*4 .*True, got 3"),
    "a distance within the exact buckets": (lambda: T5Bias(2, 32, 8), r"`max_distance` must exceed the 8 .*got 8"),
    "FIRE beyond its threshold": (lambda: FireBias(2, 10)(0, 11), r"`max_offset` .*10 .*got 11; .*`threshold`"),
    "FIRE too far after": (lambda: FireBias(2, 10)(-11, 0), r"`min_offset` .*10 .*got -11"),
    "FIRE on too long a sequence": (
        lambda: OffsetBiasAttention(8, 2, FireBias(2, 10), is_causal=True)(torch.ones(1, 12, 8)),
        r"`max_offset` .*10 .*got 11",
    ),
    "no threshold": (lambda: FireBias(2, 0), r"`threshold` .*1, got 0"),
    "another kernel": (lambda: KerpleBias(2, "linear"), r"`kind` .*'log', 'power', got 'linear'"),
    "a number that is not positive": (
        lambda: KerpleBias(2, "log").set_values(torch.tensor([1.0, 0.0]), torch.ones(2)),
        r"`r1` must be between 0 and inf.*got \[1.0, 0.0\]",
    ),
    "an exponent beyond its bound": (
        lambda: KerpleBias(2, "power").set_values(torch.ones(2), torch.tensor([1.0, 2.0])),
        r"`r2` must be between 0 and 2.0.*got \[1.0, 2.0\]",
    ),
    "numbers of other heads": (
        lambda: KerpleBias(2, "log").set_values(torch.ones(3), torch.ones(2)),
        r"`r1` must have shape \(2,\), got shape \(3,\)",
    ),
    "an odd width": (lambda: SandwichBias(2, 15), r"`embed_dim` must be even, got 15"),
    "no heads": (lambda: alibi_slopes(0), r"`num_heads` .*1, got 0"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(call, message):
    """The error comes at construction where the mistake can be seen there."""
    with pytest.raises(ValueError, match=message):
        call()


@every_module
def test_an_empty_range_is_an_error(build, formula):
    """An empty table would hide the mistake."""
    with pytest.raises(ValueError, match=r"`max_offset` .*3.*got 2"):
        build()(3, 2)


def test_slopes_are_float32_whatever_torchs_default_is():
    """Half precision would round their exponents."""
    expected = alibi_slopes(12)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(alibi_slopes(12), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_threshold_that_the_parameters_cannot_hold_is_an_error():
    """In float16 the threshold would be infinite, and the bias constant."""
    with pytest.raises(ValueError, match=r"`threshold` must be at most 65504 for torch.float16, got 70000"):
        FireBias(2, threshold=70000).half()(0, 9)


def test_fire_gives_shapes_on_the_meta_device():
    """The meta device has no autocast to turn off."""
    with torch.device("meta"):
        assert FireBias(2, threshold=9)(0, 4).shape == (2, 5)
