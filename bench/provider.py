"""What a provider of the benchmark is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from bench.cases import MODES, Inputs

Run = Callable[..., Tensor]  # q, k, v, table, and the gate if there is one -> out


class AbsentError(RuntimeError):
    """A provider cannot run on this machine, and need not."""


@dataclass(frozen=True)
class Provider:
    """A way to compute the attention of `Inputs`.

    Attributes:
        label: the name in plots.
        prepare: returns the function to be timed.
        uses_table: False for attention without a bias.
        is_ungated: takes `Inputs.ungated`.
        is_dense: stores B*H*M*N numbers.
        is_compiled: compiled by torch.compile for one shape.
        cpu_modes: the modes in which it can run on a CPU.
        why_not: the reason why it cannot run in the other modes.
        context: the context manager around every step, backward too.
    """

    label: str
    prepare: Callable[[Inputs], Run]
    uses_table: bool = True
    is_ungated: bool = False
    is_dense: bool = False
    is_compiled: bool = False
    cpu_modes: tuple[str, ...] = MODES
    why_not: str = ""
    context: Callable[[], AbstractContextManager] = nullcontext

    def seen(self, inputs: Inputs) -> Inputs:
        """The inputs that the provider takes."""
        return inputs.ungated() if self.is_ungated else inputs
