"""Inkling's text model on this package equals its eager attention: windows, profiles of low rank, a growing cache."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_cases import Case

from triton_offset_bias.integrations.transformers import enable_offset_bias

pytestmark = pytest.mark.skipif(bool(models.ABSENT), reason="this version of transformers has no Inkling")
BATCH, LENGTH = 3, 37


def _case(is_padded: bool) -> Case:
    mask = cases.padded(BATCH, LENGTH)
    if is_padded:  # in front, as generation needs it
        mask[2] = mask[2].flip(0)

    def inputs() -> dict[str, torch.Tensor]:
        ids = cases.tokens(BATCH, LENGTH, 0)
        if not is_padded:
            return {"input_ids": ids, "labels": ids}
        is_predicted = mask.bool() & torch.nn.functional.pad(mask[:, :-1], (1, 0)).bool()  # by a token, not by padding
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(is_predicted, -100)}

    return Case("inkling", models.inkling, inputs, mask.bool if is_padded else None, exact=torch.float32)


@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "whole"])
def test_loss_logits_and_every_gradient_equal_eager_attention(is_padded):
    """Longer than the windows and the profiles; the factor on long positions is on the gates too.

    Inkling's experts have no float64: the truth is its own attention in float32.
    """
    cases.assert_equals_eager(_case(is_padded), torch.float32)


@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "whole"])
def test_generated_tokens_are_those_of_eager_attention(is_padded):
    """The cache of a window keeps its last keys alone."""
    cases.assert_generates_as_eager(_case(is_padded))


def test_packed_sequences_are_refused_by_name():
    """Their masks are more than causal attention within a window."""
    model = models.inkling()
    enable_offset_bias(model)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    with pytest.raises(NotImplementedError, match="packed sequences and custom mask functions are not served"):
        model(input_ids=cases.tokens(1, 13, 0), position_ids=positions)
