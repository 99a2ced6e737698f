"""Trains a small windowed vision transformer on scikit-learn's digits, with and without a two-dimensional bias.

    python examples/swin_windows.py            # a few minutes on two CPU cores; nothing is downloaded
    python examples/swin_windows.py --quick    # about half a minute

Every pixel of an 8 x 8 digit is a token. Attention stays within windows of 4 x 4 pixels. Every other layer's windows
are shifted by half a window, as in Swin (arXiv:2103.14030). Every pixel has one integer position, so that a
two-dimensional offset is one number. The positions serve the bias (`OffsetBias2d`), and keep apart pixels that only the
cyclic shift brought into one window.

Both models start equal and see the same images in the same order. Without the bias, attention knows which pixels share
a window, but not their places in it. The same seeds give the same results on one machine's CPU, and equal results up to
rounding on CUDA.
"""

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

# On a machine that does other work too, OpenMP's threads waiting in a loop for one another make a step 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import torch
import torch.nn.functional as F
from _command_line import Number, example_parser, parse
from _training import Descent
from _window_model import WindowTransformer
from _window_plot import plot_run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

WITH_BIAS, WITHOUT = "2-D offset bias", "no bias"
SIDE, WINDOW, NUM_HEADS, NUM_LAYERS = 8, 4, 4, 4
LEARNING_RATE, BIAS_LEARNING_RATE, WEIGHT_DECAY = 5e-3, 3e-2, 0.05
TEST_SHARE = 0.3
NUMBERS = {
    "epochs": Number("times that all training images are seen", default=12, quick=5),
    "seeds": Number("runs of each model, with seeds from 0 on", default=3, quick=1),
    "batch": Number("images per step", default=32),
    "width": Number(f"size of the hidden state, a multiple of {NUM_HEADS}", default=32, minimum=NUM_HEADS),
}


class Digits(NamedTuple):
    """Images (N, 8, 8) of int64 grey levels and their labels (N,) int64, to train on and to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(device: str) -> Digits:
    """The 1797 digits, split once for all seeds, with the same share of every class in both parts."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, SIDE, SIDE)
    parts = train_test_split(images, labels, test_size=TEST_SHARE, random_state=0, stratify=labels)
    images, test_images, labels, test_labels = (torch.as_tensor(part, device=device).long() for part in parts)
    return Digits(images, labels, test_images, test_labels)


def build_model(args: argparse.Namespace, seed: int, with_bias: bool) -> WindowTransformer:
    """The model of `args`. All parameters but the bias's start with the same values, with or without a bias."""
    torch.manual_seed(seed)
    model = WindowTransformer(args.width, NUM_HEADS, NUM_LAYERS, SIDE, WINDOW, with_bias=with_bias)
    return model.to(args.device)


@torch.no_grad()
def accuracy(model: WindowTransformer, images: Tensor, labels: Tensor) -> float:
    """The share of `images` whose label is the likeliest, in percent."""
    return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def train(name: str, model: WindowTransformer, digits: Digits, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    """Trains `model`; by epoch, from 1: "loss", the epoch's mean in nats, and "accuracy" on the digits to test on."""
    batches = max(1, len(digits.labels) // args.batch)
    descent = Descent(
        model,
        [p for bias in model.biases() for p in bias.parameters()],
        rate=LEARNING_RATE,
        bias_rate=BIAS_LEARNING_RATE,
        steps=args.epochs * batches,
        weight_decay=WEIGHT_DECAY,
    )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with tqdm(total=args.epochs * batches, desc=f"{name:15} seed {seed}", unit="steps") as progress:
        for _ in range(args.epochs):
            order = torch.randperm(len(digits.labels), generator=generator).to(args.device)
            loss = 0.0
            for chosen in order.split(args.batch)[:batches]:
                logits = model(digits.images[chosen])
                loss += descent.step(F.cross_entropy(logits, digits.labels[chosen])) / batches
                progress.update()
            rows.append({"loss": loss, "accuracy": accuracy(model, digits.test_images, digits.test_labels)})
            progress.set_postfix_str(f"test accuracy {rows[-1]['accuracy']:.1f} %", refresh=False)
    return pd.DataFrame(rows, index=pd.RangeIndex(1, args.epochs + 1, name="epoch"))


def summary(curves: pd.DataFrame, models: dict[str, WindowTransformer]) -> pd.DataFrame:
    """The table: parameters, and the last accuracy of every seed and its mean; a row per model.

    `curves`: accuracy by epoch, a column per (model, seed).
    """
    rows = []
    for name, model in models.items():
        last = curves[name].iloc[-1]
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "of the biases": sum(p.numel() for bias in model.biases() for p in bias.parameters()),
        }
        rows.append(row | {f"seed {seed}": value for seed, value in last.items()} | {"mean": last.mean()})
    return pd.DataFrame(rows).set_index("model")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments, checked."""
    return parse(example_parser(__doc__, "swin_windows.png", NUMBERS), NUMBERS, NUM_HEADS, argv)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Trains both models with every seed, prints the table, writes the picture.

    Args:
        argv: the command line's arguments; default the program's own.

    Returns:
        The printed table.
    """
    args = parse_args(argv)
    start = time.perf_counter()
    digits = load_data(args.device)
    print(f"{len(digits.labels)} digits to train on, {len(digits.test_labels)} to test on")
    curves = {}
    models: dict[str, WindowTransformer] = {}
    for name, seed in itertools.product((WITH_BIAS, WITHOUT), range(args.seeds)):
        model = build_model(args, seed, name == WITH_BIAS)
        curves[name, seed] = train(name, model, digits, args, seed)["accuracy"]
        models.setdefault(name, model)
    table = summary(pd.DataFrame(curves), models)
    print("\nAccuracy after the last epoch, in percent of the digits held out for testing")
    print(table.to_string(float_format="{:.1f}".format))
    plot_run(args.output, pd.DataFrame(curves), digits.test_images[0].cpu(), WINDOW, models[WITH_BIAS].biases())
    print(f"\nthe picture: {args.output} (after {time.perf_counter() - start:.0f} s)")
    return table


if __name__ == "__main__":
    main()
