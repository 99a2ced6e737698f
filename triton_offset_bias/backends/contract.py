"""The contract of a backend, and the one registry of backends.

A backend is a module, or a package, that has the names of `FusedBackend` or of `TorchBackend`. mypy compares them. A
backend reads from a `Problem` what it needs, and imports no other backend. A list of reasons holds one fragment of a
sentence per reason, such as "serves CPU tensors, got cuda". It is empty where there is no reason.
"""

from typing import Protocol

from torch import Tensor

from triton_offset_bias.backends import cpp, reference, triton
from triton_offset_bias.problem import Problem


class Backend(Protocol):
    """The names that every backend has.

    Attributes:
        PROPERTIES: what the backend serves, and how, for people. The values are Markdown. Every backend has the same
            keys. "serves" names kinds of tensors, every dtype and the head dims.
    """

    PROPERTIES: dict[str, str]

    def build_description(self) -> str:
        """Says, for people, what the backend is built for on this machine."""

    def unavailable_reasons(self) -> list[str]:
        """The reasons why the backend cannot serve any call on this machine."""

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """The reasons why the backend cannot serve `problem` on this machine, `unavailable_reasons` included."""

    def forward_part(self, problem: Problem, acc: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
        """Adds the keys of `problem` to the softmax of rows that may have attended to other keys.

        The tensors are in the dtype of the arithmetic: float32, or float64 where the query is. `acc`, (B, Hq, Lq, Dv),
        is the sum of ``2 ** (score - row_max) * value`` over all keys so far, with dropout's factors. The scores are in
        bits. `row_max` is their maximum, and `row_sum` the sum of ``2 ** (score - row_max)``, both (B, Hq, Lq), with
        neighbouring rows side by side in memory. A row whose `row_sum` is 0 begins anew, whatever the others hold. A
        row that still has no key then has `row_max` +inf.

        The table may be a piece of a larger one, if the piece has every offset that is attended to. It is in the dtype
        of the arithmetic, and so is a gate. Scores count from 0, not from a constant of the table. The data of
        `problem` are not checked.
        """

    def backward_part(
        self,
        problem: Problem,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        dquery: Tensor,
        dkey: Tensor,
        dvalue: Tensor,
        dbias: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        """Adds a part's gradients to the last five tensors, which are in the dtype of the arithmetic.

        `out`, (B, Hq, Lq, Dv), and `dout` are those of whole rows, in the query's dtype. `row_max` and `row_sum` are
        what `forward_part` left after the last part. They and `dlse` have equal strides, and neighbouring rows side by
        side in memory.
        """


class FusedBackend(Backend, Protocol):
    """A backend that has kernels for both directions, which the operators of `ops` call.

    `ops` checks the tensors and their data, and allocates the outputs. It does not call a backend without queries or
    without keys.

    Attributes:
        DEVICES: the types of devices that the backend is made for, such as "cuda".
    """

    DEVICES: tuple[str, ...]

    def forward(self, problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
        """Writes the output (B, Hq, Lq, Dv), and three numbers for every row, each (B, Hq, Lq).

        `lse` is the log-sum-exp in nats. `row_max` is the largest score in bits, less a constant that the backend
        chooses. `row_sum` is the sum of ``2 ** (score - row_max)``. `backward` gets `row_max` and `row_sum` again.
        `out` may have any strides.
        """

    def backward(
        self,
        problem: Problem,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        dquery: Tensor | None,
        dkey: Tensor | None,
        dvalue: Tensor | None,
        dgate: Tensor | None,
        needs_dbias: bool,
    ) -> Tensor | None:
        """Writes the gradients that are not None, and returns the table's gradient, or None where it is not needed.

        `dgate`, (B, Hq, Lq, R), is in the dtype of the arithmetic: float32, or float64 where the query is. `dgate`,
        `row_max`, `row_sum` and `dlse` are contiguous; all other tensors may have any strides. `out`, `row_max` and
        `row_sum` may come from a call with more keys than `problem` holds.
        """


class TorchBackend(Backend, Protocol):
    """A backend made of torch's own operators, which autograd differentiates and `torch.func` transforms."""

    def attention(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Computes the output (B, Hq, Lq, Dv) and the log-sum-exp (B, Hq, Lq) in nats."""


FUSED_BACKENDS: dict[str, FusedBackend] = {"cpp": cpp, "triton": triton}
TORCH_BACKENDS: dict[str, TorchBackend] = {"reference": reference}
# "auto" asks the backends in this order.
BACKENDS: dict[str, Backend] = {**FUSED_BACKENDS, **TORCH_BACKENDS}
