"""The numbers of README.md and docs/speed.md, from a CSV: ``python -m bench.readme FILE``.

Tests hold both pages to them.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bench.cases import BACKWARD, BOTH, FORWARD
from bench.report import median, read_results

PEERS = {
    "sdpa_index": "SDPA with the dense bias `bias[:, index]`, as models build it",
    "sdpa_strided": "SDPA with the bias as a strided view of the table, keys reversed",
    "t5_compiled": "T5-style attention, compiled by `torch.compile`",
    "sdpa_no_bias": "SDPA without any bias",
}
COLUMNS = {
    "forward": ("h8_l1024", FORWARD),
    "forward, causal": ("h8_l1024_causal", FORWARD),
    "forward + backward": ("h8_l1024", BOTH),
    "forward + backward, causal": ("h8_l1024_causal", BOTH),
}
SHORT_PEERS = ("sdpa_index", "sdpa_no_bias")
SHORT_COLUMNS = {f"L={length}": (f"b8h8_l{length}", BOTH) for length in (64, 128, 256)}


# The case, mode, metric and provider of every number in the sentences.
NUMBERS = {
    "forward_rate": ("h8_l2048", FORWARD, "gemm_fraction", "ours"),
    "backward_rate": ("h8_l2048", BACKWARD, "gemm_fraction", "ours"),
    "sgemm": ("h8_l2048", FORWARD, "rate", "sgemm"),
    "bf16": ("h8_l512_bf16", BOTH, "ratio", "sdpa_no_bias"),
    "bf16_compiled": ("h8_l512_bf16", BOTH, "ratio", "t5_compiled"),
    "memory": ("h8_l4096", BOTH, "memory", "ours"),
    "dense_memory": ("h8_l4096", BOTH, "memory", "sdpa_strided"),
    "window": ("h1_l8192_w128", BOTH, "window_speedup", "ours"),
    "cache": ("h8_cache32k", FORWARD, "copy_fraction", "ours"),
    "cache_d128": ("h8_cache32k_d128", FORWARD, "copy_fraction", "ours"),
    "cache_bf16": ("h8_cache32k_bf16", FORWARD, "copy_fraction", "ours"),
}
WORTH = """\
The table says how many times longer other ways take than this package. They ran on one thread of an {processor}, in
float32, with batch size 1, 8 heads, head dim 64 and length 1024.

{table}

A training step at length 4096 takes {memory:.1f} MiB in addition to its inputs.
The SDPA with a bias that takes least memory takes {dense_memory:.0f} MiB.
"""
SENTENCES = """\
Forward + backward of short sequences, in float32, with B=8, H=8, D=64:

{short_table}

More figures of one thread of the same processor, in float32 unless said otherwise:

* **Arithmetic.** At L=2048 the package does {forward_rate:.2f} (forward) and {backward_rate:.2f} (backward) times as
  many floating point operations a second as torch's sgemm, which does {sgemm:.0f} GFLOP/s.
* **bfloat16.** At L=512, forward + backward, SDPA without a bias takes {bf16:.2f} times as long as the package.
  T5-style attention, compiled, takes {bf16_compiled:.2f} times as long.
* **Memory.** A training step at L=4096 takes {memory:.1f} MiB in addition to its inputs. The SDPA with a bias that
  takes least memory takes {dense_memory:.0f} MiB.
* **Windows.** With a window of 128 keys on each side, a training step at L=8192 is {window:.1f} times faster than
  without a window.
* **Decoding.** One query reads a cache of 32768 keys at {cache:.2f} of the rate at which the machine copies memory
  (bytes read and written, per second). With D=128 the fraction is {cache_d128:.2f}, in bfloat16 {cache_bf16:.2f}.
"""


def worth(results: pd.DataFrame) -> str:
    """The README's part: one table and two sentences, from medians with one thread.

    Raises:
        ValueError: the results lack one of the numbers.
    """
    return WORTH.format(processor=_processor(results), table=_table(results, PEERS, COLUMNS), **_numbers(results))


def paragraphs(results: pd.DataFrame) -> str:
    """The part of docs/speed.md, from medians with one thread.

    Raises:
        ValueError: the results lack one of the numbers.
    """
    heading = (
        f"How many times longer other ways take, on one thread of an {_processor(results)}, in float32, with B=1, H=8, "
        "D=64, L=1024:"
    )
    short_table = _table(results, SHORT_PEERS, SHORT_COLUMNS)
    sentences = SENTENCES.format(short_table=short_table, **_numbers(results))
    return f"{heading}\n\n{_table(results, PEERS, COLUMNS)}\n\n{sentences}"


def _table(results: pd.DataFrame, peers: Iterable[str], columns: dict[str, tuple[str, str]]) -> str:
    """A row for each peer: its time over the package's, in each case and mode."""
    lines = [f"| | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for peer in peers:
        ratios = [f"{_value(results, *column, 'ratio', peer):.2f}" for column in columns.values()]
        lines.append(f"| {PEERS[peer]} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _numbers(results: pd.DataFrame) -> dict[str, float]:
    return {name: _value(results, *number) for name, number in NUMBERS.items()}


def _value(results: pd.DataFrame, case: str, mode: str, metric: str, provider: str) -> float:
    found = median(results, metric, case, provider, mode)
    if pd.isna(found):
        raise ValueError(f"the results lack the {metric} of {provider}, {mode}, {case}")
    return found


def _processor(results: pd.DataFrame) -> str:
    """The processor's name, such as "AMD EPYC (AVX512)"."""
    name, _, capability = results.device.iloc[0].partition(", ")[0].removeprefix("cpu ").rpartition(" ")
    return f"{name} ({capability})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.readme", description=__doc__)
    parser.add_argument("csv", type=Path, help="a CSV of `python -m bench`")
    shown = read_results(parser.parse_args().csv)
    print(f"README.md:\n\n{worth(shown)}\ndocs/speed.md:\n\n{paragraphs(shown)}", end="")
