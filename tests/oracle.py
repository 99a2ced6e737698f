"""The truth: attention with an offset bias and its gradients, dense, written out from the formulas in plain PyTorch.

    S = scale <q, k> + bias[i - j]      P = softmax(S)      out = (Z P) V      lse = log sum exp S
    dP = Z dO V^T      dS = P (dP - <dO, out> + dlse)      dQ = scale dS K      dK = scale dS^T Q      dV = (Z P)^T dO
    db[o] = sum of dS over batch and pairs with i - j = o

The bias is b[i - j]. With a gate it is the sum over r of gate[i, r] b[r, i - j]. Then

    dgate[i, r] = sum over j of dS b[r, i - j]      db[r, o] = sum of gate[i, r] dS over batch and pairs with i - j = o

Z is 1; with dropout it is 0 for the dropped weights and 1 / (1 - p) for the others.
Results are compared with the oracle in float64. In the dtype of the inputs the oracle shows plain PyTorch's accuracy.
It shares no code with the package.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
GATED_NAMES = (*NAMES, "dgate")


@dataclass
class Results:
    """Output, log-sum-exp and gradients.

    `summed` and `summed_gate` are the sums of magnitudes that went into each element of `dbias` and `dgate`.
    """

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    dgate: Tensor | None = None
    summed: Tensor | None = None
    summed_gate: Tensor | None = None


def pair_offsets(
    len_q: int,
    len_k: int,
    query_start: int | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """The offset of every pair, (1 or B, Lq, Lk) int64."""
    if query_positions is None:
        lengths = torch.tensor([len_k]) if key_lengths is None else key_lengths.long()
        starts = lengths[:, None] - len_q if query_start is None else query_start
        query_positions = torch.arange(len_q) + starts
        key_positions = torch.arange(len_k)
    offsets = query_positions.long()[..., :, None] - key_positions.long()[..., None, :]
    return offsets if offsets.dim() == 3 else offsets.unsqueeze(0)


def attended_pairs(
    offsets: Tensor,
    is_causal: bool,
    window_size: tuple[int, int],
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None = None,
    causal_by: str = "position",
) -> Tensor:
    """True for pairs that are attended to, (1 or B, Lq, Lk) bool."""
    attended = torch.ones_like(offsets, dtype=torch.bool)
    if is_causal and causal_by == "index":
        attended &= attended.tril(offsets.shape[2] - offsets.shape[1])
    elif is_causal:
        attended &= offsets >= 0
    left, right = window_size
    if left != -1:
        attended &= offsets <= left
    if right != -1:
        attended &= offsets >= -right
    if key_lengths is not None:
        attended &= torch.arange(offsets.shape[2]) < key_lengths[:, None, None]
    return attended if key_padding_mask is None else attended & key_padding_mask[:, None, :]


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias_origin: int | None = None,
    beyond: str = "clamp",
    query_start: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    key_padding_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_by: str = "position",
    bias_gate: Tensor | None = None,
    factors: Tensor | None = None,
) -> Results:
    """The results in `dtype`; the gradients as well when `dout` is given. `factors` is dropout's Z, (B, H, Lq, Lk)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // max(k.shape[1], 1) if enable_gqa else 1
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    offsets = pair_offsets(q.shape[2], k.shape[2], query_start, query_positions, key_positions, key_lengths)
    attended = attended_pairs(offsets, is_causal, window_size, key_padding_mask, key_lengths, causal_by).unsqueeze(1)
    scores = scale * (q @ k.mT)
    table = None if bias is None else _Table(bias, bias_gate, offsets, bias_origin, beyond, q.shape[:2])
    if table is not None:
        scores = scores + table.dense(dtype)
    probs, lse = _softmax(scores.masked_fill(~attended, float("-inf")))
    factors = torch.ones((), dtype=dtype) if factors is None else factors.to(dtype)
    results = Results((factors * probs) @ v, lse)
    if dout is not None:
        _differentiate(results, q, k, v, probs, factors, dout.to(dtype), dlse, scale, group, table)
    return results


def _differentiate(results, q, k, v, probs, factors, dout, dlse, scale, group, table) -> None:
    """Fills in the gradients; `group` query heads share a key head."""
    dlse = torch.zeros_like(results.lse) if dlse is None else dlse.to(dout.dtype)
    row = ((dout * results.out).sum(-1) - dlse).unsqueeze(-1)
    dscores = probs * (factors * (dout @ v.mT) - row)
    results.dq = scale * (dscores @ k)
    results.dk = (scale * (dscores.mT @ q)).unflatten(1, (-1, group)).sum(2)
    results.dv = ((factors * probs).mT @ dout).unflatten(1, (-1, group)).sum(2)
    if table is not None:
        table.differentiate(results, dscores)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp of the rows; a row of -inf alone has probabilities 0."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    lse = scores.logsumexp(-1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0), lse


class _Table:
    """Bias tables seen from the pairs, with an axis for a gate's rank R, which is 1 without a gate; in float64."""

    def __init__(
        self,
        bias: Tensor,
        gate: Tensor | None,
        offsets: Tensor,
        origin: int | None,
        beyond: str,
        batch_heads: tuple[int, int],
    ) -> None:
        columns = bias.shape[-1]
        self.original, self.batch_heads, self.pairs = bias.shape, tuple(batch_heads), offsets.shape[-2:]
        self.gate = None if gate is None else gate.double() if gate.dim() == 4 else gate.double().unsqueeze(-1)
        self.gate_shape = None if gate is None else gate.shape
        values = bias.double() if gate is not None and gate.dim() == 4 else bias.double().unsqueeze(-2)
        self.values = values.reshape((1,) * (4 - values.dim()) + values.shape)  # (1 or B, 1 or H, R, N)
        column = offsets + ((columns - 1) // 2 if origin is None else origin)
        outside = (column < 0) | (column >= columns)
        # One more column than the table has collects the pairs that see no bias.
        column = torch.where(outside, columns, column) if beyond == "zero" else column.clamp(0, columns - 1)
        self.index = column.flatten(1)[:, None, None].expand(*self.batch_heads, self.values.shape[2], -1)

    def _spread(self) -> Tensor:
        """The tables' numbers at every pair, (B, H, R, Lq, Lk)."""
        values = torch.nn.functional.pad(self.values, (0, 1)).expand(*self.batch_heads, -1, -1)
        return values.gather(-1, self.index).unflatten(-1, self.pairs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The bias of every pair, (B, H, Lq, Lk)."""
        spread = self._spread().to(dtype)
        return spread[:, :, 0] if self.gate is None else torch.einsum("bhir,bhrij->bhij", self.gate.to(dtype), spread)

    def differentiate(self, results: Results, dscores: Tensor) -> None:
        """Fills in the gradients of table and gate."""
        dscores = dscores.double()
        results.dbias, results.summed = (
            self._scatter(ds, gate) for ds, gate in self._and_magnitudes(dscores, self.gate)
        )
        if self.gate is not None:
            spread = self._and_magnitudes(dscores, self._spread())
            found = [torch.einsum("bhij,bhrij->bhir", ds, x).reshape(self.gate_shape) for ds, x in spread]
            results.dgate, results.summed_gate = found

    @staticmethod
    def _and_magnitudes(dscores: Tensor, factor: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        return [(dscores, factor), (dscores.abs(), None if factor is None else factor.abs())]

    def _scatter(self, dscores: Tensor, gate: Tensor | None) -> Tensor:
        """Sums (B, H, Lq, Lk), times the gate, over each column's pairs, and over what shares a table."""
        spread = dscores.unsqueeze(2) if gate is None else torch.einsum("bhij,bhir->bhrij", dscores, gate)
        sums = torch.zeros(*self.index.shape[:3], self.values.shape[3] + 1, dtype=torch.float64)
        sums.scatter_add_(-1, self.index, spread.flatten(3))
        return sums[..., :-1].sum_to_size(self.values.shape).reshape(self.original)
