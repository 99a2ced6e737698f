"""A SentenceTransformer encodes and trains through this package."""

import copy
import re
from pathlib import Path

import pytest
import sentence_transformers
import torch
import transformers_models as models
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from texts import TEXTS, tokenizer
from tolerance import assert_accurate
from transformers_models import transformers

from triton_offset_bias.integrations.replacement import ReplacedAttention
from triton_offset_bias.integrations.transformers import disable_offset_bias, enable_offset_bias

README = Path(__file__).parents[2] / "README.md"
CONFIG = {**models.MPNET, "vocab_size": 200, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def encoder(tmp_path) -> sentence_transformers.SentenceTransformer:
    """all-mpnet-base-v2 in small, with random weights: MPNet, and the mean over the tokens that are no padding."""
    return _loaded(models.randomized(transformers.MPNetModel, transformers.MPNetConfig(**CONFIG)), tmp_path)


def _loaded(model: transformers.PreTrainedModel, folder: Path) -> sentence_transformers.SentenceTransformer:
    """A SentenceTransformer from a folder that the model is saved to."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return sentence_transformers.SentenceTransformer(str(folder), device=str(torch.get_default_device()))


def _encode(encoder: sentence_transformers.SentenceTransformer, batch_size: int = 32) -> torch.Tensor:
    return encoder.encode(list(TEXTS), batch_size=batch_size, convert_to_tensor=True)


def _enabled_copy(encoder: sentence_transformers.SentenceTransformer) -> sentence_transformers.SentenceTransformer:
    fast = copy.deepcopy(encoder)
    assert enable_offset_bias(fast) == {"0.model": "mpnet"}
    assert sum(isinstance(module, ReplacedAttention) for module in fast.modules()) == 2
    return fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [2, 32], ids=["several batches", "one batch"])
def test_embeddings_are_the_ones_of_the_models_own_attention(encoder, dtype, batch_size):
    """Texts are sorted by length, put into batches, and padded."""
    own = copy.deepcopy(encoder).to(dtype)
    fast = _enabled_copy(own)
    assert {x.dtype for x in fast.parameters()} == {dtype}
    exact = _encode(copy.deepcopy(encoder).to(dtype).double(), batch_size)
    results = (_encode(x, batch_size) for x in (fast, own))
    assert_accurate("embeddings", *(x.double() for x in (next(results), exact, next(results))), torch.finfo(dtype).eps)
    disable_offset_bias(fast)
    assert torch.equal(_encode(fast, batch_size), _encode(own, batch_size))


def test_embeddings_of_t5s_encoder_are_the_ones_of_its_own_attention(tmp_path):
    """As in Sentence-T5, the mean is over the tokens that are no padding."""
    config = transformers.T5Config(**{**models.T5, "vocab_size": 200})
    own = _loaded(models.randomized(transformers.T5EncoderModel, config), tmp_path)
    fast = copy.deepcopy(own)
    assert enable_offset_bias(fast) == {"0.model": "t5"}
    got, rounded = _encode(fast), _encode(own)
    assert_accurate("embeddings", got.double(), _encode(own.double()), rounded.double(), torch.finfo(got.dtype).eps)


def test_the_readmes_example_runs(encoder, monkeypatch):
    """It is run as it stands there, with the small model in the place of the one that it downloads."""
    (code,) = re.findall(
        r"^```python\n(from sentence_transformers .*?)^```", README.read_text(), re.MULTILINE | re.DOTALL
    )
    small = {"all-mpnet-base-v2": encoder}
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", small.__getitem__)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert any(isinstance(module, ReplacedAttention) for module in encoder.modules())
    assert names["embeddings"].shape == (2, CONFIG["hidden_size"])


def _train(encoder: sentence_transformers.SentenceTransformer, folder: str, **options: bool) -> list[float]:
    """Trains three steps on pairs of texts; the losses."""
    pairs = Dataset.from_dict({"anchor": list(TEXTS) * 4, "positive": list(TEXTS[::-1]) * 4})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=torch.get_default_device().type == "cpu",
        **options,
    )
    loss = MultipleNegativesRankingLoss(encoder)
    trainer = sentence_transformers.SentenceTransformerTrainer(encoder, arguments, pairs, loss=loss)
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_training_takes_the_same_steps(encoder, tmp_path, bf16):
    """The library's own Trainer, with autocast in bfloat16. The table learns."""
    own, fast = copy.deepcopy(encoder), _enabled_copy(encoder)
    losses = _train(own, str(tmp_path), bf16=bf16)
    tolerance = 2e-2 if bf16 else 1e-4
    assert _train(fast, str(tmp_path), bf16=bf16) == pytest.approx(losses, rel=tolerance)
    assert losses[2] < losses[0]
    learned = [x[0].model.encoder.relative_attention_bias.weight for x in (encoder, own, fast)]
    assert (learned[0] - learned[1]).abs().max() > 1e-2
    if not bf16:
        torch.testing.assert_close(learned[2], learned[1], rtol=1e-2, atol=1e-3)


def test_a_saved_encoder_loads_without_this_package(encoder, tmp_path):
    """The folder has the model's own configuration."""
    fast = _enabled_copy(encoder)
    fast.save(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device=str(encoder.device))
    assert not any(isinstance(module, ReplacedAttention) for module in loaded.modules())
    torch.testing.assert_close(_encode(loaded), _encode(fast), rtol=1e-4, atol=1e-4)
