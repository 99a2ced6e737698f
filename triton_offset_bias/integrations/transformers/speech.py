"""Speech encoders whose bias has a factor from the query: WavLM's gated buckets, and relative keys of Conformers."""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerSelfAttention
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from triton_offset_bias.integrations.replacement import Replacement
from triton_offset_bias.integrations.transformers.attention import MaskedAttention, refuse_attentions
from triton_offset_bias.modules.t5 import t5_buckets


def unserved_reason(config: PretrainedConfig) -> str | None:
    """Why a model with this configuration is not served: rotary embeddings leave no bias to serve."""
    if getattr(config, "position_embeddings_type", "relative") in ("relative", "relative_key"):
        return None
    return f"position_embeddings_type={config.position_embeddings_type!r}, which is no bias"


class OffsetBiasWavLMAttention(MaskedAttention, WavLMAttention):
    """WavLM's attention. The first layer's table serves all layers, and each layer has gates of its own."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **kwargs: object,
    ) -> tuple[Tensor, None, Tensor]:
        """Attends with a gated table.

        Args:
            hidden_states: (B, L, embed_dim).
            attention_mask: (B, L), 1 or True = attend.
            position_bias: the table that the first layer returned; None for the first layer.
            index: ignored, as in the layer that this one replaces.

        Returns:
            (B, L, embed_dim), None, and the table, (heads, offsets), for the next layer.
        """
        refuse_attentions(kwargs.get("output_attentions"))
        if position_bias is None:  # offsets beyond share the buckets of the ends
            buckets = t5_buckets(
                -self.max_distance, self.max_distance, self.num_buckets, self.max_distance, device=hidden_states.device
            )
            position_bias = self.rel_attn_embed(buckets).T
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(
            query,
            key,
            value,
            position_bias,
            None if attention_mask is None else attention_mask == 1,
            bias_gate=self._gate(hidden_states),
            scale=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out), None, position_bias

    def _gate(self, hidden_states: Tensor) -> Tensor:
        """The factors of the queries, (B, heads, L).

        Source: Chi et al. 2022 (XLM-E, arXiv:2106.16138), section 3.2, in the form of WavLM's code.
        """
        heads = hidden_states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        gates = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1).sigmoid()  # (B, heads, L, 2)
        return gates[..., 0] * (gates[..., 1] * self.gru_rel_pos_const[..., 0] - 1.0) + 2.0


class _ConformerAttention(MaskedAttention):
    """The attention of Conformers. Its bias is the product of the query and a vector for each offset."""

    num_heads: int
    head_size: int
    position_embeddings_type: str | None
    linear_q: nn.Linear
    linear_k: nn.Linear
    linear_v: nn.Linear
    linear_out: nn.Linear
    linear_pos: nn.Linear
    pos_bias_u: nn.Parameter
    pos_bias_v: nn.Parameter
    distance_embedding: nn.Embedding
    left_max_position_embeddings: int
    right_max_position_embeddings: int
    dropout: nn.Dropout
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends with a gated table; in an adapter without one.

        Args:
            hidden_states: (B, L, hidden_size).
            attention_mask: what `padding_of` takes, or the same expanded to all queries.
            relative_position_embeddings: (1, 2 L - 1, hidden_size), of offset L - 1 first; None for relative keys.

        Returns:
            (B, L, hidden_size), and None in the place of the weights.
        """
        refuse_attentions(kwargs.get("output_attentions"))
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.linear_q, self.linear_k, self.linear_v)
        )
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.stride(2) == 0:
            attention_mask = attention_mask[:, :, :1]  # one row that older versions expand to all queries
        bias, bias_origin, gate, scale = None, None, None, self.head_size**-0.5
        if self.position_embeddings_type == "relative_key":
            left, right = self.left_max_position_embeddings, self.right_max_position_embeddings
            rows = torch.arange(left + right, -1, -1, device=query.device)  # of offset -right first
            bias = self.distance_embedding(rows).to(query.dtype).T  # (head_size, offsets)
            bias_origin, gate = right, query * scale
        elif self.position_embeddings_type == "relative":
            if relative_position_embeddings is None:
                raise ValueError("`relative_position_embeddings` must be a tensor for relative positions, got None")
            # (heads, head_size, offsets), from offset 1 - L on. The embeddings begin with offset L - 1.
            vectors = self.linear_pos(relative_position_embeddings[0]).flip(0)
            bias = vectors.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0)
            gate = (query + self.pos_bias_v[:, None]) * scale
            query = query + self.pos_bias_u[:, None]
        out = self.attend(
            query,
            key,
            value,
            bias,
            attention_mask,
            bias_gate=gate,
            bias_origin=bias_origin,
            scale=scale,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.linear_out(out), None


class OffsetBiasWav2Vec2ConformerSelfAttention(_ConformerAttention, Wav2Vec2ConformerSelfAttention):
    """The attention of wav2vec2-conformer.

    Source: Dai et al. 2019 (Transformer-XL, arXiv:1901.02860), section 3.3.
    """


class OffsetBiasWav2Vec2BertSelfAttention(_ConformerAttention, Wav2Vec2BertSelfAttention):
    """The attention of w2v-BERT 2.0. In adapters it has no bias.

    Source: Shaw et al. 2018 (arXiv:1803.02155), section 3.2, equation 4; Dai et al. 2019 (arXiv:1901.02860).
    """


REPLACEMENTS: tuple[type[Replacement], ...] = (
    OffsetBiasWavLMAttention,
    OffsetBiasWav2Vec2ConformerSelfAttention,
    OffsetBiasWav2Vec2BertSelfAttention,
)
