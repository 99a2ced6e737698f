"""The numbers of README.md and docs/speed.md, from CSVs of `python -m bench`, one for each processor.

    python -m bench.readme [--write] [CSV ...]

It prints them, or with --write puts them into the pages, between the lines that mark their places. Tests hold both
pages to them.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bench.cases import BACKWARD, BOTH, CASES, FORWARD
from bench.report import median, model_speedup, read_results
from bench.rows import ROOT

RESULTS = "bench/results/cpu-*.csv"
BEGIN, END = "<!-- from python -m bench.readme -->", "<!-- end -->"
PEERS = {
    "sdpa_index": "SDPA with the dense bias `bias[:, index]`, as models build it",
    "sdpa_strided": "SDPA with the bias as a strided view of the table, keys reversed",
    "t5_compiled": "T5-style attention, compiled by `torch.compile`",
    "sdpa_no_bias": "SDPA without any bias",
}
PASSES = {"forward": FORWARD, "forward + backward": BOTH}
DTYPES = {"float32": "", "bfloat16": "_bf16"}  # and the end of a case's name
SHORT_PEERS = ("sdpa_index", "sdpa_no_bias")
SHORT_COLUMNS = {f"L={length}": (f"b8h8_l{length}", BOTH) for length in (64, 128, 256)}
PLAIN_CASES = (
    *("h8_l2048", "b32h12_l128", "b192h4_l49", "h8_l512_bf16", "h8_l1024_bf16", "h8_l2048_bf16", "h8_l1024_d128_bf16"),
    *("b8h8_l128_bf16", "b64h4_l49_bf16", "b32h12_l128_bf16"),
)
GRID_CASES = ("b192h4_g7", "b192h4_g7_bf16", "b8h12_g14", "b8h12_g14_bf16")
GATE_CASES = (*(f"h8_l1024_r{rank}" for rank in (1, 16, 64)), *(f"h8_l1024_c16_r{rank}" for rank in (16, 64)))
TEXTS = {
    "b32_l128": "32 sequences of 128 tokens",
    "b8_l384": "8 sequences of 384 tokens",
    "b32_l128_padded": "32 sequences of 32 to 128 tokens, padded",
    "b8_l384_padded": "8 sequences of 96 to 384 tokens, padded",
}
# The case of each row of the table of models, without the end for a dtype, and the number of threads.
MODELS = {
    "`SentenceTransformer.encode`, 12 layers of MPNet, 256 sentences": ("sentences", 1),
    "the same with two threads": ("sentences", 2),
    **{
        f"{name}, {text}": (f"{model}_{shape}", 1)
        for model, name in {"mpnet": "MPNet", "t5_encoder": "T5 encoder"}.items()
        for shape, text in TEXTS.items()
    },
    "timm's Swin-T, 4 images": ("swin_t", 1),
    "timm's Swin V2-T, windows of 64 tokens, 2 images": ("swinv2_t_w8", 1),
    "timm's Swin V2-T, windows of 256 tokens, 2 images": ("swinv2_t_w16", 1),
    "timm's MaxViT-T, 2 images": ("maxvit_t", 1),
    "timm's BEiT-B, 2 images": ("beit_b", 1),
}
FLOOR_CASES = ("h8_l1024", "h8_l1024_causal", "h8_l2048", "h8_l1024_bf16", "h8_l1024_bf16_causal", "h8_l2048_bf16")

# The case, mode, metric and provider of every number in the sentences.
NUMBERS = {
    "forward_rate": ("h8_l2048", FORWARD, "gemm_fraction", "ours"),
    "backward_rate": ("h8_l2048", BACKWARD, "gemm_fraction", "ours"),
    "sgemm": ("h8_l2048", FORWARD, "rate", "sgemm"),
    "memory": ("h8_l4096", BOTH, "memory", "ours"),
    "dense_memory": ("h8_l4096", BOTH, "memory", "sdpa_strided"),
    "window": ("h1_l8192_w128", BOTH, "window_speedup", "ours"),
    "cache": ("h8_cache32k", FORWARD, "copy_fraction", "ours"),
    "cache_d128": ("h8_cache32k_d128", FORWARD, "copy_fraction", "ours"),
    "cache_bf16": ("h8_cache32k_bf16", FORWARD, "copy_fraction", "ours"),
}
WORTH = """\
The tables say how many times longer other ways take than this package. They ran on one thread of the named processor,
with batch size 1, 8 heads, head dim 64 and length 1024.

{tables}
"""
MEMORY = """\
A training step at length 4096 in float32 takes {memory:.1f} MiB in addition to its inputs.
The SDPA with a bias that takes least memory takes {dense_memory:.0f} MiB.
"""
SENTENCES = (
    """\
* **Arithmetic.** At L=2048 the package does {forward_rate:.2f} (forward) and {backward_rate:.2f} (backward) times as
  many floating point operations a second as torch's sgemm, which does {sgemm:.0f} GFLOP/s.
""",
    """\
* **Memory.** A training step at L=4096 takes {memory:.1f} MiB in addition to its inputs. The SDPA with a bias that
  takes least memory takes {dense_memory:.0f} MiB.
""",
    """\
* **Windows.** With a window of 128 keys on each side, a training step at L=8192 is {window:.1f} times faster than
  without a window.
""",
    """\
* **Decoding.** One query reads a cache of 32768 keys at {cache:.2f} of the rate at which the machine copies memory
  (bytes read and written, per second). With D=128 the fraction is {cache_d128:.2f}, in bfloat16 {cache_bf16:.2f}.
""",
)


def worth(all_results: list[pd.DataFrame]) -> str:
    """The README's part: a table for each processor, and the memory where it was measured last."""
    tables = "\n".join(f"{_processor(results)}:\n\n{_peers_table(results, '')}\n" for results in all_results)
    memory = [text for results in all_results if (text := _sentence(MEMORY, results))]
    return WORTH.format(tables=tables) + "".join(memory[-1:])


def paragraphs(all_results: list[pd.DataFrame]) -> str:
    """The part of docs/speed.md: a section for each processor, from medians with one thread.

    What a processor's results lack is left out.
    """
    return "\n".join(_section(results) for results in all_results)


def _section(results: pd.DataFrame) -> str:
    processor = _processor(results)
    tables = {
        "How many times longer other ways take with one thread, with B=1, H=8, D=64, L=1024:": _peers_table(
            results, ""
        ),
        "The same under causality:": _peers_table(results, "_causal"),
        "Forward + backward of short sequences, in float32, with B=8, H=8, D=64:": _table(
            results, SHORT_PEERS, SHORT_COLUMNS
        ),
        "How many times longer SDPA without any bias takes than this package with one:": _plain_table(results),
        "The same with two-dimensional offsets, as in windows and patches of images, for SDPA with the dense bias and "
        "then for SDPA without any bias:": _grid_table(results),
        "What factors from the query cost, with B=1, H=8, D=64, L=1024, in float32: the time with them over the time "
        "without, and the time of dense eager code over the time with them:": _gate_table(results),
        "Share of the processor's peak, and share of the floors, which are the time of the products at the peak plus "
        "the time of the powers of 2 alone:": _floors_table(results),
        "How many times longer models take with the faster of their own attentions than with this package, with one "
        "thread unless said otherwise. MPNet and T5 have 2 layers of base size unless said otherwise, images 224 x 224 "
        "pixels, of Swin V2 256 x 256:": _models_table(results),
        f"More figures of one thread of the {processor}, in float32 unless said otherwise:": "".join(
            _sentence(sentence, results) for sentence in SENTENCES
        ).rstrip(),
    }
    parts = [part for title, text in tables.items() if text for part in (title, text)]
    return "\n\n".join([f"### {processor}", *parts]) + "\n"


def _peers_table(results: pd.DataFrame, mask: str) -> str:
    """Ratios by pass and dtype. Dtypes without any measurement are left out."""
    columns = {
        f"{name}, {dtype}": (f"h8_l1024{end}{mask}", mode)
        for name, mode in PASSES.items()
        for dtype, end in DTYPES.items()
        if not results[results.case == f"h8_l1024{end}{mask}"].empty
    }
    return _table(results, PEERS, columns)


def _plain_table(results: pd.DataFrame) -> str:
    lines = ["| B, H, L, D, dtype | forward | forward + backward |", "|---|---|---|"]
    for name in PLAIN_CASES:
        ratios = [_text(median(results, "ratio", name, "sdpa_no_bias", mode)) for mode in PASSES.values()]
        if set(ratios) != {"-"}:
            lines.append(f"| {_shape(name)} | {' | '.join(ratios)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _grid_table(results: pd.DataFrame) -> str:
    columns = [(peer, mode) for peer in ("sdpa_index", "sdpa_no_bias") for mode in PASSES.values()]
    lines = ["| B, H, L, D, dtype |" + " forward | forward + backward |" * 2, "|---|---|---|---|---|"]
    for name in GRID_CASES:
        ratios = [_text(median(results, "ratio", name, peer, mode)) for peer, mode in columns]
        if set(ratios) != {"-"}:
            lines.append(f"| {_shape(name)} | {' | '.join(ratios)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _gate_table(results: pd.DataFrame) -> str:
    lines = ["| factors, columns of the table | forward | forward + backward | dense |", "|---|---|---|---|"]
    for name in GATE_CASES:
        costs = [1 / median(results, "ratio", name, "ours_ungated", mode) for mode in PASSES.values()]
        ratios = [_text(value) for value in (*costs, median(results, "ratio", name, "eager_gated", BOTH))]
        if set(ratios) != {"-"}:
            lines.append(f"| {CASES[name].rank}, {2 * CASES[name].reach + 1} | {' | '.join(ratios)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _floors_table(results: pd.DataFrame) -> str:
    lines = [
        "| B, H, L, D, dtype | peak, GFLOP/s | forward: of peak | of floors | both passes: of peak | of floors |",
        "|---|---|---|---|---|---|",
    ]
    for name in FLOOR_CASES:
        peak = median(results, "rate", name, "peak", FORWARD)
        shares = [
            _text(median(results, metric, name, "ours", mode))
            for mode in PASSES.values()
            for metric in ("peak_fraction", "floor_fraction")
        ]
        if not pd.isna(peak):
            lines.append(f"| {_shape(name)} | {peak:.0f} | {' | '.join(shares)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _models_table(results: pd.DataFrame) -> str:
    columns = [f"{mode}, {dtype}" for dtype in DTYPES for mode in ("inference", "training")]
    lines = [f"| | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for name, (case, threads) in MODELS.items():
        ratios = [
            _text(model_speedup(results, f"{case}{end}", mode, threads))
            for end in DTYPES.values()
            for mode in (FORWARD, BOTH)
        ]
        if set(ratios) != {"-"}:
            lines.append(f"| {name} | {' | '.join(ratios)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _shape(name: str) -> str:
    case = CASES[name]
    return f"{case.batch}, {case.heads}, {case.length}, {case.head_dim}, {case.dtype}{', causal' * case.is_causal}"


def _table(results: pd.DataFrame, peers: Iterable[str], columns: dict[str, tuple[str, str]]) -> str:
    """A row for each peer that was measured: its time over the package's, in each case and mode."""
    lines = [f"| | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for peer in peers:
        ratios = [_text(median(results, "ratio", case, peer, mode)) for case, mode in columns.values()]
        if set(ratios) - {"-"}:
            lines.append(f"| {PEERS[peer]} | {' | '.join(ratios)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _text(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"


def _sentence(text: str, results: pd.DataFrame) -> str:
    """The text with its numbers; empty if one of them was not measured."""
    numbers = {
        name: median(results, metric, case, provider, mode) for name, (case, mode, metric, provider) in NUMBERS.items()
    }
    return (
        ""
        if any(f"{{{name}:" in text and pd.isna(value) for name, value in numbers.items())
        else text.format(**numbers)
    )


def _processor(results: pd.DataFrame) -> str:
    """The processor's name, such as "AMD EPYC (AVX512_BF16)"."""
    name, _, capability = results.device.iloc[0].partition(", ")[0].removeprefix("cpu ").rpartition(" ")
    return f"{name} ({capability})"


def main() -> None:
    """Prints both parts, or writes them."""
    parser = argparse.ArgumentParser(
        "python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="*", help=f"CSVs of `python -m bench` (default: {RESULTS})")
    parser.add_argument("--write", action="store_true", help="write README.md and docs/speed.md instead of printing")
    options = parser.parse_args()
    shown = [read_results(path) for path in options.csv or published()]
    for page, part in (("README.md", worth(shown)), ("docs/speed.md", paragraphs(shown))):
        if options.write:
            text = (ROOT / page).read_text()
            before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
            (ROOT / page).write_text(f"{text[:before]}\n{part}{text[after:]}")
        print(f"wrote {page}" if options.write else f"{page}:\n\n{part}")


def published() -> list[Path]:
    """The CSVs of the pages, in the order of the processors' names."""
    return sorted(ROOT.glob(RESULTS))


if __name__ == "__main__":
    main()
