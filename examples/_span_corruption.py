"""The data and the model of `t5_long.py`: bytes with spans left out, which the model must fill in, and a small T5."""

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

NOISE_DENSITY, MEAN_SPAN = 0.15, 20  # ByT5's: spans of bytes are longer than spans of word pieces
PAD, END, FIRST_BYTE, SENTINELS = 0, 1, 2, 126
FIRST_SENTINEL = FIRST_BYTE + 256
VOCABULARY = FIRST_SENTINEL + SENTINELS


def build_model(seed: int) -> T5ForConditionalGeneration:
    """A T5 of 2 + 2 layers and about a million parameters, on eager attention, with dropout off."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        attn_implementation="eager",
    )
    return T5ForConditionalGeneration(config)


def num_spans(length: int) -> int:
    """The number of spans that are left out of a window of `length` bytes."""
    return max(1, round(length * NOISE_DENSITY / MEAN_SPAN))


def corrupt(windows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Leaves random spans out of each window: gives the encoder's input and the decoder's target.

    Args:
        windows: (B, L) bytes.
        generator: the generator that chooses the spans.

    Returns:
        `input_ids`: (B, inputs), the bytes that stay, a sentinel for every span, and an end token.
        `labels`: (B, targets), every sentinel followed by the bytes it stands for, and an end token.

    Source:
        Raffel et al. 2020 (T5, arXiv:1910.10683), section 3.1.4; Xue et al. 2022 (ByT5, arXiv:2105.13626), section 3.1.
    """
    pairs = [_corrupt_one(window + FIRST_BYTE, generator) for window in windows]
    inputs, labels = (torch.stack(sequences) for sequences in zip(*pairs, strict=True))
    return {"input_ids": inputs, "labels": labels}


def _corrupt_one(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    spans = num_spans(len(tokens))
    num_noise = max(spans, round(len(tokens) * NOISE_DENSITY))
    kept, left_out = (_parts(total, spans, generator) for total in (len(tokens) - num_noise, num_noise))
    pieces = tokens.split([length for pair in zip(kept, left_out, strict=True) for length in pair])
    end = tokens.new_tensor([END])
    inputs, labels = [], []
    for index in range(spans):
        sentinel = tokens.new_tensor([FIRST_SENTINEL + index])
        inputs += [pieces[2 * index], sentinel]
        labels += [sentinel, pieces[2 * index + 1]]
    return torch.cat([*inputs, end]), torch.cat([*labels, end])


def _parts(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` random lengths of at least 1 that sum to `total`."""
    cuts = (torch.randperm(total - 1, generator=generator)[: count - 1] + 1).sort().values
    return torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_full((1,), total)).tolist()
