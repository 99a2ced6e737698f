"""Few queries against many keys, where backends split the keys, and long sequences in chunks."""

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from oracle import Results

from triton_offset_bias import offset_bias_attention

BF16 = torch.bfloat16
LENGTHS = torch.tensor([[700], [1100]])  # how much of its cache each sequence has filled


def _cache_positions(len_q: int, len_k: int) -> dict:
    """Query positions at the end of each sequence's own part of the cache: what is after it, causality hides."""
    return {
        "query_positions": LENGTHS - len_q + torch.arange(len_q),
        "key_positions": torch.arange(len_k),
        "is_causal": True,
    }


CASES = [
    Case("one query", (1, 1500), through_lse=True),
    Case("one query, long beyond the table", (1, 1700), batch=1, heads=(4, 4), columns=65),
    Case("one query, no bias beyond the table", (1, 1500), columns=65, options={"beyond": "zero"}),
    Case("one query, no table", (1, 1500), bias=None),
    Case("grouped heads, causal", (4, 1500), batch=1, heads=(8, 2), columns=201, options={"is_causal": True}),
    Case("sixteen queries, causal, a table a sequence", (16, 1203), bias="BHN", options={"is_causal": True}),
    Case("many heads for one key head", (2, 1024), (64, 48), batch=1, heads=(16, 1), bias="1N", columns=301),
    Case("more keys than the queries have reached", (3, 1400), options={"query_start": 600, "is_causal": True}),
    Case("a window", (2, 1500), columns=99, options={"window_size": (300, 0)}),
    Case("a window that forbids everything", (2, 1500), options={"window_size": (5, 5), "query_start": 5000}),
    Case("left padding, holes", (3, 1300), heads=(4, 2), mask="holes"),
    Case("a sequence without keys", (2, 1300), mask="one sequence has no key", through_lse=True),
    Case("caches filled differently", (2, 1300), heads=(4, 2), columns=301, options=_cache_positions(2, 1300)),
    Case("caches filled differently, no table", (2, 1300), bias=None, options=_cache_positions(2, 1300)),
    Case("a table that forbids offsets", (1, 1100), columns=401, forbidden=(0, 1, 2, 200)),
    Case(
        "bfloat16, causal",
        (1, 2050),
        (64, 64),
        batch=1,
        heads=(8, 2),
        columns=257,
        dtype=BF16,
        options={"is_causal": True},
    ),
    Case("bfloat16, an odd number of keys, dims that fill no vector", (2, 1301), (80, 48), 1, (8, 2), dtype=BF16),
    Case("float16", (5, 1111), (80, 80), batch=1, heads=(2, 2), dtype=torch.float16),
    Case("transposed cache", (2, 1100), layout="transposed BLHD"),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_a_decoding_step_is_as_accurate_as_plain_pytorch(backend, case):
    """The results are the output, the log-sum-exp and the gradients."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, backend))


@pytest.mark.needs_engine
@pytest.mark.cpu_only
def test_many_heads_and_keys_make_the_engines_tasks_of_the_largest_size():
    """A task has as many keys as its threads leave it."""
    call = build(Case("tasks", (1, 2100), (8, 8), batch=4, heads=(16, 16), columns=65))
    assert_matches_oracle(call, results_of(call, "cpp"))


@pytest.mark.parametrize(("length", "chunk"), [(50, 1), (250, 7), (600, 96)])
def test_a_sequence_in_chunks_equals_one_pass(backend, length, chunk):
    """In a chunked prefill every chunk of queries sees the keys up to its own end."""
    call = build(Case("whole", (length, length), batch=1, heads=(4, 2), columns=65, options={"is_causal": True}))
    expected: Results = results_of(call, backend)
    outs, lses = [], []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        out, lse = offset_bias_attention(
            call.q[:, :, start:end], call.k[:, :, :end], call.v[:, :, :end], call.bias,
            is_causal=True, enable_gqa=True, query_start=start, return_lse=True, backend=backend,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    torch.testing.assert_close(torch.cat(outs, 2), expected.out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(torch.cat(lses, 2), expected.lse, rtol=2e-6, atol=2e-6)
