"""Inkling's text model on this package equals its eager attention: windows, profiles of low rank, a growing cache."""

import pytest
import torch
import transformers
import transformers_cases as cases
import transformers_models as models
from transformers_cases import Case

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.integrations.transformers import enable_offset_bias
from triton_offset_bias.modules import LowRankOffsetBias

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


@pytest.mark.parametrize("layer", [0, 1], ids=["window", "whole"])
def test_tables_of_a_low_rank_are_inklings_bias(layer):
    """`LowRankOffsetBias` with Inkling's parameters, for Inkling's queries, keys and values.

    The output is that of Inkling's attention, and so are the gradients of the input and of the bias's parameters.
    """
    from transformers.models.inkling.modeling_inkling import InklingAttention

    own = InklingAttention(transformers.InklingTextConfig(**models.INKLING | {"log_scaling_n_floor": None}), layer)
    own.config._attn_implementation = "eager"
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    extent = own.rel_logits_proj.rel_extent
    bias = LowRankOffsetBias(32, 4, rank=3, extent=extent)
    bias.load_state_dict({"proj.weight": own.r_proj.weight, "weight": own.rel_logits_proj.proj})
    x = torch.randn(2, 19, 32, requires_grad=True)
    offsets = torch.arange(19)[:, None] - torch.arange(19)
    is_hidden = (offsets < 0) | (offsets >= (extent if own.is_sliding else 19))
    expected, _ = own(x, torch.zeros(19, 19).masked_fill(is_hidden, float("-inf")).expand(2, 1, 19, 19))

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, 8)).transpose(1, 2)

    query, gate = bias.factors(x, own.q_norm(heads(own.q_proj(x))))
    key, value = own.k_norm(heads(own.k_sconv(own.k_proj(x)))), heads(own.v_sconv(own.v_proj(x)))
    options = {"scale": 1 / 8, "is_causal": True, "window_size": (extent - 1 if own.is_sliding else -1, -1)}
    out = offset_bias_attention(
        query, key, value, bias(-18, 18), bias_origin=18, bias_gate=gate, enable_gqa=True, **options
    )
    out = own.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, bias.proj.weight, bias.weight], dout)
    wanted = torch.autograd.grad(expected, [x, own.r_proj.weight, own.rel_logits_proj.proj], dout)
    for gradient, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4)


def test_packed_sequences_are_refused_by_name():
    """Their masks are more than causal attention within a window."""
    model = models.inkling()
    enable_offset_bias(model)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    with pytest.raises(NotImplementedError, match="packed sequences and custom mask functions are not served"):
        model(input_ids=cases.tokens(1, 13, 0), position_ids=positions)
