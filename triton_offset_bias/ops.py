"""The operators: schemas, shape functions, and the autograd rule. The one module that knows `torch.library`."""

import torch
from torch import Tensor

from triton_offset_bias import table
from triton_offset_bias.backends import cpp, reference
from triton_offset_bias.checks import Problem

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_padding_mask, float scale, SymInt query_start, "
    "SymInt min_offset, SymInt max_offset, SymInt bias_origin, str beyond, bool deterministic, str backend"
)
_library = torch.library.Library("triton_offset_bias", "DEF")
_library.define(f"attention({_PROBLEM}) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_log_sum)")
_library.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor row_max, Tensor row_log_sum, bool[4] needs, "
    f"{_PROBLEM}) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias)"
)

_FUSED = {"cpp": cpp}


def attention(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `problem` by a backend that serves it, differentiable."""
    if backend == "reference":
        return reference.attention(problem)
    out, lse, _, _ = torch.ops.triton_offset_bias.attention(*_arguments(problem), backend)
    return out, lse


def _arguments(problem: Problem) -> tuple:
    return (
        problem.query,
        problem.key,
        problem.value,
        problem.bias,
        problem.key_padding_mask,
        problem.scale,
        problem.query_start,
        problem.min_offset,
        problem.max_offset,
        problem.bias_origin,
        problem.beyond,
        problem.deterministic,
    )


def _problem(
    query, key, value, bias, key_padding_mask, scale, query_start, min_offset, max_offset, bias_origin, beyond, deterministic
) -> Problem:
    return Problem(
        query=query,
        key=key,
        value=value,
        bias=bias,
        key_padding_mask=key_padding_mask,
        query_positions=None,
        key_positions=None,
        scale=scale,
        dropout_p=0.0,
        query_start=query_start,
        min_offset=min_offset,
        max_offset=max_offset,
        bias_origin=bias_origin,
        beyond=beyond,
        deterministic=deterministic,
    )


def _forward(*args):
    *problem_args, backend = args
    problem = _problem(*problem_args)
    _check_reach_of_data(problem)
    outputs = _new_outputs(problem.query, problem.value)
    _FUSED[backend].forward(problem, *outputs)
    return outputs


def _forward_fake(*args):
    query, _, value = args[:3]
    return _new_outputs(query, value)


def _backward(dout, dlse, out, row_max, row_log_sum, needs, *args):
    *problem_args, backend = args
    problem = _problem(*problem_args)
    gradients = [
        _empty_like(x, x.shape[-1]) if need else None
        for x, need in zip((problem.query, problem.key, problem.value), needs, strict=False)
    ]
    dout = torch.zeros_like(out) if dout is None else dout
    dbias = _FUSED[backend].backward(problem, out, row_max, row_log_sum, dout, dlse, *gradients, needs[3])
    return tuple(out.new_empty(0) if gradient is None else gradient for gradient in (*gradients, dbias))


def _backward_fake(dout, dlse, out, row_max, row_log_sum, needs, query, key, value, bias, *_):
    gradients = [_empty_like(x, x.shape[-1]) if need else out.new_empty(0) for x, need in zip((query, key, value), needs)]
    dbias = bias.new_empty(bias.shape) if bias is not None and needs[3] else out.new_empty(0)
    return (*gradients, dbias)


def _new_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised out, lse, row_max, row_log_sum. The statistics are what a backend wants to see again in backward."""
    real = torch.promote_types(query.dtype, torch.float32)
    rows = [query.new_empty(query.shape[:3], dtype=real) for _ in range(3)]
    return _empty_like(query, value.shape[-1]), *rows


def _empty_like(x: Tensor, dim: int) -> Tensor:
    """An uninitialised (B, H, L, dim) tensor laid out in memory as `x` is: (B, H, L, D) or (B, L, H, D)."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, length, dim)


def _check_reach_of_data(problem: Problem) -> None:
    """`beyond="error"` under a mask: which offsets are attended to depends on data, so it is asked here, not in checks."""
    if problem.beyond != "error" or problem.bias is None or problem.key_padding_mask is None:
        return
    extremes = table.attended_extremes(
        problem.key_padding_mask, problem.query.shape[2], problem.query_start, problem.min_offset, problem.max_offset
    )
    if extremes is not None and problem.query.shape[2] > 0:
        table.check_reach(problem.bias.shape[-1], problem.bias_origin, *extremes)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, row_max, row_log_sum = torch.ops.triton_offset_bias.attention(*args)
        query, key, value, bias, key_padding_mask, *ctx.options = args
        ctx.save_for_backward(query, key, value, bias, key_padding_mask, out, row_max, row_log_sum)
        ctx.mark_non_differentiable(row_max, row_log_sum)
        ctx.set_materialize_grads(False)
        return out, lse, row_max, row_log_sum

    @staticmethod
    def backward(ctx, dout, dlse, *_):
        query, key, value, bias, key_padding_mask, out, row_max, row_log_sum = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        gradients = torch.ops.triton_offset_bias.attention_backward(
            dout, dlse, out, row_max, row_log_sum, needs, query, key, value, bias, key_padding_mask, *ctx.options
        )
        masked = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return *masked, *(None for _ in range(1 + len(ctx.options)))


class _AttentionBackward(torch.autograd.Function):
    """The gradient as a node of its own, so that asking for a second derivative meets an error, not a wrong answer."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.triton_offset_bias.attention_backward(*args)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "offset_bias_attention has no second derivative on the fused backends; backend='reference' has every derivative"
        )


_library.impl("attention", lambda *args: _Attention.apply(*args), "Autograd")
_library.impl("attention_backward", lambda *args: _AttentionBackward.apply(*args), "Autograd")
for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("triton_offset_bias::attention", _forward_fake, lib=_library)
torch.library.register_fake("triton_offset_bias::attention_backward", _backward_fake, lib=_library)
