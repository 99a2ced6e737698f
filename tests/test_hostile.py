"""Numbers that real training does not make on purpose: huge, tiny, infinite, NaN; and tensors that reach very far.

NaN and +inf are never hidden: where the reference's result is not finite, no backend's is. Nor do they spread: those of
a query reach its own row of the output alone, and none another head or sequence.
"""

from dataclasses import replace

import pytest
import torch
from cases import Call, Case, assert_matches_oracle, build, results_of
from oracle import NAMES, Results, oracle
from torch import Tensor

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

INF = float("inf")
LONG = Case("hostile", (100, 110), (32, 16), through_lse=True)


def changed(case: Case, **changes) -> Call:
    """The call of a case with functions applied to some of its tensors, by name."""
    call = build(case)
    for name, change in changes.items():
        value = change(getattr(call, name).detach().clone())
        setattr(call, name, value.requires_grad_(getattr(call, name).requires_grad))
    return call


TABLES = {
    "raised by 1000": (LONG, lambda bias: bias + 1000),
    "lowered by 1000, one offset forbidden": (
        LONG,
        lambda bias: (bias - 1000).index_fill(-1, torch.tensor([110]), -INF),
    ),
    "each head's raised by another constant": (LONG, lambda bias: bias + torch.tensor([[1e4], [-3e4]])),
    "each sequence's raised by another constant": (
        replace(LONG, bias="BHN"),
        lambda bias: bias + torch.tensor([1000.0, -3000.0])[:, None, None],
    ),
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize(("case", "change"), TABLES.values(), ids=TABLES)
def test_a_constant_on_the_table_costs_no_accuracy(backend, case, change, options):
    """Every result obeys the rule, although float32 scores of a thousand have only four digits after the point."""
    call = changed(replace(case, options={**case.options, **options}), bias=change)
    assert_matches_oracle(call, results_of(call, backend))


def test_no_bias_beyond_a_table_is_no_large_number(backend):
    """Pairs beyond a table of -1000 carry all the weight.

    Counted from the table's constant, their scores would be 1000.
    """
    call = changed(replace(LONG, columns=21, options={"beyond": "zero"}), bias=lambda bias: bias - 1000)
    assert_matches_oracle(call, results_of(call, backend))


def test_each_packed_sequence_has_its_own_constant(backend):
    """This includes a sequence without queries, and a sequence without keys."""
    lengths_q, lengths_k = (5, 0, 3, 9), (7, 4, 0, 30)
    bounds_q, bounds_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    q, k, v = torch.randn(17, 2, 8), torch.randn(41, 2, 8), torch.randn(41, 2, 8)
    bias = torch.randn(4, 2, 9) + torch.tensor([1000.0, -1000.0, 500.0, 3000.0])[:, None, None]
    out, lse = offset_bias_attention_varlen(q, k, v, bias, bounds_q, bounds_k, 9, 30, return_lse=True, backend=backend)
    for s in range(4):
        queries, keys = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        expected, expected_lse = offset_bias_attention(
            *(x.transpose(0, 1)[None].double() for x in (q[queries], k[keys], v[keys])),
            bias[s].double(), return_lse=True, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out[queries].transpose(0, 1)[None].double(), expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(lse[:, queries][None].double(), expected_lse, rtol=1e-6, atol=0)


POSITIONS = {"query_positions": torch.arange(100) * 3 % 71, "key_positions": torch.arange(110) * 5 % 83}


@pytest.mark.parametrize(
    "case", [Case("decoding", (1, 300)), replace(LONG, options=POSITIONS)], ids=["one query", "positions"]
)
@pytest.mark.parametrize("constant", [1024.0, -1024.0])
def test_a_constant_on_the_table_changes_the_log_sum_exp_alone(backend, case, constant):
    """A table of multiples of 1/8 takes 1024 more without rounding. Only arithmetic could lose digits."""
    plain = changed(case, bias=lambda bias: (8 * bias).round() / 8)
    raised = changed(case, bias=lambda bias: (8 * bias).round() / 8 + constant)
    expected, got = results_of(plain, backend), results_of(raised, backend)
    tolerance = 3e-4 if backend == "reference" else 1e-6
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=tolerance)
    torch.testing.assert_close(got.lse, expected.lse + constant, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_ten_thousand_are_exact_where_they_are_representable(backend, dtype):
    """Even keys have scores of 10240 and equal weights. Odd keys have scores of -10240 and no weight."""
    q, k = torch.full((1, 1, 30, 16), 64.0, dtype=dtype), torch.full((1, 1, 40, 16), 10.0, dtype=dtype)
    k[:, :, 1::2] *= -1
    v = torch.randn(1, 1, 40, 8).to(dtype)
    out, lse = offset_bias_attention(q, k, v, torch.zeros(1), scale=1.0, return_lse=True, backend=backend)
    expected = v[:, :, ::2].float().mean(2, keepdim=True).expand(1, 1, 30, 8)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse, torch.full_like(lse, 10240 + torch.tensor(20.0).log().item()), rtol=3e-7, atol=0)


LARGE = {
    "queries and keys": {"q": lambda q: 80 * q, "k": lambda k: 80 * k},
    "a table of standard deviation 60": {"bias": lambda bias: 60 * bias},
    "a table raised by 1000": {"bias": lambda bias: bias + 1000},
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("changes", LARGE.values(), ids=LARGE)
def test_large_scores_err_as_their_rounding(backend, changes, options):
    """Float32 rounds scores of 1e4 to 1e-3.

    Weights may err by as much, and so may results that are computed from them.
    """
    call = changed(replace(LONG, options=options), **changes)
    got = results_of(call, backend)
    with torch.no_grad():
        truth = oracle(call.q, call.k, call.v, call.bias, **options, dout=call.dout, dlse=call.dlse)
        largest = (call.q.double() @ call.k.mT.double()).abs().max() * call.q.shape[-1] ** -0.5 + call.bias.abs().max()
    rounding = 8 * torch.finfo(torch.float32).eps * float(largest)
    for name in NAMES:
        expected = getattr(truth, name)
        error = float((getattr(got, name).detach().double() - expected).abs().max())
        magnitude = float((truth.summed if name == "dbias" else expected).abs().max())
        assert error <= rounding * max(magnitude if name != "lse" else 1.0, 1.0), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [["q", "k"], ["v", "dout"], ["bias"], ["q", "k", "v", "bias", "dout"]], ids=str)
def test_denormal_numbers_count_as_zeros_or_as_what_they_are(precise_backend, dtype, names):
    """The CPU engine flushes them, which errs far less than the rule allows. Nothing becomes NaN or large."""
    smallest = torch.finfo(dtype).tiny
    case = replace(LONG, dtype=dtype, bias_dtype=dtype)
    call = changed(case, **{name: lambda x: x * (smallest / 8) for name in names})
    assert all(0 < getattr(call, name).abs().max() < smallest for name in names)
    assert_matches_oracle(call, results_of(call, precise_backend))


def test_nothing_attended_to_hides_even_huge_numbers(backend):
    """Every key is masked. Output and gradients are 0 and the log-sum-exp is -inf, although scores would overflow."""
    huge = dict.fromkeys(("q", "k", "v", "dout"), lambda x: 1e18 * x)
    call = changed(replace(LONG, options={"key_padding_mask": torch.zeros(2, 110, dtype=torch.bool)}), **huge)
    got = results_of(call, backend)
    assert (got.lse == -INF).all()
    assert all((getattr(got, name) == 0).all() for name in NAMES if name != "lse")


@pytest.mark.parametrize("bias", [0.0, 1e30, -1e30])
def test_one_query_and_one_key_give_the_value_itself(backend, bias):
    """The weight is 1 whatever the score is. The score's gradient is 0."""
    q, k, v = (torch.randn(2, 3, 1, 24, requires_grad=True) for _ in range(3))
    table = torch.full((3, 1), bias, requires_grad=True)
    out, lse = offset_bias_attention(q, k, v, table, return_lse=True, backend=backend)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, (q * k).sum(-1) * 24**-0.5 + bias)
    dout = torch.randn_like(out)
    dq, dk, dv, dbias = torch.autograd.grad(out, [q, k, v, table], dout)
    torch.testing.assert_close(dv, dout, rtol=3e-6, atol=0)
    assert max(float(x.abs().max()) for x in (dq, dk, dbias)) <= 3e-6


# The bits that an element gets. Some are NaNs with other bits than torch's, as computations and files leave them.
POISONS = {"NaN": 0x7FC00000, "NaN, lowest bit set": 0x7FC00001, "NaN, all bits set": -1, "inf": 0x7F800000,
           "-inf": 0x7F800000 - 2**31}  # fmt: skip
PLACES = {"q": (0, 1, 5, 2), "k": (0, 1, 17, 0), "v": (0, 1, 17, 3), "bias": (1, 33), "dout": (0, 1, 5, 2)}
SMALL = Case("poisoned", (23, 29), (8, 8), through_lse=True)


def poisoned(case: Case, name: str, bits: int) -> Call:
    """The call of a case with one element of one tensor replaced."""

    def poison(x: Tensor) -> Tensor:
        x.view(torch.int32)[PLACES[name]] = bits
        return x

    return changed(case, **{name: poison})


def assert_nothing_is_hidden(got: Results, reference: Results) -> None:
    """Asserts equal outputs and log-sum-exps, and no finite gradient where the reference's is not finite."""
    for name in ("out", "lse"):
        value, expected = getattr(got, name), getattr(reference, name)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in NAMES:
        hidden = getattr(got, name).isfinite() & ~getattr(reference, name).isfinite()
        assert not hidden.any(), f"{name}: {int(hidden.sum())} elements are finite"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("bits", POISONS.values(), ids=POISONS)
def test_a_poisoned_number_spreads_as_in_the_reference(backend, name, bits):
    """It spreads through output, log-sum-exp and every gradient. Numbers that it does not reach keep their bits."""
    call = poisoned(SMALL, name, bits)
    got, clean = results_of(call, backend), results_of(build(SMALL), backend)
    assert_nothing_is_hidden(got, results_of(call, "reference"))
    elsewhere = torch.ones(2, 2, dtype=torch.bool)
    elsewhere[:, 1] = False if name == "bias" else torch.tensor([False, True])  # a head's table serves all sequences
    for result in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(got, result)[elsewhere], getattr(clean, result)[elsewhere]), result
    if name == "q":
        rows = torch.arange(23) != 5
        assert all(torch.equal(getattr(got, x)[0, 1, rows], getattr(clean, x)[0, 1, rows]) for x in ("out", "lse"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_every_nan_of_half_precision_is_one(backend, dtype, name):
    """Each fraction that a NaN may have is tested, in a sequence of its own."""
    fraction_bits, exponent = (10, 0x7C00) if dtype == torch.float16 else (7, 0x7F80)
    fractions = torch.arange(1, 2**fraction_bits, 37)
    q, k, v = (torch.randn(len(fractions), 1, 3, 4).to(dtype) for _ in range(3))
    {"q": q, "k": k, "v": v}[name].view(torch.int16)[:, 0, 1, 2] = (fractions | exponent).to(torch.int16)
    assert offset_bias_attention(q, k, v, None, backend=backend).isnan().any(-1).any(-1).all()


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_a_hundred_thousand_positions_under_a_window():
    """The CPU engine takes time and memory linear in the length; rows here and there are compared with the oracle."""
    length, window = 100_000, 64
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    bias, dout = torch.randn(1, 2 * window + 1, requires_grad=True), torch.zeros(1, 1, length, 16)
    starts = (0, 31_415, 65_500, length - 100)
    for start in starts:
        dout[:, :, start : start + 100] = torch.randn(100, 16)
    options = {"window_size": (window, window), "beyond": "error"}
    out, lse = offset_bias_attention(q, k, v, bias, **options, return_lse=True, backend="cpp")
    got = Results(out, lse, *torch.autograd.grad(out, [q, k, v, bias], dout))
    total = torch.zeros_like(bias, dtype=torch.float64)
    for start in starts:
        rows, keys = slice(start, start + 100), slice(max(start - window, 0), start + 100 + window)
        part = oracle(q[:, :, rows], k[:, :, keys], v[:, :, keys], bias, dout=dout[:, :, rows],
                      query_start=start - keys.start, window_size=(window, window))  # fmt: skip
        total += part.dbias
        for name, part_of in (("out", rows), ("lse", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            value = getattr(got, name)[:, :, part_of].double()
            torch.testing.assert_close(value, getattr(part, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.dbias.double(), total, rtol=1e-5, atol=1e-4)


def far_apart(x: Tensor, axis: int) -> Tensor:
    """The values of `x` with 2**31 elements between neighbours along `axis`: of that memory little is touched."""
    order = [axis, *(other for other in range(4) if other != axis)]
    strides = [0] * 4
    for other, stride in zip(order, x.permute(order).contiguous().stride(), strict=True):
        strides[other] = 2**31 if other == axis else stride
    memory = torch.UntypedStorage(((x.shape[axis] - 1) * 2**31 + x.numel()) * x.element_size())
    return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, strides).copy_(x)


FAR_SHAPES = [(0, (2, 1, 18, 8)), (0, (2, 1, 2, 8)), (1, (1, 2, 18, 8)), (1, (1, 2, 2, 8)), (2, (1, 1, 2, 8)),
              (3, (1, 1, 18, 2)), (3, (1, 1, 2, 2))]  # fmt: skip


@pytest.mark.cpu_only
@pytest.mark.parametrize(("axis", "shape"), FAR_SHAPES, ids=str)
def test_indices_beyond_2_to_the_31_along_every_axis(precise_backend, axis, shape):
    """Neighbours 2**31 elements apart give the same bits as close neighbours, in tiles and with few queries."""
    close = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(4)]
    bias, results = torch.randn(9), []
    for *inputs, dout in (close, [far_apart(x, axis) for x in close]):
        leaves = [x.detach().requires_grad_() for x in (*inputs, bias)]
        out = offset_bias_attention(*leaves, backend=precise_backend)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_keys_of_more_than_2_to_the_31_elements():
    """A decoding step has 2**23 equal keys and values, which are views of one key and one value."""
    length = 2**23 + 5
    q, row, value = torch.randn(1, 1, 1, 256), torch.randn(1, 1, 1, 256), torch.ones(1, 1, 1, 8)
    keys, values = (x.expand(1, 1, length, x.shape[-1]) for x in (row, value))
    assert keys.numel() > 2**31
    out, lse = offset_bias_attention(q, keys, values, None, return_lse=True, backend="cpp")
    torch.testing.assert_close(out, value, rtol=1e-5, atol=0)
    expected = (q * row).sum().double() / 16 + torch.tensor(float(length), dtype=torch.float64).log()
    torch.testing.assert_close(lse.double().flatten(), expected.reshape(1), rtol=1e-6, atol=0)
