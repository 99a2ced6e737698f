"""The operators in torch's machinery: compilation, autocast, checkpointing, partial backward passes, opcheck."""

import re

import pytest
import torch
import torch.nn.functional as F
from cases import Call, Case, assert_matches_oracle, build, results_of
from oracle import Results, oracle
from tolerance import assert_accurate
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from triton_offset_bias import offset_bias_attention, table
from triton_offset_bias.problem import DIFFERENTIABLE, Problem

PADDED = Case(
    "grouped heads, causal, padding",
    (40, 40),
    (16, 24),
    heads=(4, 2),
    mask="right padding",
    through_lse=True,
    layout="transposed BLHD",
    options={"is_causal": True, "scale": 0.3},
)


def _differentiated(attend, call: Call) -> Results:
    """`results_of`, of a function (q, k, v, bias) -> (out, lse)."""
    inputs = [call.q, call.k, call.v, call.bias]
    out, lse = attend(*inputs)
    return Results(out, lse, *torch.autograd.grad([out, lse], inputs, [call.dout, call.dlse]))


def _assert_same(got: Results, expected: Results, **tolerance: float) -> None:
    for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), **tolerance)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_call_is_one_graph_with_equal_results(backend, compiler):
    """The call is compiled with fullgraph=True, forward and backward. Its tensors are views that are not contiguous."""
    call = build(PADDED)

    def attend(q, k, v, bias):
        return offset_bias_attention(q * 2, k, v, bias, **call.options, return_lse=True, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    _assert_same(_differentiated(compiled, call), _differentiated(attend, call))


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_one_compiled_graph_serves_all_lengths():
    """Lengths are symbolic. A new length compiles nothing and gives equal results."""
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, bias):
        return offset_bias_attention(q, k, v, bias, is_causal=True, return_lse=True, backend="cpp")

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    compiled_so_far = []
    for lengths in ((33, 47), (64, 65), (150, 101)):
        call = build(Case("dynamic", lengths, through_lse=True))
        _assert_same(_differentiated(compiled, call), _differentiated(attend, call), rtol=0.0, atol=0.0)
        compiled_so_far.append(counter.frame_count)
    assert compiled_so_far == compiled_so_far[:1] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_output_has_the_dtype_of_sdpa_and_the_table_stays_float32(backend, dtype):
    """Results are as if query, key and value had been cast by hand. Gradients have the dtypes of the inputs."""
    call = build(Case("autocast", (31, 31), through_lse=True))
    inputs = [call.q, call.k, call.v]
    with torch.autocast(torch.get_default_device().type, dtype):
        expected_dtype = F.scaled_dot_product_attention(*inputs).dtype
        out, lse = offset_bias_attention(*inputs, call.bias, return_lse=True, backend=backend)
    assert out.dtype == expected_dtype == dtype
    assert lse.dtype == torch.float32
    by_hand = offset_bias_attention(*(x.to(dtype) for x in inputs), call.bias, return_lse=True, backend=backend)
    assert torch.equal(out, by_hand[0])
    assert torch.equal(lse, by_hand[1])
    gradients = torch.autograd.grad([out, lse], [*inputs, call.bias], [call.dout.to(dtype), call.dlse])
    expected = torch.autograd.grad(by_hand, [*inputs, call.bias], [call.dout.to(dtype), call.dlse])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_under_autocast_float64_stays_float64_as_in_sdpa(precise_backend):
    """Autocast does not cast float64, nor the table that goes with it."""
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 17, dtype=torch.float64)
    expected = offset_bias_attention(q, k, v, bias, backend=precise_backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.float64
        out = offset_bias_attention(q, k, v, bias, backend=precise_backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_call_has_equal_gradients(backend, use_reentrant):
    """Backward computes the call again. Its gradients have the same bits."""
    call = build(PADDED)

    def attend(q, k, v, bias):
        return offset_bias_attention(q, k, v, bias, **call.options, return_lse=True, backend=backend)

    expected = _differentiated(attend, call)
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v, call.bias)]
    outputs = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward(outputs, (call.dout, call.dlse))
    _assert_same(Results(*outputs, *(x.grad for x in leaves)), expected, rtol=0.0, atol=0.0)


def test_backward_of_the_output_alone_and_of_the_log_sum_exp_alone(backend):
    """Their gradients add up to those of both together. The log-sum-exp gives the value no gradient."""
    call = build(PADDED)
    inputs = (call.q, call.k, call.v, call.bias)
    out, lse = offset_bias_attention(*inputs, **call.options, return_lse=True, backend=backend)
    from_out = torch.autograd.grad(out, inputs, call.dout, retain_graph=True)
    from_lse = torch.autograd.grad(lse, inputs, call.dlse, retain_graph=True, allow_unused=True)
    keywords = {**call.options, "dlse": call.dlse, "dout": torch.zeros_like(call.dout)}
    ref64, same = oracle(*inputs, **keywords), oracle(*inputs, **keywords, dtype=torch.float32)
    eps = torch.finfo(torch.float32).eps
    for name, got in zip(("dq", "dk", "dbias"), (from_lse[0], from_lse[1], from_lse[3]), strict=True):
        with torch.no_grad():
            assert_accurate(name, got, getattr(ref64, name), getattr(same, name), eps)
    assert from_lse[2] is None or (from_lse[2] == 0).all()
    call.dlse = None
    assert_matches_oracle(call, Results(out, lse, *from_out))


def test_a_gradient_from_a_sum_whose_memory_is_one_number(backend):
    """`out.sum().backward()` passes an expanded tensor of strides 0."""
    call = build(PADDED)
    call.dout, call.dlse = torch.ones_like(call.dout), None
    expected = results_of(call, backend)
    call.dout = torch.ones(()).expand(call.dout.shape)
    _assert_same(results_of(call, backend), expected, rtol=0.0, atol=0.0)


def _operator_arguments(requires_grad: bool) -> dict:
    call = build(
        Case(
            "opcheck",
            (17, 19),
            (16, 12),
            heads=(4, 2),
            bias_dtype=torch.bfloat16,
            mask="holes",
            layout="transposed BLHD",
        )
    )
    tensors = {"query": call.q, "key": call.k, "value": call.v, "bias": call.bias}
    return {
        **{name: x.detach().requires_grad_(requires_grad) for name, x in tensors.items()},
        **call.options,
        **{"bias_gate": None, "query_positions": None, "key_positions": None},
        **{"key_lengths": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "query_starts": None},
        **{"seed": torch.tensor(7), "max_seqlen_q": 17, "max_seqlen_k": 19, "dropout_place": None},
        "scale": 0.25,
        "dropout_p": 0.25,
        "query_start": 2,
        "min_offset": -3,
        "max_offset": 2**62,
        "bias_origin": 18,
        "is_causal_by_index": False,
        "beyond": "clamp",
        "deterministic": False,
        "backend": "cpp",
    }


def _matching(operator, arguments: dict) -> tuple:
    """The arguments in the order of the operator's schema."""
    return tuple(arguments[argument.name] for argument in operator._schema.arguments)


def test_the_operators_arguments_are_the_fields_of_a_problem_in_the_order_that_autograd_splits():
    """Tensors with gradients come first, then the other tensors, then other values."""
    forward, backward = (getattr(torch.ops.triton_offset_bias, name) for name in ("attention", "attention_backward"))
    arguments = [(x.name, str(x.type)) for x in forward.default._schema.arguments]
    assert [name for name, _ in arguments] == [*Problem._fields, "backend"]
    are_tensors = ["Tensor" in kind for _, kind in arguments]
    assert are_tensors == sorted(are_tensors, reverse=True)
    assert Problem._fields[: len(DIFFERENTIABLE)] == DIFFERENTIABLE
    assert [(x.name, str(x.type)) for x in backward.default._schema.arguments][-len(arguments) :] == arguments
    assert [x.name for x in backward.default._schema.returns] == [f"d{name}" for name in DIFFERENTIABLE]


@pytest.mark.needs_engine
@pytest.mark.cpu_only
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14's checks read it
def test_the_operator_passes_torchs_own_checks(requires_grad):
    """The checks are of the schema, the shape function with strides, autograd's registration, and symbolic tracing."""
    operator = torch.ops.triton_offset_bias.attention.default
    torch.library.opcheck(operator, _matching(operator, _operator_arguments(requires_grad)))


@pytest.mark.needs_engine
@pytest.mark.cpu_only
@pytest.mark.parametrize("needs", [[True] * 5, [True, False, False, True, True]])
@pytest.mark.parametrize("beyond", table.BEYOND[:2])
@pytest.mark.parametrize(("bias_heads", "bias_dtype"), [(4, torch.float32), (1, torch.float32), (4, torch.bfloat16)])
@pytest.mark.parametrize("num_keys", [0, 19])
def test_the_backward_operator_passes_torchs_own_checks(needs, beyond, bias_heads, bias_dtype, num_keys):
    """The backward operator is called for all gradients and for some, with a table that is a view."""
    arguments = _operator_arguments(False) | {"beyond": beyond, "max_seqlen_k": num_keys}
    arguments["bias"] = arguments["bias"][:bias_heads].to(bias_dtype).t().contiguous().t()
    for name, axis in (("key", 2), ("value", 2), ("key_padding_mask", 1)):
        arguments[name] = arguments[name].narrow(axis, 0, num_keys)
    _check_backward_operator(arguments | {"needs": needs})


def _check_backward_operator(arguments: dict) -> None:
    """Runs torch's checks on the backward operator, with results of the forward operator."""
    forward = torch.ops.triton_offset_bias.attention.default
    out, lse, row_max, row_sum = forward(*_matching(forward, arguments))
    rows = {"out": out, "row_max": row_max, "row_sum": row_sum}
    incoming = {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse)}
    operator = torch.ops.triton_offset_bias.attention_backward.default
    torch.library.opcheck(operator, _matching(operator, arguments | rows | incoming))


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_the_operators_pass_torchs_own_checks_with_lengths():
    """Both operators are checked where each sequence has its own number of keys."""
    arguments = _operator_arguments(False) | {"key_lengths": torch.tensor([19, 7]), "needs": [True] * 5}
    operator = torch.ops.triton_offset_bias.attention.default
    torch.library.opcheck(operator, _matching(operator, arguments))
    _check_backward_operator(arguments)


@pytest.mark.needs_engine
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key": torch.zeros(2, 2, 19, 16, dtype=torch.float64)}, "`key` must have `query`'s dtype"),
        ({"value": torch.zeros(2, 2, 9, 12)}, "`value` must have `key`'s length 19"),
        ({"bias": torch.zeros(3, 37)}, "`bias` must have 4 heads or 1"),
        ({"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)}, "`key_padding_mask` must have shape (2, 19)"),
        ({"key_lengths": torch.ones(3, dtype=torch.int32)}, "`key_lengths` must have shape (2,), got shape (3,)"),
        ({"key_lengths": torch.tensor([3, 20])}, "`key_lengths` must be between 0 and `key`'s length 19, got 20"),
        ({"query": torch.zeros(2, 4, 17, 257)}, "backend 'cpp' does not support this call: serves head dims up to 256"),
        ({"backend": "triton"}, "backend 'triton' does not support this call: "),
        ({"max_seqlen_q": 16}, "the lengths that this graph was traced for, 16 and 19, got 17 and 19"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_operator_refuses_tensors_that_do_not_fit(wrong, message):
    """No public function lets such tensors through, but a graph may call the operator with any tensors."""
    operator = torch.ops.triton_offset_bias.attention.default
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
        operator(*_matching(operator, _operator_arguments(False) | wrong))


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_a_graph_whose_lengths_are_constants_serves_no_others():
    """`make_fx` and `torch.jit.trace` make lengths constant.

    The engine must not read or write past the end of tensors.
    """
    q, shorter, longer = (torch.randn(1, 2, length, 8) for length in (9, 5, 13))
    graph = make_fx(lambda q: offset_bias_attention(q, q, q, None, is_causal=True))(q)
    assert torch.equal(graph(q), offset_bias_attention(q, q, q, None, is_causal=True))
    for other in (shorter, longer):
        with pytest.raises(ValueError, match="traced for, 9 and 9, got"):
            graph(other)


class _Listed(TorchDispatchMode):
    """Lists the package's operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "triton_offset_bias":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    """A tensor like any other, of another type."""


def _profiled(run) -> tuple[Results, list[str]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results = run()
    names = [event.name for event in profile.events() if event.name.startswith("triton_offset_bias::")]
    return results, sorted({name.partition("::")[2] for name in names})


def _listed(run) -> tuple[Results, list[str]]:
    with _Listed() as mode:
        results = run()
    return results, mode.names


@pytest.mark.parametrize("watch", [_profiled, _listed])
def test_modes_and_profilers_see_the_operators(backend, watch):
    """A call of plain tensors goes past the operators only where nobody looks at them. Results are the same bits."""
    call = build(PADDED)

    def attend(q, k, v, bias):
        return offset_bias_attention(q, k, v, bias, **call.options, return_lse=True, backend=backend)

    results, names = watch(lambda: _differentiated(attend, call))
    expected = [] if backend == "reference" else ["attention", "attention_backward"]
    assert names == expected
    _assert_same(results, _differentiated(attend, call), rtol=0, atol=0)


def test_a_subclass_of_tensor_meets_the_operators(backend, monkeypatch):
    """`__torch_function__` of a subclass is asked, and results are those of the same numbers in plain tensors."""
    call, met = build(PADDED), []

    def seen(cls, func, types, args=(), kwargs=None):
        met.append(getattr(func, "__name__", str(func)))
        return torch.Tensor.__torch_function__.__func__(cls, func, types, args, kwargs)

    monkeypatch.setattr(_Subclass, "__torch_function__", classmethod(seen))

    def attend(q, k, v, bias):
        return offset_bias_attention(q, k, v, bias, **call.options, return_lse=True, backend=backend)

    with torch.no_grad():
        out, lse = attend(call.q.as_subclass(_Subclass), call.k, call.v, call.bias)
        expected, expected_lse = attend(call.q, call.k, call.v, call.bias)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, rtol=0, atol=0)
    torch.testing.assert_close(lse.as_subclass(torch.Tensor), expected_lse, rtol=0, atol=0)
    assert backend == "reference" or any("attention" in name for name in met)


def test_a_negative_gradient_is_resolved(backend):
    """The gradient that comes in is a view with the negative bit: its memory holds the numbers with the other sign."""
    call = build(PADDED)
    inputs = [call.q, call.k, call.v, call.bias]
    out, lse = offset_bias_attention(*inputs, **call.options, return_lse=True, backend=backend)
    plain = torch.autograd.grad([out, lse], inputs, [call.dout, call.dlse], retain_graph=True)
    views = [torch._neg_view(-x) for x in (call.dout, call.dlse)]
    for got, expected in zip(torch.autograd.grad([out, lse], inputs, views), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
