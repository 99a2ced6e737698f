"""Attention sinks: a learnable logit of each head that takes part in the softmax's sum, and has no value."""

import torch
from torch import Tensor


def with_sink(out: Tensor, lse: Tensor, sink: Tensor, cu_seqlens_q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of rows whose softmax has one more logit, from those of rows without it.

    The sum of a row's weights grows from exp(lse) to exp(lse) + exp(sink). So the output shrinks by the factor
    exp(lse) / (exp(lse) + exp(sink)), which is sigmoid(lse - sink). Differentiable in all three.

    Args:
        out: (B, H, L, Dv).
        lse: (B, H, L), in nats; -inf for a row without any key, whose output is 0 and stays 0.
        sink: (H,) or (B, H), in nats.
        cu_seqlens_q: the bounds of B packed sequences, whose tensors have a batch size of 1; see `Problem`.

    Source: Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks" (arXiv:2309.17453), equation 2,
    with a logit for each head instead of the 0 there.
    """
    sink = sink.to(lse.dtype)
    if sink.dim() == 2 and cu_seqlens_q is not None:
        tokens = torch.arange(lse.shape[2], dtype=cu_seqlens_q.dtype, device=lse.device)
        sequences = torch.searchsorted(cu_seqlens_q[1:-1].contiguous(), tokens, right=True)
        logits = sink[sequences].mT.unsqueeze(0)  # (1, H, L)
    else:
        logits = sink.unsqueeze(-1)  # (H, 1) or (B, H, 1)
    factor = torch.sigmoid(lse - logits)
    return (out * factor.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, logits.expand_as(lse))
