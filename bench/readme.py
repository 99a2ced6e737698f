"""The README's paragraphs of CPU numbers, from a CSV: ``python -m bench.readme FILE``. A test holds the README to them."""

import argparse
from pathlib import Path

import pandas as pd

from bench.cases import BACKWARD, BOTH, FORWARD
from bench.providers import SDPA_WITH_BIAS
from bench.report import median, read_results

PEERS = {
    "sdpa_index": "SDPA with `bias[:, index]` materialised, and masked",
    "sdpa_strided": "SDPA with the bias as a strided view of the table, keys reversed",
    "t5_compiled": "compiled T5-style attention",
    "sdpa_no_bias": "SDPA without any bias",
}
COLUMNS = [
    (f"{mode}{', causal' * causal}".replace("+", " + "), f"h8_l1024{'_causal' * causal}", mode)
    for mode in (FORWARD, BOTH)
    for causal in (False, True)
]
SHORT = {64: "b8h8_l64", 128: "b8h8_l128", 256: "b8h8_l256"}


def paragraphs(results: pd.DataFrame) -> str:
    """Markdown, of one thread's medians."""

    def value(metric: str, case: str, provider: str = "ours", mode: str = FORWARD) -> float:
        found = median(results, metric, case, provider, mode)
        if pd.isna(found):
            raise SystemExit(f"the CSV lacks {metric} of {provider}, {mode}, {case}")
        return found

    def listed(texts: list[str]) -> str:
        return f"{', '.join(texts[:-1])} and {texts[-1]}"

    lines = [
        f"One thread of an {_processor(results)}, float32, B=1, H=8, D=64, L=1024; peer's time divided by ours, so more is"
        " better for us:",
        "",
        f"| | {' | '.join(title for title, _, _ in COLUMNS)} |",
        f"|{'---|' * (1 + len(COLUMNS))}",
    ]
    for peer, label in PEERS.items():
        ratios = (f"{value('ratio', case, peer, mode):.2f}" for _, case, mode in COLUMNS)
        lines.append(f"| {label} | {' | '.join(ratios)} |")
    speedups = listed([f"{value('ratio', case, 'sdpa_index', BOTH):.2f}" for case in SHORT.values()])
    rates = [value("gemm_fraction", "h8_l2048", mode=mode) for mode in (FORWARD, BACKWARD)]
    read, read_wide = (value("copy_fraction", case) for case in ("h8_cache32k", "h8_cache32k_d128"))
    ours = value("memory", "h8_l4096", mode=BOTH)
    leanest = min(
        median(results, "memory", "h8_l4096", peer, BOTH)
        for peer in SDPA_WITH_BIAS
        if not pd.isna(median(results, "memory", "h8_l4096", peer, BOTH))
    )
    window = value("window_speedup", "h1_l8192_w128", mode=BOTH)
    lines += [
        "",
        f"* 64 short sequences of {listed([str(length) for length in SHORT])}, forward + backward, beside the first of these: {speedups}.",
        f"* At L=2048 the engine runs at {rates[0]:.2f} (forward) and {rates[1]:.2f} (backward) of the rate of MKL's sgemm.",
        f"* A training step at L=4096 takes {ours:.1f} MiB where the leanest SDPA with a bias takes {leanest:.0f} MiB.",
        f"* A window of 128 on each side makes a training step at L=8192 {window:.1f} times faster.",
        f"* Decoding reads a cache of 32768 keys at {read:.2f} of the rate of copying memory ({read_wide:.2f} with D=128), bytes read"
        " and written.",
    ]
    return "\n".join(lines)


def _processor(results: pd.DataFrame) -> str:
    """Such as "AMD EPYC (AVX512)"."""
    name, _, capability = results.device.iloc[0].partition(", ")[0].removeprefix("cpu ").rpartition(" ")
    return f"{name} ({capability})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.readme", description=__doc__)
    parser.add_argument("csv", type=Path, help="a CSV of `python -m bench`")
    print(paragraphs(read_results(parser.parse_args().csv)))
