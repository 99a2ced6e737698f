"""Results in float16 and bfloat16 are rounded once, to nearest, without drift, also subnormal numbers."""

import pytest
import torch
from cases import Case, build, results_of
from oracle import oracle

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.backends import cpp


@pytest.mark.parametrize("dim", [7, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_results_are_rounded_to_nearest(precise_backend, dtype, dim):
    """Four keys with equal scores make the softmax exact. Results are then compared bit for bit."""
    q, k = torch.zeros(1, 2, 3, 16, dtype=dtype), torch.randn(1, 2, 4, 16).to(dtype)
    v, dout = torch.randn(1, 2, 4, dim).to(dtype), torch.randn(1, 2, 3, dim).to(dtype)
    v.requires_grad_()
    out = offset_bias_attention(q, k, v, None, backend=precise_backend)
    assert torch.equal(out, v.float().mean(2, keepdim=True).to(dtype).expand_as(out))
    (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.equal(dv, (dout.float().sum(2, keepdim=True) / 4).to(dtype).expand_as(dv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_to_half_do_not_drift(precise_backend, dtype):
    """Roundings err to either side. Summed over all results they come to far less than eps of the results' sum."""
    call = build(Case("half", (64, 96), heads=(2, 2), dtype=dtype))
    got = results_of(call, precise_backend)
    ref64 = oracle(call.q, call.k, call.v, call.bias, dout=call.dout, **call.options)
    for name in ("out", "dq", "dk", "dv"):
        truth = getattr(ref64, name)
        drift = ((getattr(got, name).double() - truth) * truth.sign()).sum() / truth.abs().sum()
        assert abs(drift) < 0.05 * torch.finfo(dtype).eps, f"{name}: {drift:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_results_are_float32_results_rounded_to_nearest(precise_backend, dtype):
    """Results without rounded intermediates equal the results of a float32 call, rounded once."""
    if precise_backend == "cpp" and dtype == torch.bfloat16 and "bfloat16 products" in cpp.build_description():
        pytest.skip("this build rounds the softmax to bfloat16")
    half = build(Case("half", (61, 67), (24, 40), heads=(4, 2), dtype=dtype, options={"is_causal": True}))
    full = build(Case("full", (61, 67), (24, 40), heads=(4, 2), options={"is_causal": True}))
    for name in ("q", "k", "v", "dout"):
        setattr(full, name, getattr(half, name).detach().float().requires_grad_())
    got, expected = results_of(half, precise_backend), results_of(full, precise_backend)
    assert torch.equal(got.lse, expected.lse)
    for name in ("out", "dv"):
        assert torch.equal(getattr(got, name), getattr(expected, name).to(dtype)), name


@pytest.mark.parametrize("dim", [7, 16])
def test_small_float16_values_keep_their_digits(precise_backend, dim):
    """Subnormal halves pass through reading, arithmetic and writing. The tolerance rule would not see their loss."""
    q, k = torch.randn(1, 1, 8, 16).half(), torch.randn(1, 1, 12, 16).half()
    v = (torch.randint(1, 500, (1, 1, 12, dim)).double() * 2**-24).half()
    out = offset_bias_attention(q, k, v, None, backend=precise_backend)
    ref64 = oracle(q, k, v, None).out
    assert (out.double() - ref64).abs().max() <= 2**-25 * 1.001
