"""One step of a provider in a mode, and whether its results are right."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.cases import BACKWARD, FORWARD, Inputs
from bench.providers import Provider, Run
from triton_offset_bias import offset_bias_attention

# Largest error of an output or gradient, as a fraction of the reference's largest number or of 1 if that is larger.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Step:
    """What is timed, `timed(before())`, of which only `timed` counts."""

    timed: Callable[[Any], object]
    before: Callable[[], Any] = lambda: None


def make_step(provider: Provider, run: Run, inputs: Inputs, mode: str) -> Step:
    """The step: forward as in inference, backward alone, or both with the gradients of all inputs."""
    arguments = inputs.arguments()
    leaves = _leaves(provider, inputs)
    # Not leaves under no_grad: views of those still say that they require a gradient, and SDPA takes its slow path.
    detached = inputs.detached()

    def forward(_: object) -> Tensor:
        with torch.no_grad():
            return run(*detached)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.dout)

    if mode == FORWARD:
        return Step(forward)
    if mode == BACKWARD:
        return Step(backward, before=lambda: run(*arguments))
    return Step(lambda _: backward(run(*arguments)))


class Checker:
    """Compares providers on some inputs with the reference backend."""

    def __init__(self, inputs: Inputs) -> None:
        """Computes nothing yet: the reference is asked when its first result is needed."""
        self._inputs = inputs

    def check(self, provider: Provider, run: Run, needs_gradients: bool) -> None:
        """Runs a provider once and compares its output and, if they are needed, all gradients.

        Raises:
            ArithmeticError: something is farther from the reference than `TOLERANCE`, or is NaN.
        """
        expected = self._with_bias if provider.uses_table else self._without_bias
        if needs_gradients:
            out = run(*self._inputs.arguments())
            results = [out, *torch.autograd.grad(out, _leaves(provider, self._inputs), self._inputs.dout)]
        else:
            results = [run(*self._inputs.detached())]
        names = ("out", "dq", "dk", "dv", "dtable")
        for name, got, want in zip(names, results, expected, strict=False):
            error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
            if not error <= TOLERANCE[self._inputs.q.dtype]:
                raise ArithmeticError(f"{name} differs from the reference by {error:.1e}")

    @cached_property
    def _with_bias(self) -> list[Tensor]:
        return self._reference(self._inputs.arguments())

    @cached_property
    def _without_bias(self) -> list[Tensor]:
        return self._reference((*self._inputs.arguments()[:3], None))

    def _reference(self, arguments: tuple[Tensor | None, ...]) -> list[Tensor]:
        window = (self._inputs.window, self._inputs.window)
        out = offset_bias_attention(
            *arguments, is_causal=self._inputs.is_causal, window_size=window, backend="reference"
        )
        leaves = [x for x in arguments if x is not None]
        return [out.detach(), *torch.autograd.grad(out, leaves, self._inputs.dout)]


def _leaves(provider: Provider, inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.arguments()[: 4 if provider.uses_table else 3]
