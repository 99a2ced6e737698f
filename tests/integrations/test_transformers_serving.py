"""Models generate as docs/serving.md says: from static caches, with prompts that are filled in chunk by chunk."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("name", "cache"),
    [("bloom", "dynamic"), ("bloom", "static"), ("falcon", "dynamic")],  # what the models' own attention can do
)
def test_a_prompt_in_chunks_gives_the_tokens_of_one_pass_with_eager_attention(name, cache, is_padded):
    """The prompt has 13 tokens, and a chunk 5."""
    own = models.EVERY_TYPE[name][0]()
    ids, mask = cases.tokens(2, 13, 0), torch.ones(2, 13, dtype=torch.int64)
    mask[1, :4] = 1 - int(is_padded)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = own.generate(ids, **options)
    fast = cases.enabled_copy(own)
    got = fast.generate(ids, **options, cache_implementation=cache, prefill_chunk_size=5, disable_compile=True)
    assert torch.equal(got, expected)
    assert len(expected[:, 13:].unique()) > 2, "too uniform to tell a difference"
