"""The model of `gated_bytes.py`: a causal transformer over bytes whose biases have a factor from the query."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import OffsetBias


class GatedBlock(nn.Module):
    """A pre-norm layer: attention with a table of its own, gated or not, then a feed-forward network.

    The gate of a query is ``2 * sigmoid(w . x + c)`` for each head, with x its normed state; it is 1 at the start.
    """

    def __init__(self, width: int, num_heads: int, length: int, *, is_gated: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.bias = OffsetBias(num_heads, length, bidirectional=False)
        self.gate = nn.Linear(width, num_heads) if is_gated else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def gates(self, normed: Tensor) -> Tensor | None:
        """The factors on the bias, (B, heads, L); None without a gate."""
        return None if self.gate is None else 2 * self.gate(normed).sigmoid().transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, L, width) to (B, L, width)."""
        normed = self.norm(x)
        query, key, value = self.qkv(normed).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        table = self.bias(0, x.shape[1] - 1)
        out = offset_bias_attention(
            query, key, value, table, bias_origin=0, bias_gate=self.gates(normed), is_causal=True
        )
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class GatedTransformer(nn.Module):
    """A causal transformer over bytes, whose only knowledge of positions is its biases."""

    def __init__(self, width: int, num_heads: int, num_layers: int, length: int, *, is_gated: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(GatedBlock(width, num_heads, length, is_gated=is_gated) for _ in range(num_layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte, (B, L, 256), of `tokens` (B, L)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def bits_per_byte(self, windows: Tensor) -> Tensor:
        """The mean -log2 of the probability of each next byte of `windows` (B, L + 1)."""
        logits, targets = self(windows[:, :-1]), windows[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / torch.tensor(2.0).log().item()

    @torch.no_grad()
    def all_gates(self, tokens: Tensor) -> Tensor:
        """The gates of every byte of `tokens` (B, L) in every layer, (layers, B, heads, L)."""
        found, x = [], self.embedding(tokens)
        for block in self.blocks:
            found.append(block.gates(block.norm(x)))
            x = block(x)
        return torch.stack(found)
