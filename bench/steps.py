"""One step of a provider in a mode, and whether its results are right."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.cases import BACKWARD, FORWARD, Inputs
from bench.provider import Provider, Run
from triton_offset_bias import offset_bias_attention

# With more pairs than this only the first head is checked, because the dense reference of all would not fit.
MOST_PAIRS = 2**28
# Largest error of an output or gradient, as a fraction of the reference's largest number or of 1 if that is larger.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Step:
    """A step to time, `timed(before())`, of which only the time of `timed` counts."""

    timed: Callable[[Any], object]
    before: Callable[[], Any] = lambda: None


def make_step(provider: Provider, run: Run, inputs: Inputs, mode: str, repeats_backward: bool = False) -> Step:
    """The step of a mode: forward as in inference, backward alone, or both with the gradients of all inputs.

    With `repeats_backward`, backward may be timed more than once after one `before`.
    """
    arguments = inputs.arguments()
    leaves = _leaves(provider, inputs)
    # Leaves under no_grad would not be enough: their views still require a gradient, and SDPA takes its slow path.
    detached = inputs.detached()

    def forward(_: object) -> Tensor:
        with torch.no_grad(), provider.context():
            return run(*detached)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        with provider.context():
            return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=repeats_backward)

    if mode == FORWARD:
        return Step(forward)
    if mode == BACKWARD:
        return Step(backward, before=lambda: run(*arguments))
    return Step(lambda _: backward(run(*arguments)))


class Checker:
    """Compares providers on some inputs with the reference backend."""

    def __init__(self, inputs: Inputs) -> None:
        """Keeps the inputs. The reference runs when its first result is needed."""
        batch, heads, queries, _ = inputs.q.shape
        self._inputs = inputs
        self._heads = heads if batch * heads * queries * inputs.k.shape[2] <= MOST_PAIRS else 1

    def check(self, provider: Provider, run: Run, needs_gradients: bool) -> None:
        """Runs a provider once and compares its output and, if they are needed, all gradients.

        Raises:
            ArithmeticError: something is farther from the reference than `TOLERANCE`, or is NaN.
        """
        expected = self._with_bias if provider.uses_table else self._without_bias
        with provider.context():
            if needs_gradients:
                out = run(*self._inputs.arguments())
                results = [out, *torch.autograd.grad(out, _leaves(provider, self._inputs), self._inputs.dout)]
            else:
                results = [run(*self._inputs.detached())]
        names = ("out", "dq", "dk", "dv", "dtable", "dgate")
        for name, got, want in zip(names, results, expected, strict=False):
            checked = got[: self._heads] if name == "dtable" else got[:, : self._heads]
            error = (checked - want).abs().max().item() / max(1.0, want.abs().max().item())
            if not error <= TOLERANCE[self._inputs.q.dtype]:
                raise ArithmeticError(f"{name} differs from the reference by {error:.1e}")

    @cached_property
    def _with_bias(self) -> list[Tensor]:
        return self._reference(has_bias=True)

    @cached_property
    def _without_bias(self) -> list[Tensor]:
        return self._reference(has_bias=False)

    def _reference(self, has_bias: bool) -> list[Tensor]:
        inputs, heads = self._inputs, self._heads
        leaves = [x.detach()[:, :heads].requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        leaves += [inputs.table.detach()[:heads].requires_grad_()] if has_bias else []
        gate = None if inputs.gate is None or not has_bias else inputs.gate.detach()[:, :heads].requires_grad_()
        window = (inputs.window, inputs.window)
        out = offset_bias_attention(
            *leaves,
            *([] if has_bias else [None]),
            bias_gate=gate,
            is_causal=inputs.is_causal,
            window_size=window,
            query_positions=inputs.positions if has_bias else None,
            key_positions=inputs.positions if has_bias else None,
            backend="reference",
        )
        leaves += [] if gate is None else [gate]
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.dout[:, :heads])]


def _leaves(provider: Provider, inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.arguments() if provider.uses_table else inputs.arguments()[:3]
