"""Random calls of the CPU engine against the reference, with any shapes, strides, masks, tables, positions and dtypes.

Sizes are small, and every tensor ends where its memory ends, so that a sanitizer sees an access past it
(`tests/sanitized/run.py`). `FUZZ_EXAMPLES=N` draws N calls a test, other ones each time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import GATED_NAMES, Results
from tolerance import assert_accurate
from torch import Tensor

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.needs_engine,
]
EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "")
bounded = settings(
    max_examples=int(EXAMPLES or 40),
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([1, 47, 48, 49, 95, 96, 97, 191, 192, 193]))
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 255, 256]))
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float32, torch.float64])
TABLE_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
FAR = st.sampled_from([-(2**61) + 1, -(2**40), 2**40, 2**61 - 1])
DROPOUT_SEED = 3


@dataclass
class Drawn:
    """A call: query, key, value, the table or None, more arguments, keywords, incoming gradients, threads, the gate."""

    function: Callable
    inputs: list[Tensor | None]
    arguments: list
    options: dict
    dout: Tensor
    dlse: Tensor
    threads: int
    gate: Tensor | None = None

    def results(self, backend: str, dtype: torch.dtype | None = None) -> Results:
        """Output, log-sum-exp and gradients, with the floating-point tensors in `dtype` if there is one."""
        leaves = [None if x is None else x.detach().to(dtype or x.dtype) for x in (*self.inputs, self.gate)]
        given = [x for x in leaves if x is not None]
        for x in given:
            x.requires_grad_()
        torch.manual_seed(DROPOUT_SEED)
        *inputs, gate = leaves
        options = {**self.options, "bias_gate": gate, "return_lse": True, "backend": backend}
        out, lse = self.function(*inputs, *self.arguments, **options)
        gradients = torch.autograd.grad([out, lse], given, [self.dout.to(out.dtype), self.dlse.to(lse.dtype)])
        return Results(out.detach(), lse.detach(), *gradients)


def assert_matches_reference(drawn: Drawn) -> None:
    """The rule of `tolerance`, in which a drawn call may also err as sums of the largest terms in any order do."""
    torch.set_num_threads(drawn.threads)
    got, same, truth = drawn.results("cpp"), drawn.results("reference"), drawn.results("reference", torch.float64)
    query, *_ = rows = drawn.inputs[:3]
    largest = max((float(x.abs().max()) for x in rows if x.numel()), default=0.0)
    score = query.shape[-1] * largest**2
    incoming = float(drawn.dout.double().abs().sum()) * largest + float(drawn.dlse.double().abs().sum())
    rounding = torch.finfo(torch.promote_types(query.dtype, torch.float32)).eps
    if drawn.gate is not None and drawn.gate.numel():
        factors = [float(x.abs().max()) for x in (drawn.gate, drawn.inputs[3])]
        score += drawn.gate.numel() / max(1, drawn.dlse.numel()) * factors[0] * factors[1]
        incoming *= max(1.0, *factors)
    for name in GATED_NAMES:
        value = getattr(got, name)
        if value is None:
            continue
        eps = torch.finfo(value.dtype).eps
        eps = 8 * eps if value.dtype == torch.float64 else eps  # the float64 truth rounds too
        terms = (1 + score) * rounding * (incoming if name.startswith("d") else largest)
        if name.startswith("d"):  # gradients are made from an output that was rounded
            terms += torch.finfo(query.dtype).eps * incoming
        assert_accurate(name, value, getattr(truth, name).double(), getattr(same, name), eps, torch.tensor(terms / eps))


@pytest.fixture(autouse=True)
def _restored_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@st.composite
def tensors(draw, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Random values with the axes in any order in memory, gaps between elements, and no memory around them."""
    strides, span = [0] * 4, 1
    for axis in draw(st.permutations(range(4))):
        strides[axis] = span * draw(st.sampled_from([1, 1, 1, 2, 3]))
        span = strides[axis] * max(shape[axis], 1)
    values = torch.randn(shape, dtype=torch.float32).to(dtype)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if values.numel() else 0
    return torch.empty(size, dtype=dtype).as_strided(shape, strides).copy_(values)


@st.composite
def tables(draw, batch: int, heads: int) -> Tensor | None:
    """A table of one of the shapes that there are, with or without forbidden offsets."""
    shapes = {"N": (), "1N": (1,), "HN": (heads,), "B1N": (batch, 1), "BHN": (batch, heads)}
    kind = draw(st.sampled_from([None, *shapes]))
    if kind is None:
        return None
    table = torch.randn(*shapes[kind], draw(st.integers(1, 80)), dtype=draw(TABLE_DTYPES))
    return table.masked_fill(torch.rand(table.shape) < draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])), float("-inf"))


@st.composite
def gated_tables(draw, rows: tuple[int, ...], batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """A table and a gate for the rows of queries. Often the table is short, so that most pairs are beyond it."""
    shapes = {"N": (), "1N": (1,), "HN": (heads,), "B1N": (batch, 1), "BHN": (batch, heads)}
    rank = draw(st.sampled_from([None, 1, 2, 3, 8, 15, 16, 17, 33, 64, 100, 256]))
    ranks = () if rank is None else (rank,)
    axes = (*shapes[draw(st.sampled_from(list(shapes)))], *ranks, draw(st.integers(1, 300)))
    gate = torch.randn(*rows, *ranks, dtype=draw(TABLE_DTYPES))
    gate = gate.mT.contiguous().mT if draw(st.booleans()) else gate
    return torch.randn(axes, dtype=draw(TABLE_DTYPES)) / sum(ranks, start=1) ** 0.5, gate


@st.composite
def placements(draw, batch: int, len_q: int, len_k: int) -> dict:
    """The places of queries and keys: a start, position tensors, lengths, or none of them."""
    kind = draw(st.sampled_from(["default", "start", "positions", "lengths"]))
    if kind == "default":
        return {}
    if kind == "lengths":
        return {
            "key_lengths": torch.randint(0, len_k + 1, (batch,)).to(draw(st.sampled_from([torch.int32, torch.int64])))
        }
    if kind == "start":
        return {"query_start": draw(st.one_of(st.integers(-60, 60), FAR))}
    positions = {}
    for name, length in (("query_positions", len_q), ("key_positions", len_k)):
        shape = draw(st.sampled_from([(length,), (batch, length), (1, length)]))
        dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int8, torch.uint8]))
        positions[name] = torch.randint(0, draw(st.integers(1, 120)), shape).to(dtype)
        if len(shape) == 2:
            positions[name] = positions[name].expand(batch, length)
    is_by_index = draw(st.booleans())
    return positions | ({"is_causal": True, "causal_by": "index"} if is_by_index else {})


@st.composite
def shared_options(draw) -> dict:
    """The keywords that both functions take."""
    sides = st.one_of(st.just(-1), st.integers(0, 60), st.just(2**61 - 1))
    return {
        "is_causal": draw(st.booleans()),
        "window_size": (draw(sides), draw(sides)),
        "scale": draw(st.sampled_from([None, None, 0.0, -0.5])),
        "bias_origin": draw(st.one_of(st.none(), st.integers(-60, 60), FAR)),
        "beyond": draw(st.sampled_from(["clamp", "zero"])),
        "enable_gqa": True,
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
    }


@st.composite
def calls(draw) -> Drawn:
    """A call of `offset_bias_attention`."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    batch, heads_kv, group, dtype = draw(st.integers(0, 2)), *(draw(st.integers(1, 3)) for _ in "kg"), draw(DTYPES)
    heads, len_q, len_k, dim, dim_v = heads_kv * group, draw(LENGTHS), draw(LENGTHS), draw(DIMS), draw(DIMS)
    options = draw(shared_options()) | draw(placements(batch, len_q, len_k))
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(batch, len_k) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.95]))
    shapes = [(batch, heads, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim_v)]
    table, gate = draw(tables(batch, heads)), None
    if draw(st.booleans()):
        table, gate = draw(gated_tables((batch, heads, len_q), batch, heads))
    return Drawn(
        offset_bias_attention,
        [*(draw(tensors(shape, dtype)) for shape in shapes), table],
        [],
        options,
        draw(tensors((batch, heads, len_q, dim_v), dtype)),
        torch.randn(batch, heads, len_q) * draw(st.sampled_from([0, 1])),
        draw(st.integers(1, 3)),
        gate,
    )


@st.composite
def packed_calls(draw) -> Drawn:
    """A call of `offset_bias_attention_varlen`."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 130)), min_size=1, max_size=4)
    pairs = torch.tensor(draw(lengths), dtype=torch.int32)
    bounds = torch.cat([torch.zeros(1, 2, dtype=torch.int32), pairs.cumsum(0).int()])
    (total_q, total_k), (max_q, max_k) = bounds[-1].tolist(), pairs.amax(0).tolist()
    heads_kv, group, dtype = *(draw(st.integers(1, 3)) for _ in "kg"), draw(DTYPES)
    heads, dim, dim_v = heads_kv * group, draw(DIMS), draw(DIMS)
    shapes = [(1, total_q, heads, dim), (1, total_k, heads_kv, dim), (1, total_k, heads_kv, dim_v)]
    table, gate = draw(tables(len(pairs), heads)), None
    if draw(st.booleans()):
        table, gate = draw(gated_tables((total_q, heads), len(pairs), heads))
    return Drawn(
        offset_bias_attention_varlen,
        [*(draw(tensors(shape, dtype))[0] for shape in shapes), table],
        [bounds[:, 0], bounds[:, 1].contiguous(), max_q + draw(st.integers(0, 9)), max_k + draw(st.integers(0, 9))],
        draw(shared_options()),
        draw(tensors((1, total_q, heads, dim_v), dtype))[0],
        torch.randn(heads, total_q) * draw(st.sampled_from([0, 1])),
        draw(st.integers(1, 3)),
        gate,
    )


@bounded
@given(calls())
def test_drawn_calls_are_as_accurate_as_the_reference(drawn):
    """Output, log-sum-exp and every gradient of each call are compared."""
    assert_matches_reference(drawn)


@bounded
@given(packed_calls())
def test_drawn_packed_calls_are_as_accurate_as_the_reference(drawn):
    """Output, log-sum-exp and every gradient are compared. The reference takes each sequence by itself."""
    assert_matches_reference(drawn)
