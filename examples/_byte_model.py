"""The text and the model of `train_bytes.py` and of `length_generalization.py`."""

import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_offset_bias.modules import OffsetBiasAttention

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT = 10  # one file in so many


def read_text(folder: Path, min_bytes: int) -> tuple[Tensor, Tensor]:
    """The bytes of all .py files under `folder`, for training and held out, each a (bytes,) uint8 tensor.

    The split is by file and depends on the files' paths below `folder` alone, not on the order they are listed in.
    Tests, installed packages and generated tables are skipped.

    Raises:
        ValueError: `folder` is no directory or has fewer than two files, or a part has fewer than `min_bytes` bytes.
    """
    if not folder.is_dir():
        raise ValueError(f"`--text-dir` must be a directory, got {folder}")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file()]
    names = [name for name in names if not SKIPPED_FOLDERS.intersection(name.split("/"))]
    if len(names) < 2:
        raise ValueError(f"`--text-dir` must hold at least 2 .py files that are no tests, got {len(names)} in {folder}")
    names.sort(key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name))
    num_held_out = max(1, len(names) // HELD_OUT)
    parts = [
        b"".join((folder / name).read_bytes() + b"\0" for name in part)
        for part in (names[num_held_out:], names[:num_held_out])
    ]
    if min(map(len, parts)) < min_bytes:
        sizes = " and ".join(str(len(part)) for part in parts)
        raise ValueError(f"`--text-dir` must give {min_bytes} bytes to train on and as many to hold out, got {sizes}")
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, held_out


def draw_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows of `length` + 1 bytes from random places of `text`: (count, length + 1) int64."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


def dense_causal_mask(table: Tensor) -> Tensor:
    """The bias of every pair, (H, L, L), -inf where the key is after the query, from `table` (H, L) of offsets 0 on."""
    positions = torch.arange(table.shape[1], device=table.device)
    offsets = positions[:, None] - positions
    return table[:, offsets.clamp(min=0)].masked_fill(offsets < 0, -torch.inf)


def sdpa_attention(layer: OffsetBiasAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The result of `layer`, computed by torch's SDPA with a materialised bias (H, L, L)."""
    projected = (project(x) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (y.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2) for y in projected)
    return layer.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer layer: attention, then a feed-forward network."""

    def __init__(self, width: int, num_heads: int, bias: nn.Module | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = OffsetBiasAttention(width, num_heads, bias, is_causal=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps (B, L, width) to (B, L, width); `mask` is as in `ByteTransformer`."""
        normed = self.attention_norm(x)
        x = x + (self.attention(normed) if mask is None else sdpa_attention(self.attention, normed, mask))
        return x + self.feed_forward(x)


class ByteTransformer(nn.Module):
    """A causal transformer over bytes. One bias, shared by all layers, is its only knowledge of positions.

    Args:
        width: size of a byte's embedding; a multiple of `num_heads`.
        num_heads: attention heads of every layer.
        num_layers: layers.
        bias: a module that gives the table for all layers, such as `OffsetBias`; None: nothing but the causal order.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int, bias: nn.Module | None) -> None:
        super().__init__()
        self.bias = bias
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, bias) for _ in range(num_layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor, *, materialised: bool = False) -> Tensor:
        """Logits of the next byte, (B, L, 256), of `tokens` (B, L).

        With `materialised`, torch's SDPA replaces the package; the bias of every pair is built once for all layers.
        """
        mask = None
        if materialised and self.bias is not None:
            mask = dense_causal_mask(self.bias(0, tokens.shape[1] - 1))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)

    def bits_per_byte(self, windows: Tensor, *, materialised: bool = False, last: int | None = None) -> Tensor:
        """The mean -log2 of the probability of each next byte of `windows` (B, L + 1), or of the `last` bytes alone."""
        logits, targets = self(windows[:, :-1], materialised=materialised), windows[:, 1:]
        if last is not None:
            logits, targets = logits[:, -last:], targets[:, -last:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / torch.tensor(2.0).log().item()
