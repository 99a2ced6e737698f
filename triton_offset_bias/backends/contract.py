"""The contract of a backend, and the one registry of backends.

A backend is a module, or a package, with the names of one of the protocols below; mypy compares them. It reads from a
`Problem` what it needs, and imports no other backend. Lists of reasons hold one sentence fragment per reason, such as
"serves CPU tensors, got cuda", and are empty where there is none.
"""

from typing import Protocol

from torch import Tensor

from triton_offset_bias.backends import cpp, reference, triton
from triton_offset_bias.problem import Problem


class Backend(Protocol):
    """The names that every backend has.

    Attributes:
        PROPERTIES: what the backend serves, and how, for people: Markdown under the same keys for every backend.
            "serves" names kinds of tensors, every dtype and the head dims.
    """

    PROPERTIES: dict[str, str]

    def build_description(self) -> str:
        """A text for people: what the backend is built for on this machine."""

    def unavailable_reasons(self) -> list[str]:
        """Why the backend cannot serve any call on this machine."""

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why the backend cannot serve `problem` on this machine; `unavailable_reasons` are among the reasons."""


class FusedBackend(Backend, Protocol):
    """A backend that has kernels for both directions, which the operators of `ops` call.

    `ops` checks the tensors and their data, allocates what is written, and leaves out calls without queries or keys.
    """

    def forward(self, problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
        """Writes the output (B, Hq, Lq, Dv), and three numbers for every row, each (B, Hq, Lq).

        `lse` is the log-sum-exp in nats. `row_max` is the largest score in bits, counted from a constant of the
        backend's choice. `row_sum` is the sum of ``2 ** (score - row_max)``. `backward` gets the last two again.
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
        needs_dbias: bool,
    ) -> Tensor | None:
        """Writes the gradients that are not None, and returns the table's gradient, or None where it is not needed.

        `row_max`, `row_sum` and `dlse` are contiguous; all other tensors may have any strides. `out`, `row_max` and
        `row_sum` may come from a call with more keys than `problem` holds.
        """


class TorchBackend(Backend, Protocol):
    """A backend made of torch's own operators, which autograd differentiates and `torch.func` transforms."""

    def attention(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Lq, Dv) and log-sum-exp (B, Hq, Lq) in nats."""


FUSED_BACKENDS: dict[str, FusedBackend] = {"cpp": cpp, "triton": triton}
TORCH_BACKENDS: dict[str, TorchBackend] = {"reference": reference}
# "auto" asks the backends in this order.
BACKENDS: dict[str, Backend] = {**FUSED_BACKENDS, **TORCH_BACKENDS}
