"""The README's CPU numbers, from a CSV: ``python -m bench.readme FILE``. A test holds the README to them."""

import argparse
from pathlib import Path

import pandas as pd

from bench.cases import BACKWARD, BOTH, FORWARD
from bench.report import median, read_results

PEERS = {
    "sdpa_index": "SDPA with `bias[:, index]` materialised, and masked",
    "sdpa_strided": "SDPA with the bias as a strided view of the table, keys reversed",
    "t5_compiled": "compiled T5-style attention",
    "sdpa_no_bias": "SDPA without any bias",
}
COLUMNS = {
    "forward": ("h8_l1024", FORWARD),
    "forward, causal": ("h8_l1024_causal", FORWARD),
    "forward + backward": ("h8_l1024", BOTH),
    "forward + backward, causal": ("h8_l1024_causal", BOTH),
}


# Case, mode, metric, provider of every number in the sentences.
NUMBERS = {
    "forward_rate": ("h8_l2048", FORWARD, "gemm_fraction", "ours"),
    "backward_rate": ("h8_l2048", BACKWARD, "gemm_fraction", "ours"),
    **{f"l{length}": (f"b8h8_l{length}", BOTH, "ratio", "sdpa_index") for length in (64, 128, 256)},
    **{f"plain{length}": (f"b8h8_l{length}", BOTH, "ratio", "sdpa_no_bias") for length in (64, 128, 256)},
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
SENTENCES = """
* The rate of floating point operations at L=2048 is {forward_rate:.2f} (forward) and {backward_rate:.2f} (backward)
  of that of torch's sgemm, {sgemm:.0f} GFLOP/s.
* Short sequences, B * H = 64, forward + backward, at L=64, 128 and 256: the first of these takes {l64:.2f}, {l128:.2f}
  and {l256:.2f} times longer than ours, the last {plain64:.2f}, {plain128:.2f} and {plain256:.2f}.
* In bfloat16 on the same processor, at L=512, forward + backward, SDPA without a bias takes {bf16:.2f} times as long,
  compiled T5-style attention {bf16_compiled:.2f} times.
* A training step at L=4096 takes {memory:.1f} MiB where the leanest SDPA with a bias takes {dense_memory:.0f} MiB.
* A window of 128 keys on each side makes a training step at L=8192 {window:.1f} times faster.
* Decoding reads a cache of 32768 keys at {cache:.2f} of the rate of copying memory, bytes read and written; with D=128
  at {cache_d128:.2f}, in bfloat16 at {cache_bf16:.2f}.
"""


def paragraphs(results: pd.DataFrame) -> str:
    """Markdown, of one thread's medians.

    Raises:
        ValueError: the results lack one of the numbers.
    """

    def value(case: str, mode: str, metric: str, provider: str) -> float:
        found = median(results, metric, case, provider, mode)
        if pd.isna(found):
            raise ValueError(f"the results lack the {metric} of {provider}, {mode}, {case}")
        return found

    shape = "float32, B=1, H=8, D=64, L=1024"
    lines = [
        f"One thread of an {_processor(results)}, {shape}; how many times longer each takes than ours:",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|{'---|' * (1 + len(COLUMNS))}",
    ]
    for peer, label in PEERS.items():
        ratios = [f"{value(*column, 'ratio', peer):.2f}" for column in COLUMNS.values()]
        lines.append(f"| {label} | {' | '.join(ratios)} |")
    numbers = {name: value(*number) for name, number in NUMBERS.items()}
    return "\n".join(lines) + "\n" + SENTENCES.format(**numbers)


def _processor(results: pd.DataFrame) -> str:
    """Such as "AMD EPYC (AVX512)"."""
    name, _, capability = results.device.iloc[0].partition(", ")[0].removeprefix("cpu ").rpartition(" ")
    return f"{name} ({capability})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.readme", description=__doc__)
    parser.add_argument("csv", type=Path, help="a CSV of `python -m bench`")
    print(paragraphs(read_results(parser.parse_args().csv)), end="")
