"""The command line of the benchmark."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from bench.cases import CASES, GPU_CASES, GPU_CLAMP, GPU_MODEL_DIM, GPU_TOKENS, MODES, QUICK_CASES, SUITES, ModelCase
from bench.models import ATTENTIONS
from bench.providers import PROVIDERS
from bench.report import print_requirements, print_summary, read_results
from bench.rows import ROOT, Row, RowMaker, write_rows
from bench.suites import Plan, measure
from bench.timing import Effort

ROUNDS, LIMIT = 20, 15.0
QUICK_ROUNDS, QUICK_LIMIT = 3, 3.0

ABOUT = """
Measures offset_bias_attention beside other ways to compute the same attention, and writes a CSV after each case.

Providers are checked against the dense reference (output and gradients) before they are timed. They are interleaved: in
each round every provider runs once, in rotating order, and ratios are taken within a round. One thread is timed in CPU
time, more threads in wall time, a GPU by its own events with an empty L2 cache. Forward is inference, without
gradients. Forward+backward takes the gradients of all inputs. Cases and suites depend on --device unless you name them.
"""


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the CSV after each case, and prints a summary of it."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and (options.device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        parser.error(f"argument --device: torch {torch.__version__} finds {found} GPUs, none is {options.device}")
    plans = plans_of(options)
    if not plans:
        parser.error("no suite measures these cases, modes and providers by default: name one with --suite")
    if options.device.type != "cpu" and any("memory" in plan.suite for plan in plans):
        parser.error("argument --suite: memory measures a process on a CPU")
    output = options.output or ROOT / "bench" / "out" / f"{options.device.type}.csv"
    maker = RowMaker(str(options.device))
    rows: list[Row] = []
    try:
        for plan in tqdm(plans, desc="benchmark", unit="case"):
            try:
                rows += measure(plan, maker)
            finally:
                write_rows(output, rows, options.append)
            torch.set_num_threads(options.threads)
    except KeyboardInterrupt:
        tqdm.write("interrupted: the rows measured so far are written")
    if not rows:
        raise SystemExit("nothing was measured: no provider could run")
    results = read_results(output)
    print_summary(results)
    if options.check:
        print_requirements(results)
    print(f"\nwrote {output}; `python -m bench.plots {output}` draws it")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        "python -m bench", description=ABOUT, epilog=_choices(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices, what in (
        ("suite", SUITES, "kinds of measurement"),
        ("case", CASES, "shapes, instead of the suites' own"),
        ("mode", MODES, "modes, instead of the suites' own"),
        ("provider", (*PROVIDERS, *ATTENTIONS), "providers, instead of the suites' own; ratios need ours"),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, metavar="NAME", help=f"{what} (names below)")
    parser.add_argument("--rounds", type=_count, help=f"rounds of each case and mode (default {ROUNDS})")
    parser.add_argument("--limit", type=float, help=f"seconds after which no round begins (default {LIMIT:g})")
    parser.add_argument("--threads", type=_count, default=1, help="threads of every provider (default 1)")
    parser.add_argument(
        "--device",
        type=_device,
        default=_device("cpu"),
        help="cpu, cuda or cuda:N: where the tensors are (default cpu)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="take about a minute: few cases, few rounds, nothing compiled"
    )
    parser.add_argument(
        "--check", action="store_true", help="also print which figures must be reached, and whether they are"
    )
    parser.add_argument("--output", type=Path, help="the CSV to write (default bench/out/DEVICE.csv)")
    parser.add_argument("--append", action="store_true", help="keep the rows of the CSV that are not measured again")
    return parser


def _choices() -> str:
    lines = ["suites:"]
    for name, suite in SUITES.items():
        lines.append(f"  {name:18} {suite.about} ({', '.join(suite.modes)})")
    lines.append("cases:")
    for name, case in CASES.items():
        if case in GPU_CASES:
            continue
        used = ", ".join(suite for suite in SUITES if name in SUITES[suite].cases)
        shape = f"B={case.batch} H={case.heads} L={case.length} D={case.head_dim} {case.dtype}"
        lines.append(f"  {name:18} {shape}{' causal' * case.is_causal} ({used})")
    shape = f"B=max(1, {GPU_TOKENS} / L) H={GPU_MODEL_DIM} / D bfloat16; _c{GPU_CLAMP}: a table that ends there"
    lines.append(f"  lL_dD[_c{GPU_CLAMP}][_causal] for L in 512, 1024, .. 32768, D in 64, 128: {shape} (gpu)")
    lines += ["modes:", *(f"  {mode}" for mode in MODES), "providers:"]
    lines += [f"  {name:18} {provider.prepare.__doc__}".partition("\n")[0] for name, provider in PROVIDERS.items()]
    lines += [f"  {name:18} {about} (models)" for name, about in ATTENTIONS.items() if name not in PROVIDERS]
    return "\n".join(lines)


def plans_of(options: argparse.Namespace) -> list[Plan]:
    """The plans: one for every suite and case that the command line leaves."""
    effort = Effort(
        options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        options.limit if options.limit is not None else (QUICK_LIMIT if options.quick else LIMIT),
    )
    plans = []
    unnamed = [name for name, x in SUITES.items() if x.device == options.device.type and not x.has_to_be_named]
    for name in options.suite or unnamed:
        suite = SUITES[name]
        cases = options.case or (QUICK_CASES[name] if options.quick else suite.cases)
        # A choice by name narrows every suite when no suite is chosen; a chosen suite takes any case and provider.
        cases = [case for case in cases if options.suite or case in suite.cases]
        providers = [p for p in options.provider or suite.providers if options.suite or p in suite.providers]
        # Models and attention by itself have cases and providers of their own.
        cases = [case for case in cases if isinstance(CASES[case], ModelCase) == (name == "models")]
        providers = [p for p in providers if p in (ATTENTIONS if name == "models" else PROVIDERS)]
        modes = options.mode or suite.modes
        modes = tuple(mode for mode in modes if options.suite or mode in suite.modes)
        if options.quick and not options.provider:
            providers = [p for p in providers if p in ATTENTIONS or not PROVIDERS[p].is_compiled]
        if not (cases and modes and providers):
            continue
        plans += [
            Plan(name, CASES[case], modes, tuple(providers), str(options.device), options.threads, effort)
            for case in cases
        ]
    return plans


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text}")
    return device


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
