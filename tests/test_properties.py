"""Properties of random calls over the whole argument space: the tolerance rule, sums, shifts, permutations.

`HYPOTHESIS_PROFILE=thorough` draws more calls, and new calls every time.
"""

import os
from typing import Any

import pytest
import torch
from cases import Call, Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import NAMES

# The interpreter of the GPU kernels takes seconds for what the others do in milliseconds.
EXAMPLES = {"cpp": 40, "reference": 15, "triton": 4}
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def _settings(name: str) -> settings:
    return settings(
        max_examples=EXAMPLES[name] * (20 if THOROUGH else 1),
        deadline=None,
        derandomize=not THOROUGH,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def _positions(draw: st.DrawFn, batch: int, length: int) -> torch.Tensor:
    """Shared or for each sequence; in order or not, equal ones too."""
    shape = (length,) if draw(st.booleans()) else (batch, length)
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**20)))
    positions = torch.randint(-length, 2 * length, shape, generator=generator)
    return positions.sort(-1).values if draw(st.booleans()) else positions


@st.composite
def options_of(draw: st.DrawFn, batch: int, len_q: int, len_k: int) -> dict[str, Any]:
    """Keywords that any call may have, alone and together."""
    options: dict[str, Any] = {
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.0, -0.3, 0.7])),
        "bias_origin": draw(st.none() | st.integers(-5, 20)),
        "beyond": draw(st.sampled_from(["clamp", "zero"])),
        "window_size": (draw(st.integers(-1, 12)), draw(st.integers(-1, 12))),
        "deterministic": draw(st.booleans()),
    }
    place = draw(st.sampled_from(["default", "start", "positions"]))
    if place == "start":
        options["query_start"] = draw(st.integers(-10, 40))
    elif place == "positions":
        options["query_positions"] = _positions(draw, batch, len_q)
        options["key_positions"] = _positions(draw, batch, len_k)
    if draw(st.integers(0, 7)) == 7:
        options["dropout_p"] = draw(st.sampled_from([0.2, 0.6]))
    return options


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Case:
    """A random call, around the sizes of blocks and vectors."""
    heads_kv = draw(st.integers(1, 3))
    batch, lengths = draw(st.integers(1, 3)), (draw(st.integers(1, 70)), draw(st.integers(1, 70)))
    bias, columns = draw(st.sampled_from([None, "N", "HN", "1N", "BHN", "B1N"])), draw(st.integers(1, 150))
    forbidden = draw(st.lists(st.integers(0, columns - 1), max_size=3)) if bias else []
    return Case(
        "random",
        lengths,
        (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        batch,
        (heads_kv * draw(st.integers(1, 3)), heads_kv),
        bias,
        columns,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
        draw(st.sampled_from([None, None, "right padding", "left padding", "holes", "one sequence has no key"])),
        tuple(forbidden),
        draw(st.sampled_from(["contiguous", "transposed BLHD", "slice of a packed qkv", "every other element"])),
        draw(st.booleans()),
        options=draw(options_of(batch, *lengths)),
    )


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    half = (torch.float32, torch.bfloat16, torch.float16)
    return half if name == "triton" else (*half, torch.float64)


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_result_of_a_random_call_obeys_the_tolerance_rule(name):
    """Output, log-sum-exp and all gradients are compared with the oracle."""

    @_settings(name)
    @given(cases(_dtypes(name)))
    def check(case: Case) -> None:
        call = build(case)
        assert_matches_oracle(call, results_of(call, name))

    check()


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_tables_gradient_sums_to_zero_and_a_constant_in_it_changes_nothing(name):
    """Each pair must read the table, so no pair may fall beyond it under "zero"."""

    @_settings(name)
    @given(cases((torch.float32,)), st.floats(-3.0, 3.0))
    def check(case: Case, constant: float) -> None:
        kind = case.bias or "HN"
        call = build(Case(**{**vars(case), "bias": kind, "bias_dtype": torch.float32, "through_lse": False}))
        call.options["beyond"] = "clamp"
        before = results_of(call, name)
        size = before.dbias.abs().sum(-1).clamp(min=1.0)
        assert (before.dbias.sum(-1).abs() <= 1e-5 * size * call.q.shape[0]).all()
        with torch.no_grad():
            call.bias += constant
        after = results_of(call, name)
        after.lse -= constant
        for what in NAMES:
            wanted = getattr(before, what).detach()
            largest = wanted.where(wanted.isfinite(), 0.0).abs().max().clamp(min=1.0)
            torch.testing.assert_close(getattr(after, what), wanted, rtol=0.0, atol=3e-5 * float(largest))

    check()


def _permuted(call: Call, order: torch.Tensor) -> Call:
    """The tensors with their sequences in another order; tensors that sequences share stay as they are."""

    def permute(x: torch.Tensor | None, is_shared: bool = False) -> torch.Tensor | None:
        return x if x is None or is_shared else x.detach()[order].requires_grad_(x.requires_grad)

    options = {
        key: permute(x, is_shared=x.dim() == 1) if isinstance(x, torch.Tensor) else x for key, x in call.options.items()
    }
    bias = permute(call.bias, is_shared=call.bias is None or call.bias.dim() < 3)
    return Call(*(permute(x) for x in (call.q, call.k, call.v)), bias, permute(call.dout), permute(call.dlse), options)


@pytest.mark.parametrize("name", AVAILABLE)
def test_permuting_the_batch_permutes_the_results(name):
    """A shared table's gradient stays the same, except for the order of its sum."""

    @_settings(name)
    @given(cases((torch.float32,)), st.randoms(use_true_random=False))
    def check(case: Case, random: Any) -> None:
        call = build(case)
        call.options.pop("dropout_p", None)  # what is dropped depends on the place in the batch
        order = torch.tensor(random.sample(range(case.batch), case.batch))
        expected, got = results_of(call, name), results_of(_permuted(call, order), name)
        for what in NAMES:
            wanted, value = getattr(expected, what), getattr(got, what)
            if wanted is None:
                continue
            is_shared = what == "dbias" and wanted.dim() < 3
            torch.testing.assert_close(value, wanted if is_shared else wanted[order], rtol=1e-5, atol=1e-5)

    check()
