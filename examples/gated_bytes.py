"""Trains a byte-level language model whose biases have a factor from the query, and shows what the gate learns.

    python examples/gated_bytes.py            # a few minutes on two CPU cores; nothing is downloaded
    python examples/gated_bytes.py --quick    # about half a minute

The text is the source of Python's standard library. Every head of every layer has a table, one number per offset. In
the first model each query multiplies its bias with a gate, one number per head, computed from the query's state (a
simple form of WavLM's gate, arXiv:2110.13900). The second model is the same without gates. Both start equal, since a
gate starts at 1.

A gate lets a byte choose how much the distance counts: a byte within a word may keep close to its neighbours, and a
line's first byte may look at the lines before, whatever their distance. The picture has the mean gate of each head for
kinds of bytes, beside the tables that the gates multiply. The same seed gives the same result on one machine's CPU.
"""

import argparse
import os
import string
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

# On a machine that does other work too, OpenMP's threads waiting in a loop for one another make a step 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import torch
from _byte_model import draw_windows, read_text
from _command_line import Number, example_parser, parse
from _gated_model import GatedTransformer
from _gated_plot import plot_run
from _training import Descent
from torch import Tensor
from tqdm import tqdm

GATED, PLAIN = "gated bias", "the same bias for all queries"
NUM_HEADS, NUM_LAYERS = 4, 3
LEARNING_RATE, BIAS_LEARNING_RATE, WEIGHT_DECAY = 4e-3, 4e-2, 0.1
HELD_OUT_WINDOWS = 48
NUMBERS = {
    "steps": Number("training steps of each model", default=500, quick=30),
    "length": Number("bytes per sequence, and entries of a table", default=256, quick=128, minimum=2),
    "batch": Number("sequences per step", default=4),
    "width": Number(f"size of the hidden state, a multiple of {NUM_HEADS}", default=96, minimum=NUM_HEADS),
    "seed": Number("seed of the initial values and of the order of the text", default=0, minimum=0),
}


def kinds_of_bytes() -> dict[str, set[int]]:
    """Bytes by what they are in Python's source. A space is indentation or a gap by the byte before it."""
    return {
        "line end": {10},
        "letter": set(string.ascii_letters.encode()),
        "digit": set(string.digits.encode()),
        "underscore": {ord("_")},
        "dot": {ord(".")},
        "opening bracket": set(b"([{"),
        "closing bracket": set(b")]}"),
        "quote": set(b"'\""),
    }


def kind_masks(tokens: Tensor) -> dict[str, Tensor]:
    """Which bytes of `tokens` (B, L) are of which kind, each (B, L) bool."""
    masks = {
        name: torch.isin(tokens, torch.tensor(sorted(codes), device=tokens.device))
        for name, codes in kinds_of_bytes().items()
    }
    is_space = tokens == ord(" ")
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    is_indentation = is_space & ((before == ord(" ")) | (before == ord("\n")))
    return {"indentation": is_indentation, "space in a line": is_space & ~is_indentation, **masks}


def build_model(args: argparse.Namespace, is_gated: bool) -> GatedTransformer:
    """The model of `args`. All parameters but the gates' start with the same values, with or without them."""
    torch.manual_seed(args.seed)
    model = GatedTransformer(args.width, NUM_HEADS, NUM_LAYERS, args.length, is_gated=is_gated)
    torch.manual_seed(args.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() > 1 and ".bias." not in name and ".gate." not in name:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.to(args.device)


@torch.no_grad()
def evaluate(model: GatedTransformer, windows: Tensor) -> float:
    """Bits per byte on `windows`."""
    parts = windows.split(8)
    return sum(model.bits_per_byte(part).item() * len(part) for part in parts) / len(windows)


def train(name: str, model: GatedTransformer, text: Tensor, held_out: Tensor, args: argparse.Namespace) -> pd.Series:
    """Trains `model`; bits per byte on held-out text by the bytes that were seen."""
    biases = [p for block in model.blocks for p in block.bias.parameters()]
    descent = Descent(
        model, biases, rate=LEARNING_RATE, bias_rate=BIAS_LEARNING_RATE, steps=args.steps, weight_decay=WEIGHT_DECAY
    )
    generator = torch.Generator().manual_seed(args.seed)
    losses = {}
    with tqdm(total=args.steps, desc=f"{name:30}", unit="steps") as progress:
        for step in range(1, args.steps + 1):
            windows = draw_windows(text, args.batch, args.length, generator).to(args.device)
            descent.step(model.bits_per_byte(windows))
            progress.update()
            if step == args.steps or step % max(1, args.steps // 10) == 0:
                losses[step * args.batch * args.length] = evaluate(model, held_out)
                progress.set_postfix_str(f"{losses[step * args.batch * args.length]:.3f} bits/byte", refresh=False)
    return pd.Series(losses, name=name)


def mean_gates(model: GatedTransformer, tokens: Tensor) -> pd.DataFrame:
    """The mean gate by kind of byte, a column per (layer, head)."""
    gates = model.all_gates(tokens).permute(0, 2, 1, 3).flatten(0, 1)  # (layers * heads, B, L)
    heads = [f"layer {layer}, head {head}" for layer in range(NUM_LAYERS) for head in range(NUM_HEADS)]
    rows = {name: [float(gate[mask].mean()) for gate in gates] for name, mask in kind_masks(tokens).items()}
    return pd.DataFrame(rows, index=heads).T


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments, checked."""
    return parse(example_parser(__doc__, "gated_bytes.png", NUMBERS), NUMBERS, NUM_HEADS, argv)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Trains both models, prints the tables, writes the picture.

    Args:
        argv: the command line's arguments; default the program's own.

    Returns:
        The mean gates by kind of byte.
    """
    args = parse_args(argv)
    start = time.perf_counter()
    text, held_out = read_text(Path(sysconfig.get_path("stdlib")), min_bytes=4 * args.length + 1)
    windows = draw_windows(held_out, HELD_OUT_WINDOWS, args.length, torch.Generator().manual_seed(args.seed))
    windows = windows.to(args.device)
    models = {name: build_model(args, name == GATED) for name in (GATED, PLAIN)}
    curves = pd.DataFrame({name: train(name, model, text, windows, args) for name, model in models.items()})
    table = pd.DataFrame({
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "bits per byte": curves.iloc[-1],
    })  # fmt: skip
    gates = mean_gates(models[GATED], windows[:, :-1])
    print("\nAfter training, on files that were held out")
    print(table.to_string(float_format="{:.3f}".format))
    print("\nMean gate by the kind of byte that attends")
    print(gates.to_string(float_format="{:.2f}".format))
    tables = [block.bias(0, args.length - 1).detach().cpu() for block in models[GATED].blocks]
    plot_run(args.output, curves, gates, tables)
    print(f"\nthe picture: {args.output} (after {time.perf_counter() - start:.0f} s)")
    return gates


if __name__ == "__main__":
    main()
