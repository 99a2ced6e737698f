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
    """Each token is decoded by itself, with the keys before it in the cache."""

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
    """A wrong bias would be worse."""
    with pytest.raises(ValueError, match="no memory keys and values"):
        use_offset_bias(Encoder(attn_flash=True, attn_num_mem_kv=2, **OPTIONS), T5Bias(4))
    with pytest.raises(ValueError, match="attn_flash=True"):
        use_offset_bias(Encoder(**OPTIONS), T5Bias(4))
    layers = Encoder(attn_flash=True, **OPTIONS)
    use_offset_bias(layers, T5Bias(4))
    with pytest.raises(ValueError, match=r"`mask` must mask keys alone, .* got shape \(1, 1, 9, 9\)"):
        layers(torch.randn(1, 9, 32), attn_mask=torch.ones(9, 9, dtype=torch.bool))


def test_what_would_lose_the_bias_is_an_error():
    """A whole model has no `rel_pos` that anything reads. A bias of the layers' own would be replaced."""
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
    """Clamping would hide the mistake."""
    layers = Decoder(attn_flash=True, **OPTIONS)
    use_offset_bias(layers, _ShortTable())
    with pytest.raises(ValueError, match=r"`attn_bias` must have 17 columns for 9 queries and 9 keys, got .*\(4, 16\)"):
        layers(torch.randn(1, 9, 32))


class _ShortTable(nn.Module):
    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        return torch.zeros(4, max_offset - min_offset)


EMBEDDINGS = [{}, {"rotary_pos_emb": True, "rotary_emb_dim": 16}, {"polar_pos_emb": True}]
every_embedding = pytest.mark.parametrize("embedding", EMBEDDINGS, ids=["none", "rotary", "polar"])


def _pair(cls: type, **options: object) -> tuple[nn.Module, nn.Module]:
    """Layers with x-transformers' own ALiBi, and with this package's."""
    old, new = (
        cls(alibi_pos_bias=True, verbose=False, **OPTIONS, **options),
        cls(attn_flash=True, verbose=False, **OPTIONS, **options),
    )
    use_offset_bias(new, ALiBiBias(4))
    new.load_state_dict(old.state_dict())
    return old, new


@every_embedding
@pytest.mark.parametrize("cls", [Encoder, Decoder])
def test_rotary_and_polar_embeddings_and_positions_of_ones_own_go_with_a_table(cls, embedding):
    """Output and every gradient are equal. In all cases but the first x-transformers hands positions to `rel_pos`."""
    old, new = _pair(cls, **embedding)
    x, mask = torch.randn(2, 20, 32), torch.arange(20) < torch.tensor([[20], [13]])
    rising = torch.arange(20) * 2 + torch.randint(2, (20,))
    positions = [None, torch.arange(20), rising, rising.int() - 7]
    if "polar_pos_emb" not in embedding:  # polar embeddings take no batch of positions
        positions += [torch.stack([rising, 3 * torch.arange(20)])]
    if cls is Encoder:
        positions += [torch.randint(30, (20,)), torch.full((20,), 5)]
    for pos in positions:
        expected, got = (layers(x, mask=mask, pos=pos) for layers in (old, new))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for layers in (old, new):
            layers.zero_grad()
            layers(x, mask=mask, pos=pos).square().mean().backward()
        wanted = {name: parameter.grad for name, parameter in old.named_parameters()}
        for name, parameter in new.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("embedding", EMBEDDINGS[1:], ids=["rotary", "polar"])
def test_embeddings_are_those_of_x_transformers_with_memories_and_a_cache(embedding):
    """Memories come before the sequence, and a token at a time is at its place; T5's table is 0 at first."""
    old, new = (Decoder(attn_flash=True, verbose=False, **OPTIONS, **embedding) for _ in range(2))
    use_offset_bias(new, T5Bias(4, bidirectional=False))
    new.load_state_dict(old.state_dict(), strict=False)
    x = torch.randn(2, 12, 32)
    if "polar_pos_emb" not in embedding:  # x-transformers has no positions for memories with polar embeddings
        mems = [torch.randn(2, 5, 32), torch.randn(2, 5, 32)]
        torch.testing.assert_close(new(x, mems=mems), old(x, mems=mems), rtol=1e-4, atol=1e-5)
    _, cache = new(x[:, :6], return_hiddens=True)
    for length in range(7, 13):
        step, cache = new(x[:, :length], cache=cache, seq_pos_offset=0, return_hiddens=True)
        torch.testing.assert_close(step[:, -1], old(x)[:, length - 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.forward(x), new(x))  # `forward` bypasses the hook, so positions are looked at


@pytest.mark.parametrize("embedding", EMBEDDINGS[:2], ids=["none", "rotary"])
def test_positions_of_ones_own_go_with_a_cache(embedding):
    """The queries lie on the last positions."""
    _, new = _pair(Decoder, **embedding)
    x, pos = torch.randn(2, 12, 32), 3 * torch.arange(12)
    whole = new(x, pos=pos)
    _, cache = new(x[:, :6], pos=pos[:6], return_hiddens=True)
    for length in range(7, 13):
        step, cache = new(x[:, :length], pos=pos[:length], cache=cache, return_hiddens=True)
        torch.testing.assert_close(step[:, -1], whole[:, length - 1], rtol=1e-4, atol=1e-5)


@every_embedding
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, where x-transformers turns autocast off
def test_layers_with_a_table_compile_as_one_graph(embedding):
    """An object that is no tensor carries the table."""
    _, new = _pair(Decoder, **embedding)
    x = torch.randn(2, 9, 32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="aot_eager")(x), new(x))


def test_positions_that_cannot_be_served_are_an_error():
    """A wrong mask or a wrong position would be worse."""
    encoder, decoder = (_pair(cls)[1] for cls in (Encoder, Decoder))
    x = torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match="`pos` must rise from token to token in a Decoder"):
        decoder(x, pos=torch.tensor([0, 1, 1, 2]))
    with pytest.raises(ValueError, match=r"`pos` must have a position for each of 4 keys, got shape \(3,\)"):
        encoder(x, pos=torch.arange(3))
    with pytest.raises(TypeError, match=r"`pos` must hold integers, got torch\.float32"):
        encoder(x, pos=torch.arange(4.0))
    with pytest.raises(ValueError, match=r"`pos` must have shape \(L,\) or \(B, L\), got shape \(1, 1, 4\)"):
        encoder(x, pos=torch.arange(4)[None, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_data_dependent_alibi": True}, "must have no bias that depends on the content"),
        ({"attn_use_rel_proj_pos_bias": True}, "must have no bias that depends on the content"),
        ({"attn_max_attend_past": 5}, "must attend to all keys, got max_attend_past=5"),
    ],
)
def test_layers_with_a_bias_or_a_mask_of_their_own_are_refused_by_name(options, message):
    """The error comes before any call."""
    with pytest.raises(ValueError, match=message):
        use_offset_bias(Decoder(attn_flash=True, **OPTIONS, **options), ALiBiBias(4))
