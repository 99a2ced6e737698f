"""The adapter for x-transformers of docs/migrating.md, beyond what its page checks itself."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from triton_offset_bias.modules import ALiBiBias, T5Bias

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
OPTIONS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 16}


@pytest.fixture
def adapter() -> dict:
    """What the page's program for x-transformers defines, once it has run."""
    pytest.importorskip("x_transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "class TableAttend" in block]
    names: dict = {"__name__": "__migrating__"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def _gradients(layers: nn.Module, x: Tensor) -> dict[str, Tensor]:
    layers(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in layers.named_parameters()}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_key_heads_are_shared_as_in_x_transformers(adapter, kv_heads):
    """It gives query head h the key head h % kv_heads, where SDPA takes h // group."""
    old = adapter["Decoder"](rel_pos_bias=True, attn_kv_heads=kv_heads, **OPTIONS)
    nn.init.normal_(old.rel_pos.relative_attention_bias.weight)
    new = adapter["Decoder"](attn_flash=True, disable_abs_pos_emb=True, attn_kv_heads=kv_heads, **OPTIONS)
    adapter["use_table"](new, T5Bias(4, bidirectional=False), scale=4.0)
    new.load_state_dict(old.state_dict())
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_gradients(new, x), _gradients(old, x), rtol=1e-3, atol=1e-5)


def test_decoding_with_a_cache_gives_the_same_text(adapter):
    """Token by token, each on the keys before it."""
    wrapper = pytest.importorskip("x_transformers").TransformerWrapper

    def build(**options):
        layers = adapter["Decoder"](**OPTIONS, **options)
        return wrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()

    old, new = build(alibi_pos_bias=True), build(attn_flash=True)
    adapter["use_table"](new.attn_layers, ALiBiBias(4))
    new.load_state_dict(old.state_dict())
    tokens = torch.randint(50, (2, 20))
    whole = old(tokens)
    logits, cache = new(tokens[:, :12], return_intermediates=True)
    torch.testing.assert_close(logits, whole[:, :12], rtol=1e-4, atol=1e-5)
    for length in range(13, 21):
        logits, cache = new(tokens[:, :length], cache=cache, return_intermediates=True)
        torch.testing.assert_close(logits[:, -1], whole[:, length - 1], rtol=1e-4, atol=1e-5)


def test_what_the_adapter_does_not_serve_is_an_error(adapter):
    """Not a wrong bias."""
    with pytest.raises(ValueError, match="no memory keys and values"):
        adapter["use_table"](adapter["Encoder"](attn_flash=True, attn_num_mem_kv=2, **OPTIONS), T5Bias(4))
    with pytest.raises(ValueError, match="attn_flash=True"):
        adapter["use_table"](adapter["Encoder"](**OPTIONS), T5Bias(4))
    layers = adapter["Encoder"](attn_flash=True, **OPTIONS)
    adapter["use_table"](layers, T5Bias(4))
    with pytest.raises(ValueError, match=r"`mask` must mask keys alone, .* got shape \(1, 1, 9, 9\)"):
        layers(torch.randn(1, 9, 32), attn_mask=torch.ones(9, 9, dtype=torch.bool))
