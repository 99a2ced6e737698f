"""A checked attention call, as it travels from the public function to a backend: the one list of options."""

from typing import NamedTuple, cast

from torch import Tensor

from triton_offset_bias import table


class Problem(NamedTuple):
    """One attention call with every argument checked and every default filled in.

    Shapes are as in `offset_bias_attention`. A key is attended to when `min_offset <= offset <= max_offset` and the
    padding mask allows it. `bias_origin` and `beyond` are meaningless when `bias` is None.

    `ops` makes the operators' schema from the fields: their names, order and types are the operators' arguments. The
    tensors of `DIFFERENTIABLE` come first, then the other tensors, then all other values.

    With `is_causal_by_index`, which only a problem with positions has, query i attends to no key behind index
    ``query_start + i``, whatever the positions are.

    With `cu_seqlens_q` and `cu_seqlens_k` the sequences are packed along the length, and the tensors' batch size is 1.
    The last query of each sequence lies on its last key, whatever `query_start` says. Only a `bias` may have a batch
    axis then. `query_starts` places the queries of each packed sequence otherwise; no offset may then lie outside of
    `reachable_offsets`.

    With `key_lengths` sequence b has only its first ``key_lengths[b]`` keys, and its last query lies on the last of
    them. `query_start` is then the position of query 0 in a sequence that has all keys.

    With `bias_gate`, whose last axis is the rank R, `bias` has an axis R in front of its columns: (R, N), (H, R, N) or
    (B, H, R, N).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    bias_gate: Tensor | None  # (B, Hq, Lq, R)
    key_padding_mask: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    key_lengths: Tensor | None  # (B,), not yet compared with the number of keys
    cu_seqlens_q: Tensor | None  # (sequences + 1,)
    cu_seqlens_k: Tensor | None
    query_starts: Tensor | None  # (sequences,), the position of each one's first query counted from its first key
    seed: Tensor | None  # () int64, selects the dropped weights; None without dropout
    scale: float
    dropout_p: float
    query_start: int
    min_offset: int
    max_offset: int
    is_causal_by_index: bool
    bias_origin: int
    beyond: str
    deterministic: bool
    max_seqlen_q: int  # queries of the longest sequence
    max_seqlen_k: int
    dropout_place: tuple[int, ...] | None  # see `dropout.Place`; None for a call with all rows and heads

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of the fields."""
        return cast(tuple[Tensor | None, ...], self[:NUM_TENSORS])

    @property
    def num_sequences(self) -> int:
        """The number of sequences: the batch size, or the number of packed sequences."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def has_table_per_sequence(self) -> bool:
        """Whether the first axis of `bias` counts sequences."""
        return self.bias is not None and self.bias.dim() == (3 if self.bias_gate is None else 4)

    @property
    def reachable_offsets(self) -> tuple[int, int]:
        """The smallest and the largest offset between any query and any key, where there are no positions."""
        if self.cu_seqlens_q is None:
            return table.reachable_offsets(self.max_seqlen_q, self.max_seqlen_k, self.query_start)
        return 1 - self.max_seqlen_q, self.max_seqlen_k - 1


NUM_TENSORS = Problem._fields.index("scale")  # that a problem has, given or None; they are its first fields

# The tensors that have gradients, in the order in which the operators return them.
DIFFERENTIABLE = ("query", "key", "value", "bias", "bias_gate")
