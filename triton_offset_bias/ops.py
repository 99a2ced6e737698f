"""The operators: schemas, shape functions, and the autograd rule. Only this module knows `torch.library`.

A call of plain tensors goes past the operators, straight to its backend: PyTorch's dispatcher handles 25 arguments
twice, which takes as long as all launches of a GPU pass. See `_is_direct`.
"""

import functools
from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from triton_offset_bias.backends.contract import FUSED_BACKENDS, TORCH_BACKENDS, FusedBackend
from triton_offset_bias.checks.data import check_data, check_fit, check_rows
from triton_offset_bias.problem import DIFFERENTIABLE, NUM_TENSORS, Problem

_SCHEMA_TYPES: dict[Any, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str"},
    tuple[int, ...] | None: "SymInt[]?",
}
_FIELDS = {name: _SCHEMA_TYPES[annotation] for name, annotation in get_type_hints(Problem).items()}
_ARGUMENTS = ", ".join(f"{kind} {name}" for name, kind in (*_FIELDS.items(), ("backend", "str")))
_GRADIENTS = ", ".join(f"Tensor d{name}" for name in DIFFERENTIABLE)
_NUM_DIFFERENTIABLE = len(DIFFERENTIABLE)
_PLAIN_TYPES, _PLAIN_DEVICES = (Tensor, torch.nn.Parameter), ("cpu", "cuda")
_library = torch.library.Library("triton_offset_bias", "DEF")
_library.define(f"attention({_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)")
_library.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor row_max, Tensor row_sum, "
    f"bool[{_NUM_DIFFERENTIABLE}] needs, {_ARGUMENTS}) -> ({_GRADIENTS})"
)
_attention_op = torch.ops.triton_offset_bias.attention.default
_attention_backward_op = torch.ops.triton_offset_bias.attention_backward.default


def attention(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Computes output and log-sum-exp of `problem`, differentiably, by a backend that serves it.

    Raises:
        NotImplementedError: a fused backend under a transform of torch.func, or asked for a forward-mode derivative.
    """
    if backend in TORCH_BACKENDS:
        return TORCH_BACKENDS[backend].attention(problem)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"backend {backend!r} does not support the transforms of torch.func (vmap, grad, jvp, ...): fold what vmap "
            "maps over into the batch, take gradients by torch.autograd, or use backend='reference'"
        )
    if not _is_direct(problem):
        out, lse, _, _ = _attention_op(*problem, backend)
    elif torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in problem.tensors[:_NUM_DIFFERENTIABLE]
    ):
        out, lse, _, _ = _recorded_attention(True, *problem, backend)
    else:
        out, lse, _, _ = _computed(problem, FUSED_BACKENDS[backend])
    return out, lse


def _is_direct(problem: Problem) -> bool:
    """Whether a checked problem needs no operator: its tensors are plain, and nobody watches or traces operators."""
    return (
        not _is_watched()  # first, because a compiler cannot trace what `_is_plain` asks
        and all(x is None or _is_plain(x) for x in problem.tensors)
        and problem.query.device.type in _PLAIN_DEVICES
    )


def _is_plain(x: Tensor) -> bool:
    """Whether the numbers of `x` are those in its memory. The dispatcher resolves other tensors."""
    is_strided = type(x) in _PLAIN_TYPES and x.layout is torch.strided
    return is_strided and not x.is_neg() and not x._is_zerotensor()


def _is_watched() -> bool:
    """Whether a compiler, a tracer, a mode, forward-mode derivatives or a profiler wants to see the operators.

    A default device is a mode too, but it looks at constructors alone.
    """
    has_default_device = torch.utils._device.CURRENT_DEVICE is not None
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > has_default_device
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
    )


def _problem(args) -> tuple[Problem, str]:
    """The problem and the name of its backend, from an operator's last arguments."""
    *fields, backend = args
    return Problem(*fields), backend


def _served_problem(args) -> tuple[Problem, FusedBackend]:
    """The problem and its backend, which serves it. Operators get tuples as lists."""
    problem, name = _problem(tuple(x) if isinstance(x, list) else x for x in args)
    backend = FUSED_BACKENDS[name]
    if reasons := backend.unsupported_reasons(problem):
        raise NotImplementedError(f"backend {name!r} does not support this call: {'; '.join(reasons)}")
    return problem, backend


def _forward(*args):
    """The operator `attention`, whose tensors may be any: a graph calls it too."""
    problem, backend = _served_problem(args)
    check_fit(problem)
    return _computed(problem, backend)


def _computed(problem: Problem, backend: FusedBackend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and the rows' statistics, (B, H, Lq), which `attention_backward` takes again."""
    check_data(problem)
    out, lse, row_max, row_sum = outputs = _new_outputs(problem.query, problem.value)
    if out.numel() > 0 and problem.key.shape[2] > 0:
        backend.forward(problem, *outputs)
    else:  # nothing to attend to
        lse.fill_(float("-inf"))
        for tensor in (out, row_max, row_sum):
            tensor.zero_()
    return outputs


def _forward_fake(*args):
    problem, _ = _problem(args)
    return _new_outputs(problem.query, problem.value)


def _backward(dout, dlse, out, row_max, row_sum, needs, *args):
    """The operator `attention_backward`: the gradients that are needed, and empty tensors for the others.

    Tensors may have any strides. `out`, `row_max` and `row_sum` come from `attention`. The rows may have attended to
    more keys than this call holds, because P and delta belong to the whole rows. So the keys may be split over several
    calls. Each call gets `query_start`, the mask or positions of its own keys, and `dout`, `dlse` and statistics of the
    whole rows. It returns dkey and dvalue of its own keys, and summands of all others. Every call must get the
    whole, unchanged table, because `row_max` counts from a constant of the table.

    The rows may also have attended to the parts one by one, with one table. Their statistics are then merged: the
    maximum of `row_max`, and the sum of row_sum * 2 ** (row_max - maximum). Dropout allows no parts, because a key's
    place in the call decides which weights are dropped.

    Source: P and delta as in FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 2.
    """
    problem, backend = _served_problem(args)
    check_fit(problem)
    check_rows(problem, dout, dlse, out, row_max, row_sum)
    gradients = _computed_gradients(problem, backend, dout, dlse, out, row_max, row_sum, needs)
    return _all_gradients(out, *gradients)


def _computed_gradients(
    problem: Problem,
    backend: FusedBackend,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients, None where they are not needed."""
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = None if dlse is None else dlse.to(row_max.dtype).contiguous()
    row_max, row_sum = row_max.contiguous(), row_sum.contiguous()
    dquery, dkey, dvalue, dgate = new = _new_gradients(problem, needs)
    needs_dbias = _needs_dbias(problem, needs)
    if out.numel() > 0 and problem.key.shape[2] > 0:
        dbias = backend.backward(problem, out, row_max, row_sum, dout, dlse, *new, needs_dbias)
    else:
        dbias = None
        if problem.bias is not None and needs_dbias:
            dbias = problem.bias.new_zeros(problem.bias.shape)
        for gradient in new:
            if gradient is not None:
                gradient.zero_()
    if problem.bias_gate is not None and dgate is not None:
        dgate = dgate.to(problem.bias_gate.dtype)
    return dquery, dkey, dvalue, dbias, dgate


def _backward_fake(dout, dlse, out, row_max, row_sum, needs, *args):
    problem, _ = _problem(args)
    *gradients, dgate = _new_gradients(problem, needs)
    dbias = problem.bias.new_empty(problem.bias.shape) if _needs_dbias(problem, needs) else None
    dgate = None if dgate is None else dgate.to(problem.bias_gate.dtype)
    return _all_gradients(out, *gradients, dbias, dgate)


def _needs_dbias(problem: Problem, needs) -> bool:
    return needs[DIFFERENTIABLE.index("bias")] and problem.bias is not None


def _new_gradients(problem: Problem, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Uninitialised dquery, dkey, dvalue and dgate; None where not needed."""
    *needed, _, needs_dgate = needs
    inputs = problem.query, problem.key, problem.value
    dquery, dkey, dvalue = (
        _empty_like(x, x.shape[-1]) if need else None for x, need in zip(inputs, needed, strict=True)
    )
    gate, dgate = problem.bias_gate, None
    if needs_dgate and gate is not None:
        dgate = gate.new_empty(gate.shape, dtype=torch.promote_types(problem.query.dtype, torch.float32))
    return dquery, dkey, dvalue, dgate


def _all_gradients(out: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients, with an empty tensor in the place of each that is not needed."""
    return tuple(out.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _new_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised out, lse, row_max and row_sum. A backend's `backward` gets the last two again."""
    real = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=real)
    return _empty_like(query, value.shape[-1]), lse, torch.empty_like(lse), torch.empty_like(lse)


def _empty_like(x: Tensor, dim: int) -> Tensor:
    """An uninitialised (B, H, L, dim) tensor laid out in memory as `x` is: (B, H, L, D) or (B, L, H, D)."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return x.new_empty((batch, heads, length, dim))


class _Attention(torch.autograd.Function):
    """The gradient of `attention`. `apply` takes all arguments without a gradient as one, since each costs time."""

    @staticmethod
    def forward(ctx, *args):
        *inputs, (is_direct, others) = args
        arguments = (*inputs, *others)
        if is_direct:
            problem, name = _problem(arguments)
            outputs = _computed(problem, FUSED_BACKENDS[name])
        else:
            outputs = _below_autograd(_attention_op, arguments)
        ctx.is_direct = is_direct
        out, _, row_max, row_sum = outputs
        ctx.save_for_backward(*arguments[:NUM_TENSORS], out, row_max, row_sum)
        ctx.options = arguments[NUM_TENSORS:]
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, dout, dlse, *_):
        *tensors, out, row_max, row_sum = ctx.saved_tensors
        *needs, _ = ctx.needs_input_grad
        arguments = (*tensors, *ctx.options)
        is_direct = ctx.is_direct and not torch.is_grad_enabled() and not _is_watched()
        if is_direct and all(x is None or _is_plain(x) for x in (dout, dlse)):
            problem, name = _problem(arguments)
            rows = (dout, dlse, out, row_max, row_sum)
            return *_computed_gradients(problem, FUSED_BACKENDS[name], *rows, needs), None
        gradients = _backward_rule(dout, dlse, out, row_max, row_sum, needs, *arguments)
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None


class _AttentionBackward(torch.autograd.Function):
    """The backward pass as a node of its own, so that a second derivative is an error and not a wrong answer."""

    @staticmethod
    def forward(ctx, *args):
        return _below_autograd(_attention_backward_op, args)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "offset_bias_attention has no second derivative on the fused backends; "
            "backend='reference' has derivatives of every order"
        )


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _refuse_forward_mode(args):
    """Raises if an argument has a tangent, which the operators would drop."""
    if any(isinstance(x, Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(
            "offset_bias_attention has no forward-mode derivative on the fused backends; "
            "backend='reference' has derivatives of every order and mode"
        )


def _autograd_rule(op, record):
    """The rule at the dispatcher's autograd key: calls `record` where a gradient may be asked for, otherwise `op`."""

    def rule(*args):
        is_recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_forward_mode(args)
        return record(*args) if is_recorded else _below_autograd(op, args)

    return rule


def _recorded_attention(is_direct, *args):
    return _Attention.apply(*args[:_NUM_DIFFERENTIABLE], (is_direct, args[_NUM_DIFFERENTIABLE:]))


_attention_rule = _autograd_rule(_attention_op, functools.partial(_recorded_attention, False))
_backward_rule = _autograd_rule(_attention_backward_op, _AttentionBackward.apply)
for _name, _implementation, _fake, _rule in (
    ("attention", _forward, _forward_fake, _attention_rule),
    ("attention_backward", _backward, _backward_fake, _backward_rule),
):
    _library.impl(_name, _rule, "Autograd")
    _library.impl(_name, _implementation, "CPU")
    _library.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"triton_offset_bias::{_name}", _fake, lib=_library)
