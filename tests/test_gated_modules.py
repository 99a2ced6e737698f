"""Bias modules with factors from the query, against formulas and against the models that have such biases."""

import pytest
import torch

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import (
    GatedBias,
    GatedOffsetBias,
    LowRankOffsetBias,
    OffsetBias,
    OffsetBiasAttention,
    RelativeKeyBias,
    T5Bias,
)


def _randomized(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def _dense(attention: OffsetBiasAttention, x: torch.Tensor, query: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The layer written out, with a bias for every pair."""
    key, value = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (2, 8)).transpose(1, 2) for name in "kv")
    scores = query @ key.mT * 8**-0.5 + bias
    if attention.is_causal:
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float("-inf"))
    return attention.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def _checked_layer(bias: GatedBias, dense_bias, is_causal: bool) -> None:
    """Compares output and all gradients of a layer with the layer written out."""
    attention = OffsetBiasAttention(16, 2, _randomized(bias), is_causal=is_causal)
    x = torch.randn(3, 19, 16, requires_grad=True)
    leaves = [x, *attention.parameters()]
    query = attention.q_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
    u = getattr(bias, "u", None)
    expected = _dense(attention, x, query if u is None else query + u.unsqueeze(1), dense_bias(bias, x, query))
    got = attention(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


OFFSETS = torch.arange(19)[:, None] - torch.arange(19)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_gated_table_is_multiplied_by_the_formula(is_causal):
    """The gate comes from each head's part of the input."""

    def dense(bias, x, query):
        parts = x.unflatten(-1, (2, 8)).transpose(1, 2)
        sums = bias.proj(parts).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        gate = sums[..., :1] * (sums[..., 1:] * bias.const - 1) + 2
        return gate * bias.bias.weight[:, OFFSETS + 29]

    _checked_layer(GatedOffsetBias(OffsetBias(2, 30), 2, 8), dense, is_causal)


@pytest.mark.parametrize("has_query_biases", [False, True])
def test_learned_relative_keys_are_products_with_the_query(has_query_biases):
    """Offsets beyond the last vector have that vector."""

    def dense(bias, x, query):
        vectors = bias.weight[OFFSETS.clamp(-6, 6) + 6]  # (L, L, D)
        query = query if bias.v is None else query + bias.v.unsqueeze(1)
        return torch.einsum("bhid,ijd->bhij", query, vectors) * 8**-0.5

    _checked_layer(RelativeKeyBias(2, 8, max_length=7, has_query_biases=has_query_biases), dense, False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_tables_of_a_low_rank_are_mixed_by_the_input(is_causal):
    """Offsets outside of the extent have no bias."""

    def dense(bias, x, query):
        mixed = bias.proj(x).unflatten(-1, (2, 3)).transpose(1, 2) @ bias.weight  # (B, H, L, extent)
        spread = mixed.gather(-1, OFFSETS.clamp(0, 10).expand(3, 2, 19, 19))
        return spread.masked_fill((OFFSETS < 0) | (OFFSETS >= 11), 0.0)

    _checked_layer(LowRankOffsetBias(16, 2, rank=3, extent=11), dense, is_causal)


def test_sinusoids_are_those_of_the_conformer_in_transformers():
    """Queries, bias of every pair, and outputs equal transformers' own relative attention."""
    conformer = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    config = conformer.Wav2Vec2ConformerConfig(
        hidden_size=16, num_attention_heads=2, position_embeddings_type="relative", attention_dropout=0.0
    )
    config._attn_implementation = "eager"
    own = _randomized(conformer.Wav2Vec2ConformerSelfAttention(config)).eval()
    x = torch.randn(2, 19, 16)
    expected, _ = own(x, relative_position_embeddings=conformer.Wav2Vec2ConformerRelPositionalEmbedding(config)(x))
    bias = RelativeKeyBias(2, 8, embed_dim=16, has_query_biases=True)
    attention = OffsetBiasAttention(16, 2, bias)
    pairs = {"q_proj": "linear_q", "k_proj": "linear_k", "v_proj": "linear_v", "out_proj": "linear_out"}
    for mine, theirs in pairs.items():
        getattr(attention, mine).load_state_dict(getattr(own, theirs).state_dict())
    bias.load_state_dict({"proj.weight": own.linear_pos.weight, "u": own.pos_bias_u, "v": own.pos_bias_v})
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_the_gate_is_wavlms_bit_for_bit():
    """The outputs of the layer equal those of transformers' WavLM up to rounding."""
    wavlm = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
    own = _randomized(wavlm.WavLMAttention(16, 2)).eval()
    x = torch.randn(2, 19, 16)
    expected, _, _ = own(x)
    bias = GatedOffsetBias(T5Bias(2, 320, 800), 2, 8)
    attention = OffsetBiasAttention(16, 2, bias)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(attention, name).load_state_dict(getattr(own, name).state_dict())
    bias.load_state_dict({
        "proj.weight": own.gru_rel_pos_linear.weight, "proj.bias": own.gru_rel_pos_linear.bias,
        "const": own.gru_rel_pos_const, "bias.weight": own.rel_attn_embed.weight})  # fmt: skip
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
    hidden = x.view(2, 19, 2, 8).permute(0, 2, 1, 3)
    projected = own.gru_rel_pos_linear(hidden).view(2, 2, 19, 2, 4).sum(-1)
    a, b = torch.sigmoid(projected).chunk(2, dim=-1)
    gate = a * (b * own.gru_rel_pos_const - 1.0) + 2.0
    assert torch.equal(bias.factors(x, x)[1], gate[..., 0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GatedOffsetBias(3, 2, 8), TypeError, "`bias` must be a module that gives a table, got int"),
        (lambda: RelativeKeyBias(2, 8), ValueError, "`max_length` or `embed_dim` must be given, and not both"),
        (lambda: RelativeKeyBias(2, 8, max_length=3, embed_dim=4), ValueError, "not both, got 3 and 4"),
        (lambda: RelativeKeyBias(2, 8, embed_dim=5), ValueError, "`embed_dim` must be even, got 5"),
        (lambda: RelativeKeyBias(2, 0, embed_dim=4), ValueError, "`head_dim` must be at least 1, got 0"),
        (lambda: LowRankOffsetBias(8, 2, 0, 4), ValueError, "`rank` must be at least 1, got 0"),
        (lambda: GatedBias().factors(None, None), NotImplementedError, "GatedBias does not define `factors`"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(make, error, message):
    """The message says what was expected and what came."""
    with pytest.raises(error, match=message):
        make()


def test_a_modules_tables_go_into_the_function_with_its_gate():
    """The layer does no more than this."""
    bias, x = _randomized(LowRankOffsetBias(16, 2, rank=3, extent=11)), torch.randn(1, 19, 16)
    q, k, v = (torch.randn(1, 2, 19, 8) for _ in range(3))
    query, gate = bias.factors(x, q)
    out = offset_bias_attention(query, k, v, bias(-18, 18), bias_gate=gate, bias_origin=18)
    expected = offset_bias_attention(q, k, v, bias.weight, bias_gate=gate, bias_origin=0, beyond="zero")
    torch.testing.assert_close(out, expected)
