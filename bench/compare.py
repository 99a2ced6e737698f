"""``python -m bench.compare OLD.csv NEW.csv`` prints the ratios of times between two runs on the same machine."""

import argparse
from pathlib import Path

import pandas as pd

from bench.report import read_results

KEY = ["case", "provider", "mode", "device"]


def main(arguments: list[str] | None = None) -> None:
    """Prints the ratios of the times, new over old. Fails if one of this package's is above the tolerance."""
    parser = argparse.ArgumentParser("python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="CSV of the earlier run")
    parser.add_argument("new", type=Path, help="CSV of the later run")
    parser.add_argument("--tolerance", type=float, default=1.1, help="largest ratio of ours that passes (default 1.1)")
    options = parser.parse_args(arguments)
    table = ratios(read_results(options.old), read_results(options.new))
    print(table.to_string(index=False))
    slower = table[table.provider.str.startswith("ours") & (table["new/old"] > options.tolerance)]
    if len(slower):
        raise SystemExit(f"\nslower than {options.tolerance:g} times the old:\n{slower.to_string(index=False)}")


def ratios(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The median times that both runs have measured, and their ratio, new over old."""
    times = [rows[rows.metric == "time"][[*KEY, "p50"]] for rows in (old, new)]
    both = times[0].merge(times[1], on=KEY, suffixes=("_old", "_new"))
    if both.empty:
        raise SystemExit("the two runs have no case, provider, mode and device in common")
    return both.assign(**{"new/old": (both.p50_new / both.p50_old).round(3)})


if __name__ == "__main__":
    main()
