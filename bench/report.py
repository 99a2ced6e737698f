"""A report of a CSV: a summary, and the required figures with whether they are met. ``python -m bench.report FILE``."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.cases import BACKWARD, BOTH, FORWARD
from bench.providers import SDPA_WITH_BIAS, TRAINABLE_PEERS

OWN = ("own_eager", "own_sdpa")  # a model's own attentions
Value = Callable[[pd.DataFrame], float]  # not a number where the CSV lacks a row


@dataclass(frozen=True)
class Requirement:
    """A figure that must be reached.

    Attributes:
        what: the figure, in words.
        case: the case that it is measured in.
        value: reads the figure from the results.
        bound: the least value, or with `is_upper` the largest; None if the figure is only reported.
    """

    what: str
    case: str
    value: Value
    bound: float | None
    is_upper: bool = False


def read_results(path: Path) -> pd.DataFrame:
    """The CSV as a table."""
    return pd.read_csv(path, keep_default_na=False)


def requirements() -> list[Requirement]:
    """The figures that the CPU engine must reach on every processor, in float32 unless the case says bf16.

    They are of one thread, except for the speed-up by a second one.
    """
    no_bias = ("sdpa_no_bias",)
    table = [
        # what, mode, peers, bound, bound when causal. The ratio compares the median with that of the fastest peer.
        ("forward vs SDPA + bias[:, index]", FORWARD, ("sdpa_index",), 3.0, 8.0),
        ("forward vs the fastest SDPA + bias", FORWARD, SDPA_WITH_BIAS, None, None),
        ("forward vs SDPA, no bias", FORWARD, no_bias, 1.15, 1.4),
        ("forward+backward vs the fastest trainable peer", BOTH, TRAINABLE_PEERS, 2.8, 5.5),
        ("forward+backward vs SDPA, no bias", BOTH, no_bias, 1.2, 1.4),
    ]
    found = [
        Requirement(what, case, _speedup(case, mode, peers), bound)
        for what, mode, peers, *bounds in table
        for case, bound in zip(("h8_l1024", "h8_l1024_causal"), bounds, strict=True)
    ]
    found.append(Requirement("forward vs SDPA, no bias", "h8_l2048", _speedup("h8_l2048", FORWARD, no_bias), 1.1))
    for case in ("b32h12_l128", "b192h4_l49"):
        found.append(Requirement("forward+backward vs SDPA, no bias", case, _speedup(case, BOTH, no_bias), 1.2))
    found += _gate_requirements()
    cache = "h8_cache32k_bf16"
    found.append(
        Requirement("decoding, share of the copy rate", cache, _one("copy_fraction", cache, "ours", FORWARD), 0.75)
    )
    for case, bound in (("h8_l2048", 0.95), ("h8_l2048_causal", 0.9)):
        for mode in (FORWARD, BACKWARD):
            value = _one("gemm_fraction", case, "ours", mode)
            found.append(Requirement(f"{mode}, fraction of sgemm's rate", case, value, bound))
    for what, provider, least in (("", "ours", 1.7), (", of sgemm beside it", "sgemm", None)):
        value = _least_thread_speedup(provider)
        found.append(Requirement(f"speed-up by the second thread, least{what}", "all", value, least))
    for suffix in ("", "_causal"):
        cases = f"h8_l2048..8192{suffix}"
        found.append(Requirement("memory growth per doubling of L, most", cases, _growth(suffix), 2.15, is_upper=True))
        value = _memory_ratio(suffix)
        found.append(Requirement("memory of the leanest SDPA + bias / ours", f"h8_l4096{suffix}", value, 15.0))
    return found


# Bounds of calls with factors from the query: forward and forward+backward over the same call without them, dense eager
# code over ours forward+backward, and the memory's growth of forward+backward at 2048 tokens in MiB.
GATE_BOUNDS = {"r1": (1.1, 1.09, 4.2, 19), "r16": (1.29, 1.33, 4.0, 30), "r64": (1.73, 1.9, 3.5, 54)}
SHORT_GATE_BOUNDS = {"c16_r16": (1.14, 1.17), "c16_r64": (1.14, 1.17)}


def _gate_requirements() -> list[Requirement]:
    found = []
    for name, (*costs, speedup, memory) in GATE_BOUNDS.items():
        found += _gate_costs(f"h8_l1024_{name}", costs)
        value = _speedup(f"h8_l1024_{name}", BOTH, ("eager_gated",))
        found.append(Requirement("a gate, forward+backward vs dense eager", f"h8_l1024_{name}", value, speedup))
        value = _one("memory", f"h8_l2048_{name}", "ours", BOTH)
        found.append(Requirement("a gate, memory growth in MiB", f"h8_l2048_{name}", value, memory, is_upper=True))
    for name, costs in SHORT_GATE_BOUNDS.items():
        found += _gate_costs(f"h8_l1024_{name}", costs)
    return found


def _gate_costs(case: str, bounds: Sequence[float]) -> list[Requirement]:
    return [
        Requirement(f"a gate, {mode} over the call without", case, _cost(case, mode), bound, is_upper=True)
        for mode, bound in zip((FORWARD, BOTH), bounds, strict=True)
    ]


# Bounds of bfloat16 problems on processors with AMX: forward and forward+backward, each over the build avx512_bf16,
# which was the widest before there was one for AMX, and over SDPA without a bias.
AMX_BOUNDS = {
    "h8_l512_bf16": (3.3, 3.8, 1.05, 2.4),
    "h8_l1024_bf16": (5.2, 5.2, 1.4, 2.5),
    "h8_l1024_bf16_causal": (4.2, 4.4, 1.7, 2.9),
    "h8_l2048_bf16": (5.6, 5.7, 1.6, 2.5),
    "h8_l1024_d128_bf16": (5.7, 5.6, 1.08, 1.9),
    "b8h8_l128_bf16": (2.2, 2.4, 1.25, 5.0),
    "b64h4_l49_bf16": (1.45, 1.5, 1.25, 8.9),
    "b32h12_l128_bf16": (2.2, 2.4, 1.28, 4.2),
}


def amx_requirements() -> list[Requirement]:
    """The figures that the CPU engine must reach on processors with AMX, in bfloat16."""
    figures = [
        (f"{mode} vs {what}", mode, peer)
        for peer, what in (("ours_vectors", "the build avx512_bf16"), ("sdpa_no_bias", "SDPA, no bias"))
        for mode in (FORWARD, BOTH)
    ]
    return [
        Requirement(what, case, _speedup(case, mode, (peer,)), bound)
        for case, bounds in AMX_BOUNDS.items()
        for (what, mode, peer), bound in zip(figures, bounds, strict=True)
    ]


# Least speed of a model over the same model with its own attention, in inference and in training: float32, bfloat16.
MODEL_BOUNDS = {
    "mpnet_b32_l128": (1.15, 1.15),
    "mpnet_b8_l384": (1.5, 1.5),
    "t5_encoder_b32_l128": (1.0, 1.0),
    "t5_encoder_b8_l384": (1.2, 1.2),
    "mpnet_b32_l128_padded": (1.0, 1.0),
    "mpnet_b8_l384_padded": (1.0, 1.0),
    "t5_encoder_b32_l128_padded": (1.0, 1.0),
    "t5_encoder_b8_l384_padded": (1.0, 1.0),
    "swin_t": (1.2, 1.1),
    "swinv2_t_w8": (1.0, 1.0),
    "swinv2_t_w16": (1.0, 1.0),
    "beit_b": (1.2, 1.1),
    "maxvit_t": (1.2, 1.1),
}


def model_requirements() -> list[Requirement]:
    """The figures that whole models must reach, against the faster of their own attentions."""
    return [
        Requirement(f"{mode} vs the model's own attention", name + suffix, _speedup(name + suffix, mode, OWN), bound)
        for name, bounds in MODEL_BOUNDS.items()
        for suffix, bound in zip(("", "_bf16"), bounds, strict=True)
        for mode in (FORWARD, BOTH)
    ]


def has_models(results: pd.DataFrame) -> bool:
    """Whether some results are of whole models."""
    return results.provider.isin(OWN).any()


def has_amx(results: pd.DataFrame) -> bool:
    """Whether all results are of a processor with AMX."""
    return results.device.str.contains(" AMX, ").all()


def print_requirements(results: pd.DataFrame) -> None:
    """Prints required | measured | met for every requirement. Those for AMX are of processors that have it."""
    lines = []
    required = requirements() + (amx_requirements() if has_amx(results) else [])
    for requirement in required + (model_requirements() if has_models(results) else []):
        value = requirement.value(results)
        if requirement.bound is None:
            limit, met = "-", "-"
        else:
            limit = f"{'<=' if requirement.is_upper else '>='} {requirement.bound:g}"
            is_met = value <= requirement.bound if requirement.is_upper else value >= requirement.bound
            met = "not measured" if pd.isna(value) else "yes" if is_met else "NO"
        measured = "-" if pd.isna(value) else f"{value:.2f}"
        lines.append((requirement.what, requirement.case, limit, measured, met))
    table = pd.DataFrame(lines, columns=["figure", "case", "required", "measured", "met"])
    print("\nMust be reached (float32 unless the case says bf16, one thread; ratios of medians)")
    print(table.to_string(index=False))


def print_summary(results: pd.DataFrame) -> None:
    """Prints every quantity of the CSV, with the metrics of a provider side by side."""
    quantities = results[["p50", "p20", "p80", "unit"]].itertuples(index=False)
    results = results.assign(text=[_quantiles(*quantity) for quantity in quantities])
    for device, rows in results.groupby("device", sort=False):
        index = ["case", "mode", "provider"]
        table = rows.pivot(index=index, columns="metric", values="text").fillna("")
        order = rows[index].drop_duplicates()
        table = table.loc[list(order.itertuples(index=False, name=None)), rows["metric"].unique()]
        table.columns = [f"{metric} [{rows.loc[rows.metric == metric, 'unit'].iloc[0]}]" for metric in table.columns]
        print(f"\n{device}: median (20 % .. 80 % of the rounds)")
        print(table.to_string())


def _quantiles(p50: float, p20: float, p80: float, unit: str) -> str:
    digits = 1 if unit in ("ms", "MiB", "GFLOP/s") else 2
    spread = f" ({p20:.{digits}f} .. {p80:.{digits}f})" if p20 != p80 else ""
    return f"{p50:.{digits}f}{spread}"


def median(results: pd.DataFrame, metric: str, case: str, provider: str, mode: str, threads: int = 1) -> float:
    """The median of one quantity, or NaN where the CSV lacks it."""
    end = f", {threads} thread{'s' * (threads > 1)}"
    rows = results[(results.metric == metric) & (results.case == case)]
    rows = rows[(rows.provider == provider) & (rows["mode"] == mode) & rows.device.str.endswith(end)]
    return float(rows.p50.iloc[-1]) if len(rows) else float("nan")


def model_speedup(results: pd.DataFrame, case: str, mode: str, threads: int = 1) -> float:
    """The time of a model with the faster of its own attentions over its time with ours, or NaN."""
    return _speedup(case, mode, OWN, threads)(results)


def _one(metric: str, case: str, provider: str, mode: str) -> Value:
    return lambda results: median(results, metric, case, provider, mode)


def _speedup(case: str, mode: str, peers: tuple[str, ...], threads: int = 1) -> Value:
    def value(results: pd.DataFrame) -> float:
        return pd.Series([median(results, "ratio", case, peer, mode, threads) for peer in peers]).min()

    return value


def _cost(case: str, mode: str) -> Value:
    return lambda results: 1 / median(results, "ratio", case, "ours_ungated", mode)


def _least_thread_speedup(provider: str) -> Value:
    def value(results: pd.DataFrame) -> float:
        rows = results[(results.metric == "thread_speedup") & (results.provider == provider)]
        return rows[rows.device.str.endswith(", 2 threads")].p50.min()

    return value


def _growth(suffix: str) -> Value:
    def value(results: pd.DataFrame) -> float:
        lengths = (2048, 4096, 8192)
        peaks = pd.Series([median(results, "memory", f"h8_l{length}{suffix}", "ours", BOTH) for length in lengths])
        return (peaks / peaks.shift()).max()

    return value


def _memory_ratio(suffix: str) -> Value:
    def value(results: pd.DataFrame) -> float:
        case = f"h8_l4096{suffix}"
        peers = pd.Series([median(results, "memory", case, peer, BOTH) for peer in SDPA_WITH_BIAS])
        return peers.min() / median(results, "memory", case, "ours", BOTH)

    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("csv", type=Path, help="a CSV of `python -m bench`")
    shown = read_results(parser.parse_args().csv)
    print_summary(shown)
    print_requirements(shown)
