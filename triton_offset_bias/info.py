"""`python -m triton_offset_bias.info` reports on every backend: what it serves, its build, and why it cannot serve.

With `--features` it prints a table of what every backend serves on the machines that it is made for.
"""

import argparse
import platform

import torch

import triton_offset_bias
from triton_offset_bias.backends.contract import BACKENDS


def report() -> str:
    """The text that the command prints."""
    lines = [
        f"triton_offset_bias {triton_offset_bias.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads",
        "",
    ]
    for name, backend in BACKENDS.items():
        reasons = backend.unavailable_reasons()
        lines.append(f"{name}: {'cannot serve' if reasons else 'ready'}")
        lines.append(f"  serves     {backend.PROPERTIES['serves']}")
        lines.append(f"  built for  {backend.build_description()}")
        lines.extend(f"  because    {reason}" for reason in reasons)
    return "\n".join(lines)


def features() -> str:
    """A Markdown table of what every backend serves, with a column for each backend."""
    columns = {name: backend.PROPERTIES for name, backend in BACKENDS.items()}
    rows = [[key, *(column[key] for column in columns.values())] for key in next(iter(columns.values()))]
    header, *body = (f"| {' | '.join(row)} |" for row in (["", *(f"`{name}`" for name in columns)], *rows))
    return "\n".join([header, "|---" * (1 + len(columns)) + "|", *body])


def main(arguments: list[str] | None = None) -> None:
    """Prints what `arguments`, or the command line, ask for."""
    parser = argparse.ArgumentParser(
        "python -m triton_offset_bias.info",
        description="Prints which backends are ready on this machine, and why others are not.",
    )
    parser.add_argument("--features", action="store_true", help="print what every backend serves, as a Markdown table")
    print(features() if parser.parse_args(arguments).features else report())


if __name__ == "__main__":
    main()
