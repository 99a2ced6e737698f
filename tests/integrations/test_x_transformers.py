"""The adapter for x-transformers, beyond what docs/migrating.md checks."""

import pytest
import torch
from torch import Tensor, nn
from x_transformers import Decoder, Encoder, TransformerWrapper

from triton_offset_bias.integrations.x_transformers import use_offset_bias
from triton_offset_bias.modules import ALiBiBias, T5Bias

OPTIONS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 16}


def _gradients(layers: nn.Module, x: Tensor) -> dict[str, Tensor]:
    layers(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in layers.named_parameters()}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_key_heads_are_shared_as_in_x_transformers(kv_heads):
    """It gives query head h the key head h % kv_heads, where SDPA takes h // group."""
    old = Decoder(rel_pos_bias=True, attn_kv_heads=kv_heads, **OPTIONS)
    nn.init.normal_(old.rel_pos.relative_attention_bias.weight)
    new = Decoder(attn_flash=True, disable_abs_pos_emb=True, attn_kv_heads=kv_heads, **OPTIONS)
    use_offset_bias(new, T5Bias(4, bidirectional=False), scale=4.0)
    new.load_state_dict(old.state_dict())
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_gradients(new, x), _gradients(old, x), rtol=1e-3, atol=1e-5)


def test_decoding_with_a_cache_gives_the_same_text():
    """Token by token, each on the keys before it."""

    def build(**options):
        layers = Decoder(**OPTIONS, **options)
        return TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()

    old, new = build(alibi_pos_bias=True), build(attn_flash=True)
    use_offset_bias(new.attn_layers, ALiBiBias(4))
    new.load_state_dict(old.state_dict())
    tokens = torch.randint(50, (2, 20))
    whole = old(tokens)
    logits, cache = new(tokens[:, :12], return_intermediates=True)
    torch.testing.assert_close(logits, whole[:, :12], rtol=1e-4, atol=1e-5)
    for length in range(13, 21):
        logits, cache = new(tokens[:, :length], cache=cache, return_intermediates=True)
        torch.testing.assert_close(logits[:, -1], whole[:, length - 1], rtol=1e-4, atol=1e-5)


def test_what_the_adapter_does_not_serve_is_an_error():
    """Not a wrong bias."""
    with pytest.raises(ValueError, match="no memory keys and values"):
        use_offset_bias(Encoder(attn_flash=True, attn_num_mem_kv=2, **OPTIONS), T5Bias(4))
    with pytest.raises(ValueError, match="attn_flash=True"):
        use_offset_bias(Encoder(**OPTIONS), T5Bias(4))
    layers = Encoder(attn_flash=True, **OPTIONS)
    use_offset_bias(layers, T5Bias(4))
    with pytest.raises(ValueError, match=r"`mask` must mask keys alone, .* got shape \(1, 1, 9, 9\)"):
        layers(torch.randn(1, 9, 32), attn_mask=torch.ones(9, 9, dtype=torch.bool))


def test_what_would_lose_the_bias_is_an_error():
    """A whole model has no `rel_pos` that anything reads; a bias of the layers' own would be replaced."""
    layers = Decoder(attn_flash=True, **OPTIONS)
    with pytest.raises(TypeError, match=r"`layers` must be an Encoder or a Decoder .* got TransformerWrapper"):
        use_offset_bias(TransformerWrapper(num_tokens=5, max_seq_len=9, attn_layers=layers), T5Bias(4))
    with pytest.raises(ValueError, match="`layers` must have no position bias of their own"):
        use_offset_bias(Decoder(attn_flash=True, alibi_pos_bias=True, **OPTIONS), T5Bias(4))
    use_offset_bias(layers, T5Bias(4))
    with pytest.raises(ValueError, match=r"`layers` must have no position bias .* got RelativePositionTable"):
        use_offset_bias(layers, T5Bias(4))
    with pytest.raises(ValueError, match="plain softmax"):
        use_offset_bias(Decoder(attn_flash=True, attn_gumbel_softmax=True, **OPTIONS), T5Bias(4))


def test_a_table_of_another_length_is_an_error():
    """Clamping would hide it."""
    layers = Decoder(attn_flash=True, **OPTIONS)
    use_offset_bias(layers, _ShortTable())
    with pytest.raises(ValueError, match=r"`attn_bias` must have 17 columns for 9 queries and 9 keys, got .*\(4, 16\)"):
        layers(torch.randn(1, 9, 32))


class _ShortTable(nn.Module):
    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        return torch.zeros(4, max_offset - min_offset)
