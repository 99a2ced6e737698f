"""The modules and the public implementations in transformers have equal biases and interchangeable state dicts."""

import pytest
import torch
from torch import nn
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.swin import modeling_swin as swin
from transformers.models.t5 import modeling_t5 as t5

from triton_offset_bias.modules import OffsetBias2d, T5Bias, alibi_slopes, dense_bias, t5_buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets", [4, 5, 7, 8, 17, 32, 64, 320])
@pytest.mark.parametrize("max_distance", [3, 20, 100, 128, 800, 4096])
def test_buckets_are_those_of_the_public_t5(bidirectional, num_buckets, max_distance):
    """Buckets are equal for every offset up to 5000 on either side, so roundings at their boundaries are equal too."""
    if max_distance <= num_buckets // (4 if bidirectional else 2):
        with pytest.raises(ValueError, match=f"`max_distance` must exceed .* got {max_distance}"):
            t5_buckets(0, 1, num_buckets, max_distance, bidirectional)
        return
    expected = t5.T5Attention._relative_position_bucket(
        -torch.arange(-5000, 5001), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(t5_buckets(-5000, 5000, num_buckets, max_distance, bidirectional), expected)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_trained_t5_embedding_is_loaded_and_saved_exactly(is_decoder):
    """It keeps T5's name for it, and means the same bias."""
    config = t5.T5Config(d_model=12, d_kv=4, num_heads=3, is_decoder=is_decoder)
    attention = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    nn.init.normal_(attention.relative_attention_bias.weight)
    holder = nn.Module()
    holder.relative_attention_bias = T5Bias(3, bidirectional=not is_decoder)
    state = {name: x for name, x in attention.state_dict().items() if name.startswith("relative_attention_bias")}
    holder.load_state_dict(state)
    assert torch.equal(dense_bias(holder.relative_attention_bias, 150, 150), attention.compute_bias(150, 150)[0])
    assert {name: x.tolist() for name, x in holder.state_dict().items()} == {n: x.tolist() for n, x in state.items()}


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 8, 12, 16, 20, 71, 112])
def test_slopes_are_those_of_the_public_alibi(num_heads):
    """The numbers of heads are powers of 2 and others."""
    expected = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", [(1, 1), (1, 5), (4, 1), (3, 5), (7, 7)])
def test_a_swin_table_is_loaded_used_and_saved_exactly(window):
    """The public Swin's module and ours exchange state dicts, and the dense bias is equal bit for bit."""
    theirs = swin.SwinRelativePositionBias(3, window)
    nn.init.normal_(theirs.relative_position_bias_table)
    ours = OffsetBias2d(3, window)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.dense(), theirs()[0])
    saved = swin.SwinRelativePositionBias(3, window)
    saved.load_state_dict(ours.state_dict())
    assert torch.equal(saved.relative_position_bias_table, theirs.relative_position_bias_table)
