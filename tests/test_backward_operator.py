"""The operators as other code calls them: tensors of any strides, and gradients from parts of the keys."""

import itertools
import random
import re
from typing import Any

import pytest
import torch
from conftest import AVAILABLE
from oracle import oracle
from tolerance import assert_accurate
from torch import Tensor

FORWARD = torch.ops.triton_offset_bias.attention.default
BACKWARD = torch.ops.triton_offset_bias.attention_backward.default
GRADIENTS = ("dquery", "dkey", "dvalue", "dbias")
ROWS = ("dout", "dlse", "out", "row_max", "row_sum")  # arguments of the backward operator with a row for every query
fused = pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"])


def _matching(operator, arguments: dict) -> tuple:
    """The arguments in the order of the operator's schema."""
    return tuple(arguments.get(argument.name) for argument in operator._schema.arguments)


def _arguments(len_q: int, len_k: int, dtype: torch.dtype, **others: Any) -> dict:
    """A call of either operator: 4 heads that share 2, a table of 41 columns, causal, no dropout."""
    shapes = {"query": (2, 4, len_q, 16), "key": (2, 2, len_k, 16), "value": (2, 2, len_k, 24)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {
        **tensors,
        "bias": torch.randn(4, 41),
        **{"scale": 0.25, "dropout_p": 0.0, "query_start": len_k - len_q, "min_offset": 0, "max_offset": 2**62},
        **{"bias_origin": 20, "is_causal_by_index": False, "beyond": "clamp", "deterministic": False},
        **{"max_seqlen_q": len_q, "max_seqlen_k": len_k, "needs": [True] * 5},
        **others,
    }


def _with_rows(arguments: dict) -> dict:
    """A call of either operator, the forward operator's results, and gradients of these."""
    out, lse, row_max, row_sum = FORWARD(*_matching(FORWARD, arguments))
    rows = {"out": out, "row_max": row_max, "row_sum": row_sum}
    return {**arguments, **rows, "dout": torch.randn_like(out), "dlse": torch.randn_like(lse)}


def _packed(dtype: torch.dtype) -> dict:
    """Sequences of 9, 0, 14 and 17 tokens, a table each."""
    bounds = torch.tensor([0, 9, 9, 23, 40], dtype=torch.int32)
    arguments = _arguments(40, 40, dtype, bias=torch.randn(4, 4, 41), max_seqlen_q=17, max_seqlen_k=17)
    tensors = {name: arguments[name][:1] for name in ("query", "key", "value")}
    return {**arguments, **tensors, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds.clone()}


CALLS = {
    "padding, dropout": lambda dtype: _arguments(
        *(17, 23, dtype), key_padding_mask=torch.rand(2, 23) < 0.7, seed=torch.tensor(7), dropout_p=0.25
    ),
    "positions, no bias beyond the table": lambda dtype: _arguments(
        *(17, 23, dtype),
        **{"query_positions": torch.randint(0, 30, (2, 17)), "key_positions": torch.randint(0, 30, (2, 23))},
        beyond="zero",
    ),
    "lengths": lambda dtype: _arguments(17, 23, dtype, key_lengths=torch.tensor([23, 9])),
    "one query": lambda dtype: _arguments(1, 45, dtype, bias=torch.randn(41)),
    "packed": _packed,
}


def _odd_view(x: Tensor, draw: random.Random) -> Tensor:
    """Equal to `x`, in memory with its axes in another order and other numbers between its own."""
    last = x.dim() - 1
    order = draw.sample(range(x.dim()), x.dim())
    steps = {axis: draw.randint(1, 3) for axis in order}
    if draw.random() < 0.5:  # rows stay whole
        order = [*(axis for axis in order if axis != last), last]
        steps[last] = 1
    memory = torch.full([x.shape[axis] * steps[axis] + draw.randint(0, 2) for axis in order], 97).to(x.dtype)
    spread = memory[tuple(slice(0, x.shape[axis] * steps[axis], steps[axis]) for axis in order)]
    view = spread.permute([order.index(axis) for axis in range(x.dim())])
    return view.copy_(x)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_the_operators_take_any_strides(backend, call, dtype):
    """Results equal those of contiguous tensors bit for bit.

    First only the rows' tensors have odd strides, then all do.
    """
    draw = random.Random(0)
    arguments = _with_rows(CALLS[call](dtype) | {"backend": backend})
    names = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.dim() > 0]
    assert set(ROWS) < set(names)
    expected = {operator: operator(*_matching(operator, arguments)) for operator in (FORWARD, BACKWARD)}
    for viewed in (ROWS, names):
        others = arguments | {name: _odd_view(arguments[name], draw) for name in viewed}
        for operator, results in expected.items():
            for got, result in zip(operator(*_matching(operator, others)), results, strict=True):
                assert torch.equal(got, result), (operator, viewed)


@fused
def test_gradients_whose_memory_is_one_number(backend):
    """The gradients of a sum have strides 0, for the output and for the log-sum-exp."""
    arguments = _with_rows(CALLS["packed"](torch.float32) | {"backend": backend})
    ones = {name: torch.ones(()).expand(arguments[name].shape) for name in ("dout", "dlse")}
    got = BACKWARD(*_matching(BACKWARD, arguments | ones))
    expected = BACKWARD(*_matching(BACKWARD, arguments | {name: x.contiguous() for name, x in ones.items()}))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def _part(arguments: dict, begin: int, end: int) -> dict:
    """The backward call with only the keys [begin, end)."""
    part = {name: arguments[name][:, :, begin:end] for name in ("key", "value")}
    for name in ("key_padding_mask", "key_positions"):
        if arguments.get(name) is not None:
            part[name] = arguments[name][..., begin:end]
    return arguments | part | {"query_start": arguments["query_start"] - begin, "max_seqlen_k": end - begin}


def _summed_over_parts(arguments: dict, bounds: tuple[int, ...]) -> dict[str, Tensor]:
    pairs = itertools.pairwise(bounds)
    parts = [BACKWARD(*_matching(BACKWARD, _part(arguments, *pair))) for pair in pairs]
    dquery, dkey, dvalue, dbias, _ = zip(*parts, strict=True)
    return dict(zip(GRADIENTS, (sum(dquery), torch.cat(dkey, 2), torch.cat(dvalue, 2), sum(dbias)), strict=True))


PARTS = {
    "a window, halves": (
        (0, 33, 67),
        lambda: {"query_start": 3, "min_offset": -4, "max_offset": 30, "bias": torch.randn(4, 41)},
    ),
    "padding, a part of one key": ((0, 1, 40, 67), lambda: {"key_padding_mask": torch.rand(2, 67) < 0.6}),
    "positions": (
        (0, 50, 67),
        lambda: {"query_positions": torch.randint(0, 40, (2, 51)), "key_positions": torch.arange(67) // 2},
    ),
    "a part that no query sees": ((0, 60, 67), lambda: {"query_start": 3}),
}


def _in_parts(case: str, dtype: torch.dtype, backend: str) -> tuple[tuple[int, ...], dict]:
    """The begins of the parts, and a call. By default the engine counts its table from a constant."""
    bounds, others = PARTS[case]
    arguments = _arguments(51, 67, dtype, **({"bias": 30 + torch.rand(4, 41), "backend": backend} | others()))
    arguments["bias"] = arguments["bias"].to(dtype)
    return bounds, _with_rows(arguments)


@fused
@pytest.mark.parametrize("case", PARTS)
def test_gradients_from_parts_of_the_keys_add_up_to_those_from_all(backend, case):
    """Every part gets the whole rows' output and statistics, and the whole table.

    Some rows attend to keys of one part only.
    """
    bounds, arguments = _in_parts(case, torch.float32, backend)
    truth, same, summed = _oracles(arguments)
    for name, got in _summed_over_parts(arguments, bounds).items():
        assert_accurate(name, got, truth[name], same[name], 1.2e-7, summed if name == "dbias" else None)


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name == "cpp"])
@pytest.mark.parametrize("case", PARTS)
def test_float64_gradients_from_parts_add_up_to_the_last_digits(backend, case):
    """In float64 the gradients differ from the whole's only as sums in another order do."""
    bounds, arguments = _in_parts(case, torch.float64, backend)
    whole = dict(zip(GRADIENTS, BACKWARD(*_matching(BACKWARD, arguments))[:4], strict=True))
    for name, got in _summed_over_parts(arguments, bounds).items():
        torch.testing.assert_close(got, whole[name], rtol=1e-13, atol=1e-14)


@fused
def test_statistics_of_parts_can_be_merged(backend):
    """Two calls with half of the keys each, and one table, give output and gradients of all keys."""
    arguments = _arguments(23, 40, torch.float32, bias=30 + torch.rand(4, 41), backend=backend)
    halves = [_part(arguments, 0, 17), _part(arguments, 17, 40)]
    outs, _, maxima, sums = zip(*(FORWARD(*_matching(FORWARD, half)) for half in halves), strict=True)
    is_empty = [total == 0 for total in sums]
    row_max = torch.stack([x.masked_fill(e, -torch.inf) for x, e in zip(maxima, is_empty, strict=True)]).amax(0)
    shares = [
        total * (x - row_max).exp2().masked_fill(e, 0) for total, x, e in zip(sums, maxima, is_empty, strict=True)
    ]
    row_sum = shares[0] + shares[1]
    merged = _with_rows(arguments)
    out = sum(x * (share / row_sum).unsqueeze(-1) for x, share in zip(outs, shares, strict=True))
    torch.testing.assert_close(out, merged["out"], rtol=2e-5, atol=2e-6)
    expected = BACKWARD(*_matching(BACKWARD, merged))[:4]
    merged |= {"out": out, "row_max": row_max, "row_sum": row_sum}
    got = _summed_over_parts(merged, (0, 17, 40))
    for name, gradient in zip(GRADIENTS, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=5e-5, atol=5e-6)


def _oracles(arguments: dict) -> tuple[dict, dict, Tensor]:
    """The whole's gradients: the truth, those of plain PyTorch, and the sum of |dS| in each column of the table."""
    lowest, highest = arguments["min_offset"], arguments["max_offset"]
    options = {
        **{"dout": arguments["dout"], "dlse": arguments["dlse"], "scale": 0.25, "enable_gqa": True, "bias_origin": 20},
        "window_size": (-1 if highest == 2**62 else highest, -lowest),
        "query_start": None if arguments.get("query_positions") is not None else arguments["query_start"],
    }
    for name in ("key_padding_mask", "query_positions", "key_positions"):
        options[name] = arguments.get(name)
    inputs = [arguments[name] for name in ("query", "key", "value", "bias")]
    truth, same = oracle(*inputs, **options), oracle(*inputs, **options, dtype=torch.float32)
    of = {"dquery": "dq", "dkey": "dk", "dvalue": "dv", "dbias": "dbias"}
    return *({name: getattr(x, short) for name, short in of.items()} for x in (truth, same)), truth.summed


@fused
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out": torch.zeros(2, 4, 8, 24)}, "`out` must have shape (2, 4, 9, 24), got shape (2, 4, 8, 24)"),
        ({"dout": torch.zeros(2, 4, 9, 24, dtype=torch.float64)}, "`dout` must be torch.float32"),
        ({"row_max": torch.zeros(2, 4)}, "`row_max` must have shape (2, 4, 9)"),
        ({"row_sum": torch.zeros(2, 4, 9).half()}, "`row_sum` must be torch.float32 where `query` is torch.float32"),
        ({"dlse": torch.zeros(1, 4, 9)}, "`dlse` must have shape (2, 4, 9), got shape (1, 4, 9)"),
        ({"value": torch.zeros(2, 2, 9, 24)}, "`value` must have `key`'s length 11"),
        ({"key_lengths": torch.tensor([5, -1, 3])}, "`key_lengths` must have shape (2,), got shape (3,)"),
        ({"max_seqlen_k": 12}, "the lengths that this graph was traced for, 9 and 12, got 9 and 11"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_backward_operator_refuses_tensors_that_do_not_fit(backend, wrong, message):
    """Otherwise it would read and write past the ends of tensors."""
    arguments = _with_rows(_arguments(9, 11, torch.float32, backend=backend))
    wrong = {name: x.to(arguments["query"].device) if isinstance(x, Tensor) else x for name, x in wrong.items()}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        BACKWARD(*_matching(BACKWARD, arguments | wrong))
