"""Bad arguments raise an error that names the argument, what was expected and what came. Empty tensors are served."""

import re

import numpy as np
import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of

from triton_offset_bias import offset_bias_attention

NAN = float("nan")
LONG = torch.arange(5)
HERE = torch.get_default_device().type

# What is wrong: the arguments that replace those of a good call, the error, and its message as a pattern.
# The good call: query (2, 4, 5, 8), key (2, 4, 6, 8), value (2, 4, 6, 3), bias (4, 11).
BAD_CALLS = {
    "query is a list": ({"query": [1.0]}, TypeError, r"`query` must be a torch.Tensor, got list"),
    "key is None": ({"key": None}, TypeError, r"`key` must be a torch.Tensor, got NoneType"),
    "bias is a number": ({"bias": 0.5}, TypeError, r"`bias` must be a torch.Tensor.*, got float"),
    "query has three axes": ({"query": torch.ones(4, 5, 8)}, ValueError, r"`query` .*shape .*got shape \(4, 5, 8\)"),
    "value has two axes": ({"value": torch.ones(6, 3)}, ValueError, r"`value` .*shape .*got shape \(6, 3\)"),
    "integer query": ({"query": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, TypeError, r"`query` .*got torch.int64"),
    "complex query": ({"query": torch.ones(2, 4, 5, 8) * 1j}, TypeError, r"`query` .*got torch.complex64"),
    "key of another dtype": (
        {"key": torch.ones(2, 4, 6, 8).double()},
        TypeError,
        r"`key` .*torch.float32.*got torch.float64",
    ),
    "value of another dtype": (
        {"value": torch.ones(2, 4, 6, 3).half()},
        TypeError,
        r"`value` .*torch.float32.*got torch.float16",
    ),
    "key on another device": ({"key": torch.ones(2, 4, 6, 8, device="meta")}, ValueError, rf"`key` .*{HERE}.*got meta"),
    "bias on another device": ({"bias": torch.ones(4, 11, device="meta")}, ValueError, rf"`bias` .*{HERE}.*got meta"),
    "another batch size": ({"key": torch.ones(3, 4, 6, 8)}, ValueError, r"`key` .*batch.* 2.*got shape \(3, 4, 6, 8\)"),
    "another head dim": ({"key": torch.ones(2, 4, 6, 7)}, ValueError, r"`key` .*head_dim 8.*got shape \(2, 4, 6, 7\)"),
    "key and value of different lengths": (
        {"value": torch.ones(2, 4, 7, 3)},
        ValueError,
        r"`value` .*length 6.*got shape \(2, 4, 7, 3\)",
    ),
    "key and value of different heads": (
        {"value": torch.ones(2, 2, 6, 3)},
        ValueError,
        r"`value` .*4 heads.*got shape \(2, 2, 6, 3\)",
    ),
    "head dim 0": (
        {"query": torch.ones(2, 4, 5, 0), "key": torch.ones(2, 4, 6, 0)},
        ValueError,
        r"`query` .*head_dim.*1.*got shape \(2, 4, 5, 0\)",
    ),
    "value head dim 0": ({"value": torch.ones(2, 4, 6, 0)}, ValueError, r"`value` .*1.*got shape \(2, 4, 6, 0\)"),
    "fewer key heads without enable_gqa": (
        {"key": torch.ones(2, 2, 6, 8), "value": torch.ones(2, 2, 6, 3)},
        ValueError,
        r"`key` .*4 heads.*got shape \(2, 2, 6, 8\).*enable_gqa",
    ),
    "key heads that do not divide": (
        {"key": torch.ones(2, 3, 6, 8), "value": torch.ones(2, 3, 6, 3), "enable_gqa": True},
        ValueError,
        r"`key` .*divides.* 4 .*got shape \(2, 3, 6, 8\)",
    ),
    "integer bias": ({"bias": torch.ones(4, 11, dtype=torch.int32)}, TypeError, r"`bias` .*float.*got torch.int32"),
    "bias with four axes": ({"bias": torch.ones(1, 2, 4, 3)}, ValueError, r"`bias` .*\(N,\).*got shape \(1, 2, 4, 3\)"),
    "bias without axes": ({"bias": torch.tensor(1.0)}, ValueError, r"`bias` .*\(N,\).*got shape \(\)"),
    "bias without columns": ({"bias": torch.ones(4, 0)}, ValueError, r"`bias` .*one column.*got shape \(4, 0\)"),
    "bias of other heads": ({"bias": torch.ones(2, 9)}, ValueError, r"`bias` .* 4 heads or 1, got shape \(2, 9\)"),
    "bias of another batch": ({"bias": torch.ones(3, 4, 9)}, ValueError, r"`bias` .*batch.* 2, got shape \(3, 4, 9\)"),
    "float mask": ({"key_padding_mask": torch.ones(2, 6)}, TypeError, r"`key_padding_mask` .*bool.*got torch.float32"),
    "mask of another length": (
        {"key_padding_mask": torch.ones(2, 5) > 0},
        ValueError,
        r"`key_padding_mask` .*\(2, 6\), got shape \(2, 5\)",
    ),
    "mask without batch": (
        {"key_padding_mask": torch.ones(6) > 0},
        ValueError,
        r"`key_padding_mask` .*\(2, 6\), got shape \(6,\)",
    ),
    "sparse queries": ({"query": torch.ones(2, 4, 5, 8).to_sparse()}, TypeError, r"`query` .*strided.*sparse_coo"),
    "a nested table": (
        {"bias": torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)},
        TypeError,
        r"`bias` .*dense.*got a nested tensor",
    ),
    "positions that differ by more than int64 holds": (
        {"query_positions": LONG + 2**62, "key_positions": torch.arange(6) - 2**62, "backend": "cpp"},
        ValueError,
        r"`query_positions` .*-2\*\*61 and 2\*\*61, got 4611686018427387904 to 4611686018427387908",
    ),
    "causality as a number": ({"is_causal": 1}, TypeError, r"`is_causal` must be a bool, got 1"),
    "enable_gqa as a number": ({"enable_gqa": 0}, TypeError, r"`enable_gqa` must be a bool, got 0"),
    "return_lse as a word": ({"return_lse": "yes"}, TypeError, r"`return_lse` must be a bool, got 'yes'"),
    "deterministic as a number": ({"deterministic": 1}, TypeError, r"`deterministic` must be a bool.*, got 1"),
    "dropout above 1": ({"dropout_p": 1.5}, ValueError, r"`dropout_p` .*0 and 1.*got 1\.5"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, r"`dropout_p` .*0 and 1.*got -0\.1"),
    "dropout NaN": ({"dropout_p": NAN}, ValueError, r"`dropout_p` .*0 and 1.*got nan"),
    "dropout as a word": ({"dropout_p": "0.1"}, TypeError, r"`dropout_p` .*float.*got '0\.1'"),
    "scale NaN": ({"scale": NAN}, ValueError, r"`scale` .*finite.*got nan"),
    "scale as a word": ({"scale": "1"}, TypeError, r"`scale` .*float.*got '1'"),
    "scale no float can hold": ({"scale": 10**400}, ValueError, r"`scale` .*finite"),
    "fractional origin": ({"bias_origin": 2.5}, TypeError, r"`bias_origin` .*int.*got 2\.5"),
    "fractional query_start": ({"query_start": 1.0}, TypeError, r"`query_start` .*int.*got 1\.0"),
    "window of three": ({"window_size": (1, 2, 3)}, TypeError, r"`window_size` .*\(left, right\).*got \(1, 2, 3\)"),
    "window as a number": ({"window_size": 4}, TypeError, r"`window_size` .*\(left, right\).*got 4"),
    "fractional window": ({"window_size": (1.0, 2)}, TypeError, r"`window_size` .*int.*got"),
    "negative window": ({"window_size": (-2, 3)}, ValueError, r"`window_size` .*-1.*got \(-2, 3\)"),
    "unknown beyond": ({"beyond": "wrap"}, ValueError, r"`beyond` .*'clamp', 'zero', 'error', got 'wrap'"),
    "attended offsets beyond": (
        {"bias": torch.ones(4, 9), "beyond": "error"},
        ValueError,
        r"`bias` .*-4 to 4.*-4 to 5",
    ),
    "query positions alone": ({"query_positions": LONG}, ValueError, r"`key_positions` .*got None"),
    "key positions alone": ({"key_positions": torch.arange(6)}, ValueError, r"`query_positions` .*got None"),
    "fractional positions": (
        {"query_positions": LONG / 2, "key_positions": torch.arange(6)},
        TypeError,
        r"`query_positions` .*integer.*got torch.float32",
    ),
    "positions of another length": (
        {"query_positions": LONG, "key_positions": LONG},
        ValueError,
        r"`key_positions` .*\(6,\) or \(2, 6\), got shape \(5,\)",
    ),
    "positions of another batch": (
        {"query_positions": LONG.expand(3, 5), "key_positions": torch.arange(6)},
        ValueError,
        r"`query_positions` .*2.*got shape \(3, 5\)",
    ),
    "query_start with positions": (
        {"query_positions": LONG, "key_positions": torch.arange(6), "query_start": 0},
        ValueError,
        r"`query_start` .*None.*positions.*got 0",
    ),
    "lengths as a list": ({"key_lengths": [6, 6]}, TypeError, r"`key_lengths` .*Tensor, got list"),
    "fractional lengths": (
        {"key_lengths": torch.ones(2)},
        TypeError,
        r"`key_lengths` .*int32 or int64, got torch.float32",
    ),
    "a length for all": ({"key_lengths": torch.tensor(6)}, ValueError, r"`key_lengths` .*\(2,\), got shape \(\)"),
    "lengths of another batch": ({"key_lengths": LONG}, ValueError, r"`key_lengths` .*\(2,\), got shape \(5,\)"),
    "lengths on another device": (
        {"key_lengths": LONG[:2].to("meta")},
        ValueError,
        rf"`key_lengths` .*{HERE}.*got meta",
    ),
    "query_start with lengths": (
        {"key_lengths": LONG[:2], "query_start": 0},
        ValueError,
        r"`query_start` .*None.*`key_lengths`.*got 0",
    ),
    "positions with lengths": (
        {"query_positions": LONG, "key_positions": torch.arange(6), "key_lengths": LONG[:2]},
        ValueError,
        r"`key_lengths` .*None.*positions.*got shape \(2,\)",
    ),
    "query_start past int64": ({"query_start": 2**63}, ValueError, r"`query_start` .*9223372036854775808"),
    "query_start before int64": ({"query_start": -(2**63) - 1}, ValueError, r"`query_start` .*-9223372036854775809"),
    "origin past int64": ({"bias_origin": 2**63}, ValueError, r"`bias_origin` .*9223372036854775808"),
    "window past int64": ({"window_size": (2**63, 0)}, ValueError, r"`window_size` .*9223372036854775808"),
    "unknown backend": ({"backend": "cuda"}, ValueError, r"`backend` .*'cpp'.*got 'cuda'"),
    "backend None": ({"backend": None}, (TypeError, ValueError), r"`backend` .*got None"),
    "backend as a list": ({"backend": ["cpp"]}, (TypeError, ValueError), r"`backend` .*got \['cpp'\]"),
}


def _marks(wrong: dict) -> list[pytest.MarkDecorator]:
    """The engine is asked for where it alone looks at the data."""
    return [pytest.mark.cpu_only, pytest.mark.needs_engine] if wrong.get("backend") == "cpp" else []


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [pytest.param(*call, id=name, marks=_marks(call[0])) for name, call in BAD_CALLS.items()],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(wrong, error, message):
    """Each listed call is wrong in one place."""
    good = {
        "query": torch.ones(2, 4, 5, 8),
        "key": torch.ones(2, 4, 6, 8),
        "value": torch.ones(2, 4, 6, 3),
        "bias": torch.ones(4, 11),
    }
    with pytest.raises(error) as raised:
        offset_bias_attention(**{**good, **wrong})
    assert re.search(message, str(raised.value), re.DOTALL), str(raised.value)


def test_numpys_numbers_are_numbers(backend):
    """Such numbers come from a scale, a window or a start that was computed with NumPy."""
    call = build(Case("numbers", (5, 6)))
    inputs = call.q, call.k, call.v, call.bias
    given = {"scale": np.float32(0.5), "query_start": np.int64(2), "bias_origin": np.int32(4)}
    got = offset_bias_attention(*inputs, **given, window_size=(np.int64(3), np.int8(1)), backend=backend)
    plain = {"scale": 0.5, "query_start": 2, "bias_origin": 4, "window_size": (3, 1)}
    assert torch.equal(got, offset_bias_attention(*inputs, **plain, backend=backend))


@pytest.mark.parametrize(
    "far", [{"query_start": 1}, {"query_start": -1}, {"bias_origin": 1}, {"query_start": 1, "bias_origin": 1}], ids=str
)
def test_distances_of_2_to_the_60_clamp_as_any_other(backend, far):
    """Sums of such numbers stay in int64. A distance of 2**60 beyond the table gives the bias of a distance of 1000."""
    call = build(Case("far", (5, 6)))
    outputs = []
    for distance in (1000, 2**60):
        options = {name: sign * distance for name, sign in far.items()}
        outputs.append(offset_bias_attention(call.q, call.k, call.v, call.bias, **options, backend=backend))
    torch.testing.assert_close(outputs[1], outputs[0])


ZERO_SIZE = [
    Case("no sequence", batch=0),
    Case("no sequence, a table each", batch=0, bias="BHN"),
    Case("no query", (0, 5), columns=9),
    Case("no query, causal, no table", (0, 5), bias=None, options={"is_causal": True}),
    Case("no key", (5, 0), columns=9, through_lse=True),
    Case("no key, causal", (5, 0), columns=1, options={"is_causal": True}),
    Case("neither query nor key", (0, 0), columns=3, through_lse=True),
    Case("no head", heads=(0, 0), bias="N"),
    Case("no query in half precision", (0, 5), columns=9, dtype=torch.bfloat16, mask="right padding"),
    Case("no query, an unsuitable table", (0, 5), columns=1, options={"beyond": "error"}),
    Case("no sequence, an unsuitable table", batch=0, columns=1, options={"beyond": "error"}),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ZERO_SIZE, ids=lambda case: case.reason)
def test_zero_sizes_work_forward_and_backward(backend, case):
    """Results are empty, or zeros and -inf for rows without keys. Gradients have the right shape and are zero."""
    call = build(case)
    got = results_of(call, backend)
    assert_matches_oracle(call, got)
    gradients = [x for x in (got.dq, got.dk, got.dv, got.dbias) if x is not None]
    assert all((gradient == 0).all() for gradient in gradients)
    assert (got.out == 0).all()
    assert (got.lse == float("-inf")).all()
