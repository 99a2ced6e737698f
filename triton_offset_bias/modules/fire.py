"""FIRE: a small network on the logarithm of the distance."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from triton_offset_bias.autocast import has_autocast
from triton_offset_bias.backends.limits import MAX_RANK
from triton_offset_bias.checks.arguments import check_offset_range, checked_count, checked_int
from triton_offset_bias.modules.ranges import distance_range


class FireBias(nn.Module):
    """A network with one hidden layer, on a distance measured in logarithmic steps.

        bias[h, offset] = f(psi(|offset|) / psi(L))[h]       psi(x) = log(|c| x + 1)       L >= threshold

    FIRE divides by ``psi(max(L, i))`` for a query at position i. As long as i <= L, this depends on the offset alone,
    and this module's table is exact. Offsets beyond `threshold` raise an error, since some query then lies beyond it.
    The module does not see positions: with `query_start`, positions or a window, you must keep every query at a
    position of at most `threshold`, even if its keys are near. `gated` serves queries beyond the threshold.

    FIRE is made for causal attention, where ``|offset| = offset``. In other attention a key after the query gets the
    bias of a key at the same distance before it, as in the authors' code.

    Args:
        num_heads: heads, each an output of the network.
        threshold: the highest position of a query, counted from 0; also L's initial value and lower bound.
        hidden_size: width of the hidden layer.

    Attributes:
        c: (1,) parameter, initially 0.1; its sign does not matter.
        limit: (1,) parameter, the paper's L, initially `threshold`. A value below `threshold` counts as `threshold` and
            gets no gradient: with a smaller L the bias would not be a table.
        hidden, out: f's layers, Linear(1, hidden_size), then ReLU, and Linear(hidden_size, num_heads), initialised as
            torch does.

    State dicts in which `c` and `limit` have shape () load too.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is below 1.

    Source:
        Li et al. 2024 (FIRE, arXiv:2310.04418), section 3, and the code in its appendix.
    """

    def __init__(self, num_heads: int, threshold: int, hidden_size: int = 32) -> None:
        super().__init__()
        self.num_heads = checked_count("num_heads", num_heads)
        self.threshold = checked_count("threshold", threshold)
        self.hidden_size = checked_count("hidden_size", hidden_size)
        # The parameters have an axis, because `fully_shard` takes no parameters of shape ().
        self.c = nn.Parameter(torch.full((1,), 0.1))
        self.limit = nn.Parameter(torch.full((1,), float(threshold)))
        self.hidden = nn.Linear(1, hidden_size)
        self.out = nn.Linear(hidden_size, num_heads)

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of every offset from `min_offset` to `max_offset`, both included.

        Returns:
            (num_heads, max_offset - min_offset + 1) float32; as `bias`, its `bias_origin` is ``-min_offset``.

        Raises:
            ValueError: `max_offset` is below `min_offset`, an offset is further from 0 than `threshold`, or the
                parameters' dtype cannot hold `threshold`.
        """
        check_offset_range(min_offset, max_offset)
        for name, offset in (("min_offset", min_offset), ("max_offset", max_offset)):
            if abs(offset) > self.threshold:
                raise ValueError(
                    f"`{name}` must be within {self.threshold} of 0, because beyond its threshold FIRE depends on the "
                    f"query's position and is no table, got {offset}; build FireBias with a larger `threshold`"
                )
        distances = distance_range(min_offset, max_offset, self.c.device)
        return self._network(self._psi(distances) / self._psi(self._checked_limit()))

    def gated(self, len_q: int, len_k: int, *, query_start: int | None = None, rank: int = 16) -> tuple[Tensor, Tensor]:
        r"""Tables and gate for queries beyond the threshold: ``offset_bias_attention(..., table, bias_gate=gate)``.

        For one offset the bias is piecewise linear in ``s = 1 / psi(max(L, i))``, as f is a network of ReLUs. Table r
        holds the bias of every offset at the r-th of `rank` values of s, which are evenly spaced from that of the last
        query to that of the queries up to L. Query i weighs the two tables around its s: linear interpolation. It is
        exact for queries up to L, and wherever no unit of f has its kink between the two values. Elsewhere the error
        is at most

            psi(|offset|) * step / 4 * sum over units k of |out.weight[h, k] * hidden.weight[k]|      step: of s

        Args:
            len_q: number of queries.
            len_k: number of keys.
            query_start: position of query 0 counted from key 0; default ``len_k - len_q``. No query lies before key 0.
            rank: the number of tables, 2 to 256.

        Returns:
            The table, (num_heads, rank, len_q + len_k - 1) float32, which covers all offsets. Its `bias_origin` is
            ``len_k - 1 - query_start``. And the gate, (len_q, rank) float32: for `bias_gate` expand it to
            (B, num_heads, len_q, rank). Both are differentiable in all parameters.

        Raises:
            TypeError: an argument is no int.
            ValueError: a length is below 1, `rank` is out of range, or a query lies before key 0.
        """
        start = checked_count("len_k", len_k) - checked_count("len_q", len_q)
        start = start if query_start is None else checked_int("query_start", query_start)
        if start < 0:
            raise ValueError(f"`query_start` must be at least 0, got {start}")
        if not 2 <= checked_count("rank", rank) <= MAX_RANK:
            raise ValueError(f"`rank` must be between 2 and {MAX_RANK}, got {rank}")
        limit = self._checked_limit()
        positions = torch.arange(start, start + len_q, device=limit.device, dtype=torch.float32)
        inverse = 1 / self._psi(torch.maximum(positions, limit))  # (len_q,)
        highest, lowest = 1 / self._psi(limit), inverse[-1]
        knots = torch.lerp(lowest, highest, torch.linspace(0, 1, rank, device=limit.device))
        distances = distance_range(start - len_k + 1, start + len_q - 1, limit.device)
        table = self._network(self._psi(distances) * knots[:, None])  # (num_heads, rank, offsets)
        step = (highest - lowest) / (rank - 1)
        place = (inverse - lowest) / torch.where(step > 0, step, 1.0)  # all queries at one s weigh the first table
        gate = (1 - (place[:, None] - torch.arange(rank, device=limit.device)).abs()).clamp(min=0)
        return table, gate

    def _checked_limit(self) -> Tensor:
        """L, at least `threshold`, (1,) float32."""
        largest = torch.finfo(self.limit.dtype).max
        if self.threshold > largest:
            raise ValueError(f"`threshold` must be at most {largest:g} for {self.limit.dtype}, got {self.threshold}")
        return self.limit.float().clamp(min=self.threshold)

    def _network(self, normalised: Tensor) -> Tensor:
        """The network f in float32, (num_heads, ...), on numbers of any shape."""
        device_type = normalised.device.type
        with torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext():
            hidden = torch.relu(_linear(self.hidden, normalised.unsqueeze(-1)))  # (..., hidden_size)
            return _linear(self.out, hidden).movedim(-1, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (f"{prefix}c", f"{prefix}limit"):
            if isinstance(state_dict.get(name), Tensor) and state_dict[name].dim() == 0:
                state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _psi(self, distances: Tensor) -> Tensor:
        return torch.log1p(self.c.float().abs() * distances)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"num_heads={self.num_heads}, threshold={self.threshold}, hidden_size={self.hidden_size}"


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in float32, whatever its dtype."""
    return nn.functional.linear(x, layer.weight.float(), layer.bias.float())
