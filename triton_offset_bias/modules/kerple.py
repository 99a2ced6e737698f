"""KERPLE: penalties that grow with the logarithm or with a power of the distance."""

from typing import Literal

import torch
from torch import Tensor, nn

from triton_offset_bias.checks.arguments import check_tensor, checked_count, shape
from triton_offset_bias.modules.ranges import distance_range

KINDS = ("log", "power")
# The least distance of initial values from the ends of their ranges. The authors' code clamps values there.
MARGIN = 0.01


class KerpleBias(nn.Module):
    """A penalty with two positive numbers per head, r1 and r2.

        "log":    bias[h, offset] = -r1[h] * log(1 + r2[h] * |offset|)
        "power":  bias[h, offset] = -r1[h] * |offset| ** r2[h]             r2 < 2

    The numbers are positive by construction: ``r1 = exp(raw_r1)``, and ``r2 = exp(raw_r2)`` (log) or
    ``2 * sigmoid(raw_r2)`` (power). Initial values are drawn as the authors draw them: r1 from 0 to 2 and r2 from 0 to
    1 (log), or r1 from 0 to 1 and r2 from 0 to 2 (power), at least 0.01 away from the ends. ALiBi is "power" with
    r2 = 1.

    Args:
        num_heads: heads, each with numbers of its own.
        kind: "log" (default) or "power".

    Attributes:
        raw_r1, raw_r2: (num_heads,) parameters, unconstrained.

    Raises:
        TypeError: `num_heads` is no int.
        ValueError: `num_heads` is below 1, or `kind` is neither "log" nor "power".

    Source:
        Chi et al. 2022 (KERPLE, arXiv:2205.09921), the logarithmic and the power variant; initial values as in the
        authors' code.
    """

    def __init__(self, num_heads: int, kind: Literal["log", "power"] = "log") -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        self.kind = kind
        self.raw_r1 = nn.Parameter(torch.empty(num_heads))
        self.raw_r2 = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws r1 and r2 anew."""
        highest_r1, highest_r2 = (2.0, 1.0) if self.kind == "log" else (1.0, 2.0)
        device = self.raw_r1.device
        self._store(
            torch.empty(self.num_heads, device=device).uniform_(MARGIN, highest_r1 - MARGIN),
            torch.empty(self.num_heads, device=device).uniform_(MARGIN, highest_r2 - MARGIN),
        )

    @property
    def r1(self) -> Tensor:
        """The positive factor of every head, (num_heads,) float32, in nats."""
        return self.raw_r1.float().exp()

    @property
    def r2(self) -> Tensor:
        """The number r2 of every head, (num_heads,) float32: a positive rate per position (log), or an exponent from 0
        to 2 (power).
        """
        raw = self.raw_r2.float()
        return raw.exp() if self.kind == "log" else 2.0 * raw.sigmoid()

    def set_values(self, r1: Tensor, r2: Tensor) -> None:
        """Sets r1 and r2, for example to a trained model's values.

        Args:
            r1: (num_heads,) positive.
            r2: (num_heads,) positive; below 2 for "power".

        Raises:
            TypeError: `r1` or `r2` is no tensor.
            ValueError: `r1` or `r2` has another shape, or a value out of range.
        """
        highest = float("inf") if self.kind == "log" else 2.0
        for name, values, bound in (("r1", r1, float("inf")), ("r2", r2, highest)):
            check_tensor(name, values)
            if shape(values) != (self.num_heads,):
                raise ValueError(f"`{name}` must have shape ({self.num_heads},), got shape {shape(values)}")
            if not bool(((values > 0) & (values < bound)).all()):
                raise ValueError(f"`{name}` must be between 0 and {bound}, both excluded, got {values.tolist()}")
        self._store(r1, r2)

    @torch.no_grad()
    def _store(self, r1: Tensor, r2: Tensor) -> None:
        self.raw_r1.copy_(r1.double().log())
        self.raw_r2.copy_(r2.double().log() if self.kind == "log" else (r2.double() / 2).logit())

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`.
        """
        distances = distance_range(min_offset, max_offset, self.raw_r1.device)
        r1, r2 = self.r1[:, None], self.r2[:, None]
        return -r1 * (torch.log1p(r2 * distances) if self.kind == "log" else distances.pow(r2))

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, kind={self.kind!r}"
