"""Dropout of attention weights. No two implementations draw the same weights."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_models import LONG

from triton_offset_bias.integrations.replacement import Replacement

TEXT, PIXELS = {"input_ids": LONG[:, :50]}, {"pixel_values": torch.ones(1, 3, 64, 64)}
# For each family a model, the inputs of its call, and the name of its attention's dropout.
FAMILIES = {
    "t5": (models.t5, {**TEXT, "labels": LONG[:, :9]}, "dropout"),
    "longt5": (models.longt5, {**TEXT, "labels": LONG[:, :9]}, "dropout"),
    "mpnet": (models.mpnet, TEXT, "dropout"),
    "bloom": (models.bloom, TEXT, "attention_dropout"),
    "mpt": (models.mpt, TEXT, "attn_dropout_p"),
    "falcon": (lambda: models.falcon(alibi=True), TEXT, "attention_dropout"),
    "swin": (models.swin, PIXELS, "attention_dropout"),
    "swinv2": (models.swinv2, PIXELS, "dropout"),
    "beit": (models.beit, PIXELS, "attention_dropout"),
}


@pytest.mark.parametrize(("build", "inputs", "name"), FAMILIES.values(), ids=FAMILIES)
def test_every_familys_dropout_is_for_training_alone(build, inputs, name):
    """The dropout of attention's weights is tested, with all other dropout off."""
    model = cases.enabled_copy(build())
    expected = model(**inputs).logits
    assert torch.equal(model.train()(**inputs).logits, expected)
    for module in model.modules():
        if isinstance(module, Replacement) and hasattr(module, name):
            dropout = getattr(module, name)
            if isinstance(dropout, torch.nn.Dropout):
                dropout.p = 0.4
            else:
                setattr(module, name, 0.4)
    assert torch.equal(model.eval()(**inputs).logits, expected)
    first, second = (model.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(first, expected)
    assert not torch.equal(first, second)


def test_dropout_varies_in_training_alone_around_the_same_mean():
    """The first layer attends within 4000 equal sequences."""
    model = cases.enabled_copy(models.t5(dropout_rate=0.4))
    layer = model.encoder.block[0].layer[0].SelfAttention
    x = torch.randn(1, 6, 16).expand(4000, -1, -1)
    expected = layer(x)[0]
    varied = layer.train()(x)[0]
    spread = varied.std(0)
    assert torch.equal(layer.eval()(x)[0], expected)
    assert spread.min() > 0.01
    assert ((varied.mean(0) - expected[0]).abs() < 5 * spread / 4000**0.5).all()
