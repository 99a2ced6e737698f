"""No operator makes a tensor with an element for every pair of tokens."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_cases import transformers
from transformers_models import LONG


class _LargestTensor(TorchDispatchMode):
    """A mode that sees the number of elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Runs the operator and looks at its results."""
        results = function(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return results


def _largest(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int:
    with _LargestTensor() as seen:
        model(**inputs).loss.backward()
    return seen.elements


LONG_INPUTS = {"input_ids": LONG, "attention_mask": (torch.arange(256) < 200)[None].long(), "labels": LONG}
IMAGE = {"pixel_values": torch.zeros(1, 3, 64, 64), "labels": torch.tensor([1])}
LONG_CASES = {
    "t5": (models.t5, LONG_INPUTS, 256),
    "bloom": (models.bloom, LONG_INPUTS, 256),
    "falcon": (lambda: models.falcon(alibi=True), LONG_INPUTS, 256),
    "mpt": (models.mpt, LONG_INPUTS, 256),
    "mpnet": (models.mpnet, LONG_INPUTS, 256),
    "beit": (models.beit, IMAGE, 257),
}


@pytest.mark.parametrize(("build", "inputs", "length"), LONG_CASES.values(), ids=LONG_CASES)
def test_no_tensor_is_as_large_as_queries_times_keys(build, inputs, length):
    """There is no bias, mask or score of every pair, forward or backward.

    The model's own attention shows that one would be seen.
    """
    model = build()
    assert _largest(model, inputs) >= length**2
    assert _largest(cases.enabled_copy(model), inputs) < length**2


def test_the_backend_is_the_one_asked_for():
    """The reference computes every pair's score in plain PyTorch. The default backend on a CPU does not."""
    model = models.t5()
    assert _largest(cases.enabled_copy(model, "reference"), LONG_INPUTS) >= 256**2
    assert _largest(cases.enabled_copy(model, "auto"), LONG_INPUTS) < 256**2
