"""The command lines of `swin_windows.py`, `length_generalization.py` and `gated_bytes.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Number(NamedTuple):
    """An integer argument: its help, its default, its default with `--quick` if that differs, and its least value."""

    help: str
    default: int
    quick: int | None = None
    minimum: int = 1


def example_parser(docstring: str | None, picture: str, numbers: dict[str, Number]) -> argparse.ArgumentParser:
    """A parser of `numbers` by their names, `--device`, `--output` and `--quick`; its help is the docstring."""
    summary, _, details = (docstring or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, number in numbers.items():
        quick = "" if number.quick is None else f"; with --quick: {number.quick}"
        add(f"--{name}", type=int, metavar="N", help=f"{number.help} (default: {number.default}{quick})")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=default_device, help="device (default: cuda if there is one)")
    out = Path(__file__).parent / "out" / picture
    add("--output", type=Path, default=out, metavar="PNG", help=f"picture to write (default: examples/out/{picture})")
    add("--quick", action="store_true", help="train and measure little, to check that everything works")
    return parser


def parse(
    parser: argparse.ArgumentParser, numbers: dict[str, Number], num_heads: int, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The arguments, checked, with their defaults; an error ends the program and names the argument."""
    args = parser.parse_args(argv)
    for name, number in numbers.items():
        if getattr(args, name) is None:
            setattr(args, name, number.default if not args.quick or number.quick is None else number.quick)
        if getattr(args, name) < number.minimum:
            parser.error(f"`--{name}` must be at least {number.minimum}, got {getattr(args, name)}")
    if args.width % num_heads:
        parser.error(f"`--width` must be a multiple of {num_heads}, got {args.width}")
    if args.output.suffix != ".png":
        parser.error(f"`--output` must be a .png file, got {args.output}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a CUDA device and a torch built for it; there is none here")
    return args
