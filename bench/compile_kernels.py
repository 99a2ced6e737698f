"""``python -m bench.compile_kernels``: compiles the GPU kernels for every target, without a GPU.

It prints registers, bytes of spills, ptxas' complaints about serialised matrix products, and bytes of shared memory for
every variant. It fails where a variant needs more than the budget in bench/kernel_budget.csv allows, or more shared
memory than the target has, or where ptxas complains about a form of `NEVER_SERIALISED` for sm_90. `--update` writes the
budget anew. The oldest and the newest Triton compile every form, those between them the `main_variants`.
"""

import argparse
import contextlib
import io
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import triton
from tqdm import tqdm

from bench.kernel_variants import TARGETS, Variant, main_variants, shipped_variants, target_of

# The versions of Triton that have a budget, and the forms that each compiles.
VARIANTS = {
    "3.6.0": shipped_variants,  # torch 2.10 and 2.11 ship it
    "3.7.1": main_variants,  # 2.13
    "3.8.0": main_variants,  # 2.14
    "3.9.0": shipped_variants,
}
NEVER_SERIALISED = ("even", "ragged", "ragged, masked", "packed")
BUDGET = Path(__file__).parent / "kernel_budget.csv"
KEY = ["triton", "target", "kernel", "dtype", "head_dim", "schedule", "form"]
LIMITED = ["registers", "spills", "serialised", "shared"]


def main(arguments: list[str] | None = None) -> None:
    """Compiles, prints the table, and compares it with the budget."""
    parser = argparse.ArgumentParser("python -m bench.compile_kernels", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at work (default: one for each core)"
    )
    parser.add_argument(
        "--main", action="store_true", help="compile the main forms alone: bfloat16, plain, masked and packed"
    )
    parser.add_argument(
        "--update", action="store_true", help="write these targets' budget instead of comparing with it"
    )
    options = parser.parse_args(arguments)
    if triton.__version__ not in VARIANTS:
        raise SystemExit(f"Triton must be one of {', '.join(VARIANTS)}, which have a budget; got {triton.__version__}")
    forms = main_variants if options.main else VARIANTS[triton.__version__]
    variants = [variant for target in options.target for variant in forms(target)]
    with ProcessPoolExecutor(options.jobs) as pool:
        compiled = pool.map(_row, variants)
        rows = pd.DataFrame(list(tqdm(compiled, total=len(variants), desc="compiling", unit="kernel")))
    print(rows.to_string(index=False))
    failures = _over_shared_memory(rows) + _serialised(rows)
    budget = pd.read_csv(BUDGET) if BUDGET.exists() else rows.iloc[:0]
    if options.update:
        is_other = (budget["triton"] != triton.__version__) | ~budget["target"].isin(options.target)
        if options.main:
            is_other |= ~budget.set_index(KEY).index.isin(rows.set_index(KEY).index)
        kept = budget[is_other]
        pd.concat([kept, rows]).convert_dtypes().sort_values(KEY).to_csv(BUDGET, index=False)
    else:
        failures += _over_budget(rows, budget)
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"\n{len(rows)} kernels compiled, all within the budget")


def _row(variant: Variant) -> dict[str, object]:
    return {
        "triton": triton.__version__,
        "target": variant.target,
        "kernel": variant.kernel,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "head_dim": variant.head_dim,
        "schedule": variant.schedule,
        "form": variant.form,
        **usage_of(variant),
    }


def usage_of(variant: Variant) -> dict[str, int]:
    """What a variant takes when Triton compiles it anew: registers, bytes of spills, complaints, shared memory.

    ptxas is the one that Triton itself takes for the target, with the options that Triton gives it.
    """
    printed = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        triton.knobs.compilation.always_compile = True  # what is in the cache prints nothing
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = variant.compile()
    usage = _ptxas_usage(printed.getvalue()) if "ptx" in compiled.asm else _amd_usage(compiled.asm["amdgcn"])
    return {**usage, "shared": compiled.metadata.shared}


def _ptxas_usage(printed: str) -> dict[str, int]:
    """ptxas' figures: registers a thread, bytes of spills that it stores and loads, and complaints C75xx."""
    numbers = {what: int(found[1]) for what, found in _find(printed).items()}
    return {
        "registers": numbers["registers"],
        "spills": numbers["stores"] + numbers["loads"],
        "serialised": len(re.findall(r"\(C75\d\d\)", printed)),
    }


def _find(printed: str) -> dict[str, re.Match[str]]:
    patterns = {
        "registers": r"Used (\d+) registers",
        "stores": r"(\d+) bytes spill stores",
        "loads": r"(\d+) bytes spill loads",
    }
    return {what: match for what, pattern in patterns.items() if (match := re.search(pattern, printed))}


def _amd_usage(assembly: str) -> dict[str, int]:
    """The numbers of vector registers and of spilled ones."""
    counts = {what: re.search(rf"\.{what}:\s*(\d+)", assembly) for what in ("vgpr_count", "vgpr_spill_count")}
    return {
        "registers": int(counts["vgpr_count"][1]) if counts["vgpr_count"] else -1,
        "spills": int(counts["vgpr_spill_count"][1]) if counts["vgpr_spill_count"] else -1,
        "serialised": 0,
    }


def _over_shared_memory(rows: pd.DataFrame) -> list[str]:
    over = rows[rows["shared"] > rows["target"].map(lambda name: target_of(name).shared_memory)]
    return [f"does not fit: {_name(row)}: {row.shared} bytes of shared memory" for row in over.itertuples()]


def _serialised(rows: pd.DataFrame) -> list[str]:
    """Forms on Hopper for which ptxas serialises a product or adds a fence, although no budget allows it."""
    is_watched = (rows["target"] == "sm_90") & rows["form"].isin(NEVER_SERIALISED)
    wrong = rows[is_watched & (rows["serialised"] > 0)]
    return [f"serialised: {_name(row)}" for row in wrong.itertuples()]


def _over_budget(rows: pd.DataFrame, budget: pd.DataFrame) -> list[str]:
    both = rows.merge(budget, on=KEY, suffixes=("", "_budget"), how="left", indicator="found")
    failures = [f"not in the budget (see --update): {_name(row)}" for row in both[both["found"] != "both"].itertuples()]
    for row in both[both["found"] == "both"].itertuples():
        for what in LIMITED:
            allowed = getattr(row, f"{what}_budget")
            if not getattr(row, what) <= allowed:
                failures.append(f"over budget: {_name(row)}: {what} {getattr(row, what)}, allowed {allowed}")
    return failures


def _name(row) -> str:
    return f"{row.target} {row.kernel} {row.dtype} {row.head_dim} {row.schedule}, {row.form}"


if __name__ == "__main__":
    main()
