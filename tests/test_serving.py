"""Generation with a cache of fixed size, as docs/serving.md describes it."""

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from triton_offset_bias import offset_bias_attention

CAPACITY, HEADS, KV_HEADS, DIM = 530, 2, 1, 16
LONGER = 7  # tokens that the second sequence is longer


class StaticCache:
    """Keys and values of two sequences, in memory that is NaN until it is written."""

    def __init__(self) -> None:
        self.keys, self.values = (torch.full((2, KV_HEADS, CAPACITY, DIM), float("nan")) for _ in range(2))
        self.lengths = torch.zeros(2, dtype=torch.int32)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Writes (2, Hkv, tokens, D) keys and values after the last token of each sequence."""
        tokens = keys.shape[2]
        places = self.lengths[:, None] + torch.arange(tokens, dtype=torch.int32)
        rows = torch.arange(2)[:, None]
        self.keys[rows, :, places], self.values[rows, :, places] = keys.transpose(1, 2), values.transpose(1, 2)
        self.lengths += tokens

    def attend(self, query: Tensor, table: Tensor, backend: str) -> Tensor:
        """Attends from the last tokens' queries to all tokens up to their own."""
        options = {"bias_origin": 0, "is_causal": True, "enable_gqa": True, "key_lengths": self.lengths}
        return offset_bias_attention(query, self.keys, self.values, table, **options, backend=backend)


def _tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, HEADS, count, DIM), *torch.randn(2, 2, KV_HEADS, count, DIM)


@torch.no_grad()
def test_a_loop_over_a_static_cache_equals_one_pass_over_each_sequence(backend):
    """One cache gets prompts of 20 and 27 tokens, then a chunk of 5 tokens, then single tokens."""
    query, key, value = _tokens(40)
    table, cache = torch.randn(HEADS, 25), StaticCache()
    old_key, old_value = torch.randn(2, 1, KV_HEADS, LONGER, DIM)
    cache.keys[1, :, :LONGER], cache.values[1, :, :LONGER] = old_key[0], old_value[0]
    cache.lengths[1] = LONGER
    outs = []
    for chunk in torch.arange(40).split([36, 2, 1, 1]):
        cache.append(key[:, :, chunk], value[:, :, chunk])
        outs.append(cache.attend(query[:, :, chunk], table, backend))
    options = {"bias_origin": 0, "is_causal": True, "enable_gqa": True, "backend": backend}
    expected = [
        offset_bias_attention(query[:1], key[:1], value[:1], table, **options),
        offset_bias_attention(
            query[1:], torch.cat([old_key, key[1:]], 2), torch.cat([old_value, value[1:]], 2), table, **options
        ),
    ]
    torch.testing.assert_close(torch.cat(outs, 2), torch.cat(expected), rtol=2e-5, atol=2e-6)


@torch.no_grad()
def test_prompts_of_different_lengths_fill_the_cache_chunk_by_chunk(backend):
    """Prompts of 11 and 4 tokens, in chunks of 4 with padding in front, equal one pass over each prompt."""
    (query, key, value), table, chunk = _tokens(11), torch.randn(HEADS, 25), 4
    cache, done, outs = StaticCache(), [0, 0], ([], [])
    while done != [11, 4]:
        counts = [min(chunk, 11 - done[0]), min(chunk, 4 - done[1])]
        queries = torch.full((2, HEADS, chunk, DIM), 1e4)  # padding, whatever it is
        for row, (start, count) in enumerate(zip(done, counts, strict=True)):
            queries[row, :, chunk - count :] = query[row, :, start : start + count]
            for cached, new in ((cache.keys, key), (cache.values, value)):
                cached[row, :, start : start + count] = new[row, :, start : start + count]
            done[row] = start + count
        cache.lengths.copy_(torch.tensor(done))
        out = cache.attend(queries, table, backend)
        for row, count in enumerate(counts):
            outs[row].append(out[row, :, chunk - count :])
    options = {"bias_origin": 0, "is_causal": True, "enable_gqa": True, "backend": backend}
    for row, length in enumerate((11, 4)):
        whole = [x[row : row + 1, :, :length] for x in (query, key, value)]
        expected = offset_bias_attention(*whole, table, **options)[0]
        torch.testing.assert_close(torch.cat(outs[row], 1), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.skipif(torch.device(DEVICE).type != "cuda", reason="captures a CUDA graph: TEST_DEVICE=cuda")
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_one_captured_step_serves_every_length(tokens):
    """Replays of a graph that was captured at one length equal calls at others, bit for bit."""
    query, key, value = _tokens(tokens)
    table, cache = torch.randn(HEADS, 25), StaticCache()
    cache.keys.normal_(), cache.values.normal_()
    cache.lengths.fill_(40)

    def step() -> Tensor:
        cache.append(key, value)
        return cache.attend(query, table, "triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([0, 0], [3, 500], [CAPACITY - tokens, 17], [100, 101]):
        for x in (query, key, value):
            x.normal_()
        cache.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        replayed = out.clone()
        cache.lengths.copy_(torch.tensor(lengths))
        assert torch.equal(step(), replayed)
