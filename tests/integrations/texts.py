"""A few texts, and a tokenizer that was trained on them."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

# Of very different lengths, so that a batch is padded and sorting changes the order.
TEXTS = (
    "the cat sat on the mat",
    "a dog",
    "a number for every offset, said the dog to the cat, is added to the score of a query and a key, said the dog to "
    "the cat, and the cat sat on the mat, and the mat lay on the dog",
    "the mat lay on the dog, said the cat",
    "dog, dog, dog",
)
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "[UNK]", "mask_token": "<mask>"}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of MPNet's kind, with at most 200 tokens."""
    pieces = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(SPECIAL.values()), show_progress=False)
    pieces.train_from_iterator(TEXTS, trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    own = {**SPECIAL, "cls_token": "<s>", "sep_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, **own)
