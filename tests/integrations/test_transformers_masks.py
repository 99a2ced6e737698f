"""Padding masks are served. Other masks are refused."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, chunked_overlay
from transformers_cases import transformers
from transformers_models import LONG

from triton_offset_bias.integrations.transformers.masks import key_mask, numbered_key_mask

MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])


def test_a_causal_mask_ends_with_the_last_querys_own_key():
    """The cache has room for 9 keys, and 3 are written.

    The mask ends with the fourth. The key that the caller hides is hidden.
    """
    made = key_mask(2, 1, 9, 3, mask_function=causal_mask_function, attention_mask=MASK)
    assert torch.equal(made, MASK.bool())
    assert torch.equal(
        key_mask(2, 2, 9, torch.tensor(3), attention_mask=MASK), torch.nn.functional.pad(MASK, (0, 1)).bool()
    )
    assert torch.equal(key_mask(2, 1, 9, 3, device=MASK.device), torch.ones(2, 4, dtype=torch.bool))


def test_a_mask_that_is_not_causal_is_as_long_as_the_keys():
    """There is no mask where nothing is padded."""
    made = key_mask(2, 1, 4, mask_function=bidirectional_mask_function, attention_mask=MASK)
    assert torch.equal(made, MASK.bool())
    assert key_mask(2, 1, 4, mask_function=bidirectional_mask_function) is None


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (MASK, MASK.bool()),
        (torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), torch.tensor([[False] * 4, [True] * 4])),
        (torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]]), torch.tensor([[1, 0, 0, 2], [0, 1, 0, 2]])),
    ],
)
def test_attended_keys_are_numbered_where_padding_lies_between_them(mask, expected):
    """In other masks numbers differ from places by a shift, so the mask of bools is enough."""
    assert torch.equal(numbered_key_mask(2, 4, 4, attention_mask=mask), expected)


def test_masks_of_other_kinds_are_refused():
    """The kinds are chunks, models switched to bidirectional attention, and caches that have dropped keys."""
    bidirectional = transformers.BloomConfig(is_causal=False)
    for own in (
        {"mask_function": chunked_overlay(2, torch.zeros(2))},
        {"mask_function": bidirectional_mask_function, "config": bidirectional},
        {"kv_offset": 1},
    ):
        with pytest.raises(NotImplementedError, match="causal or bidirectional attention with padding masks"):
            key_mask(2, 4, 4, **own)


def test_a_sequence_that_is_all_padding_gives_finite_numbers():
    """Attention gives 0 there. Other sequences do not change."""
    model = models.t5()
    inputs = models.t5_inputs()
    expected = model(**inputs).logits
    inputs["attention_mask"][1] = 0
    fast = cases.enabled_copy(model)
    output = fast(**inputs)
    output.loss.backward()
    torch.testing.assert_close(output.logits[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in fast.parameters())


def test_a_mask_of_one_row_for_all_queries_is_padding():
    """The mask is bool, or numbers that are added to scores."""
    fast = cases.enabled_copy(models.t5())
    inputs = models.t5_inputs()
    expected = fast(**inputs).logits
    keep = inputs["attention_mask"].bool()[:, None, None]
    for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)):
        assert torch.equal(fast(**{**inputs, "attention_mask": mask}).logits, expected)


PER_QUERY = {"attention_mask": torch.ones(3, 1, 30, 30)}
REFUSED_CALLS = {
    "a mask per query": (models.t5, PER_QUERY, ValueError, r"`attention_mask` .*\(batch, keys\).*\(3, 1, 30, 30\)"),
    "a mask per query, causal": (
        models.t5,
        {"decoder_attention_mask": torch.ones(3, 1, 20, 20)},
        ValueError,
        r"`attention_mask` .*\(batch, keys\).*\(3, 1, 20, 20\)",
    ),
    "a mask that is a bias": (
        models.t5,
        {"attention_mask": torch.full((3, 1, 1, 30), -0.5)},
        ValueError,
        "`attention_mask` must hold 0 or the lowest",
    ),
    "three axes": (
        models.t5,
        {"attention_mask": torch.ones(3, 30, 30)},
        ValueError,
        r"`attention_mask` .*\(3, 30, 30\)",
    ),
    "attention weights": (
        models.t5,
        {"output_attentions": True},
        NotImplementedError,
        "`output_attentions` must be False",
    ),
}


@pytest.mark.parametrize(("build", "own", "error", "message"), REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_what_is_no_padding_mask_is_refused_never_ignored(build, own, error, message):
    """The message tells which mask came."""
    with pytest.raises(error, match=message):
        cases.enabled_copy(build())(**{**models.t5_inputs(), **own})


WEIGHTS = {
    "bloom": (models.bloom, {"input_ids": LONG}),
    "falcon": (lambda: models.falcon(alibi=True), {"input_ids": LONG}),
    "mpt": (models.mpt, {"input_ids": LONG}),
    "mpnet": (models.mpnet, {"input_ids": LONG}),
    "longt5": (models.longt5, {"input_ids": LONG, "labels": LONG}),
    "beit": (models.beit, {"pixel_values": torch.zeros(1, 3, 64, 64)}),
}


@pytest.mark.parametrize(("build", "inputs"), WEIGHTS.values(), ids=WEIGHTS)
def test_attention_weights_are_refused_by_every_family(build, inputs):
    """No family stores them."""
    with pytest.raises(NotImplementedError, match="`output_attentions` must be False"):
        cases.enabled_copy(build())(**inputs, output_attentions=True)


def test_a_padding_mask_with_beits_bias_is_refused():
    """BEiT adds the bias to the mask."""
    fast = cases.enabled_copy(models.beit())
    with pytest.raises(NotImplementedError, match="`attention_mask` must be None where a bias has a table"):
        fast.beit(torch.zeros(1, 3, 64, 64), attention_mask=torch.ones(1, 257))


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_a_padded_query_sees_what_the_last_attended_token_before_it_would(name):
    """The models' own attention does the same, with or without gaps in the mask."""
    falcon = transformers.FalconConfig(**models.FALCON, alibi=True)
    model = models.bloom() if name == "bloom" else cases.randomized(transformers.FalconForCausalLM, falcon, "sdpa")
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, 5], mask[0, 17:] = 0, 0
    expected = model(LONG[:, :20], attention_mask=mask).logits
    got = cases.enabled_copy(model)(LONG[:, :20], attention_mask=mask).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_that_leaves_out_the_cached_keys_is_an_error():
    """It is not taken for a mask of the newest keys."""
    with pytest.raises(ValueError, match=r"`attention_mask` must cover all 6 keys.*got shape \(2, 4\)"):
        numbered_key_mask(2, 4, 6, q_offset=2, attention_mask=MASK)


def test_a_mask_of_integers_with_four_axes_is_an_error():
    """In such a mask attended keys may be 1 or 0."""
    model = models.t5()
    fast, inputs = cases.enabled_copy(model), models.t5_inputs()
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(inputs["input_ids"].shape[0], 1, 1, length, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"four axes must be bool or additive, got torch\.int64"):
        fast(**inputs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # BLOOM's own activation
def test_bloom_compiles_to_one_graph_with_a_mask():
    """Compiled code cannot look whether the mask has gaps."""
    model = models.bloom()
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, :3] = 0
    fast = cases.enabled_copy(model).eval()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got = compiled(LONG[:, :20], attention_mask=mask, use_cache=False).logits
    expected = fast(LONG[:, :20], attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-4)
