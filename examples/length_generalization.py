"""Trains at length 128 with several position biases and predicts from up to eight times as much text.

    python examples/length_generalization.py            # some minutes on two CPU cores; nothing is downloaded
    python examples/length_generalization.py --quick    # about half a minute, too short to learn much

A parameter per offset (`OffsetBias`) knows nothing of offsets that training has not shown. They see the table's end
("clamp") or no bias ("zero"). A function of the distance extends to such offsets. The same small byte-level language
model is trained with each bias on the source of Python's standard library. All models start equal and see the same
bytes in the same order. With the default arguments the table is among the best biases at the length of training, and
worse than no bias at 8 times that length. T5's last bucket also stands for all longer distances. T5 gets worse as well,
but later and less. ALiBi, KERPLE and FIRE do not get worse.

At evaluation length L the model sees L bytes of every held-out window and predicts the window's last 128 bytes. The
predicted bytes are the same at every L, and only the text before them grows. At L = 128 the first predicted byte has
one byte before it and the last has 128, as in training. At L = 1024 they have 897 and 1024. Perplexity is
2 ** (mean bits per byte).

FIRE's threshold is the longest evaluated length, so that its bias is a table. The paper's rule for queries beyond the
threshold is not used here. There is one seed and little text, so small differences between biases mean nothing. The
same seed gives the same results on one machine's CPU, and equal results up to rounding on CUDA.
"""

import argparse
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# On a machine that does other work too, OpenMP's threads waiting in a loop for one another make a step 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import torch
import torch.nn.functional as F
from _byte_model import ByteTransformer, draw_windows, read_text
from _command_line import Number, example_parser, parse
from _length_plot import plot_run
from _training import Descent
from torch import Tensor, nn
from tqdm import tqdm

from triton_offset_bias.modules import ALiBiBias, FireBias, KerpleBias, OffsetBias, T5Bias

NUM_HEADS, NUM_LAYERS = 8, 4
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 0.01
TIMES_LONGER = (1, 2, 4, 8)
NUMBERS = {
    "length": Number("bytes per sequence in training", default=128, minimum=2),
    "batch": Number("sequences per step", default=8),
    "width": Number(f"size of the hidden state, a multiple of {NUM_HEADS}", default=64, minimum=NUM_HEADS),
    "steps": Number("training steps with each bias", default=600, quick=40),
    "windows": Number("held-out windows to evaluate on", default=64, quick=8),
    "seed": Number("of the initial values and the order of the text", default=0, minimum=0),
}


class ZeroBeyond(OffsetBias):
    """An `OffsetBias` that gives offsets past its table no bias: ``beyond="zero"`` of `offset_bias_attention`."""

    def forward(self, min_offset: int, max_offset: int) -> Tensor:
        """The bias of offsets from 0 on, as in `OffsetBias`."""
        inside = super().forward(min_offset, min(max_offset, self.max_length - 1))
        return F.pad(inside, (0, max(0, max_offset - self.max_length + 1)))


class Variant(NamedTuple):
    """A bias and its training.

    Attributes:
        build: makes the bias from the length of training and the longest length of evaluation.
        rate: highest learning rate of its parameters.
        weights_of: the variant whose trained model it uses; None: it is trained itself.
    """

    build: Callable[[int, int], nn.Module | None]
    rate: float
    weights_of: str | None = None


VARIANTS = {
    "OffsetBias, clamp": Variant(lambda length, longest: OffsetBias(NUM_HEADS, length, bidirectional=False), 4e-2),
    "OffsetBias, zero": Variant(
        lambda length, longest: ZeroBeyond(NUM_HEADS, length, bidirectional=False), 4e-2, "OffsetBias, clamp"
    ),
    "T5": Variant(lambda length, longest: T5Bias(NUM_HEADS, bidirectional=False), 4e-2),
    "ALiBi": Variant(lambda length, longest: ALiBiBias(NUM_HEADS), 0.0),
    "KERPLE": Variant(lambda length, longest: KerpleBias(NUM_HEADS, "log"), 4e-2),
    "FIRE": Variant(lambda length, longest: FireBias(NUM_HEADS, threshold=longest), 1e-2),
    "none": Variant(lambda length, longest: None, 0.0),
}


def build_model(args: argparse.Namespace, variant: Variant) -> ByteTransformer:
    """The model of `args`. All parameters but the bias's start with the same values in every model."""
    torch.manual_seed(args.seed)
    bias = variant.build(args.length, TIMES_LONGER[-1] * args.length)
    torch.manual_seed(args.seed)
    return ByteTransformer(args.width, NUM_HEADS, NUM_LAYERS, bias).to(args.device)


def train(name: str, model: ByteTransformer, text: Tensor, rate: float, args: argparse.Namespace) -> None:
    """Trains `model` on windows of `text`, its bias with `rate`."""
    biases = [] if model.bias is None else list(model.bias.parameters())
    descent = Descent(model, biases, rate=LEARNING_RATE, bias_rate=rate, steps=args.steps, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    for _ in (progress := tqdm(range(args.steps), desc=f"{name:17}", unit="steps")):
        windows = draw_windows(text, args.batch, args.length, generator).to(args.device)
        losses.append(descent.step(model.bits_per_byte(windows)))
        progress.set_postfix_str(f"{statistics.fmean(losses[-50:]):.3f} bits/byte", refresh=False)


@torch.no_grad()
def evaluate(model: ByteTransformer, windows: Tensor, length: int, predicted: int) -> float:
    """Bits per byte over the last `predicted` bytes of each of the `windows`, from their last `length` bytes."""
    ends = windows[:, -length - 1 :]
    return statistics.fmean(model.bits_per_byte(end, last=predicted).item() for end in ends.split(1))


def compare(
    text: Tensor, held_out: Tensor, args: argparse.Namespace
) -> tuple[pd.DataFrame, dict[str, ByteTransformer]]:
    """Trains and evaluates every variant. Gives bits per byte (a row per variant, a column per length), and models."""
    lengths = [times * args.length for times in TIMES_LONGER]
    bits: dict[str, list[float]] = {}
    models: dict[str, ByteTransformer] = {}
    for name, variant in VARIANTS.items():
        model = build_model(args, variant)
        if variant.weights_of is None:
            train(name, model, text, variant.rate, args)
        else:
            model.load_state_dict(models[variant.weights_of].state_dict())
        progress = tqdm(lengths, desc=f"{name:17}", unit="lengths", leave=False)
        bits[name] = [evaluate(model, held_out, length, args.length) for length in progress]
        models[name] = model
    return pd.DataFrame.from_dict(bits, orient="index", columns=lengths), models


def summary(bits: pd.DataFrame, models: dict[str, ByteTransformer]) -> pd.DataFrame:
    """The table: parameters of the bias, then perplexity and bits per byte by length; a row per variant."""
    parameters = {
        name: 0 if model.bias is None else sum(p.numel() for p in model.bias.parameters())
        for name, model in models.items()
    }
    parts = {"bias": pd.DataFrame({"parameters": parameters}), "perplexity per byte": 2**bits, "bits per byte": bits}
    return pd.concat(parts, axis=1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments, checked."""
    parser = example_parser(__doc__, "length_generalization.png", NUMBERS)
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser.add_argument(
        "--text-dir",
        type=Path,
        default=stdlib,
        help="folder of .py files to learn from (default: the standard library)",
    )
    return parse(parser, NUMBERS, NUM_HEADS, argv)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Trains and evaluates every variant, prints the table, writes the picture.

    Args:
        argv: the command line's arguments; default the program's own.

    Returns:
        The printed table.
    """
    args = parse_args(argv)
    start = time.perf_counter()
    longest = TIMES_LONGER[-1] * args.length
    try:
        text, held_out = read_text(args.text_dir, min_bytes=longest + 1)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
    print(
        f"{len(text) / 1e6:.1f} MB of text from {args.text_dir}, {len(held_out) / 1e6:.1f} MB of other files held out"
    )
    windows = draw_windows(held_out, args.windows, longest, torch.Generator().manual_seed(args.seed))
    bits, models = compare(text, windows.to(args.device), args)
    table = summary(bits, models)
    print(f"\nThe last {args.length} bytes of {args.windows} held-out windows, predicted from so many bytes:")
    print(table.to_string(float_format="{:.2f}".format))
    with torch.no_grad():
        biases = {name: m.bias(0, longest - 1).cpu() for name, m in models.items() if m.bias is not None}
    plot_run(args.output, table["perplexity per byte"], table["bias", "parameters"], biases)
    print(f"\nthe picture: {args.output} (after {time.perf_counter() - start:.0f} s)")
    return table


if __name__ == "__main__":
    main()
