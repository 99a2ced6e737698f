"""The page of a report: what its parts have left in a folder so far, as Markdown."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cases import BACKWARD, FORWARD
from bench.gpu_report.correctness import read_results
from bench.gpu_report.flow import Outcome
from bench.providers import PROVIDERS

Rows = list[dict[str, str]]
MOST_FAILURES = 20


def write_page(folder: Path, device: str, outcomes: Sequence[Outcome]) -> None:
    """Writes report.md."""
    speed, experiments, search = (read_rows(folder / f"{name}.csv") for name in ("speed", "experiments", "search"))
    sections = [
        f"# {device}",
        _fenced(_lines(folder / "first.txt")),
        _table(
            ("part", "what it shows", "how it ended", "seconds"),
            [(x.part.name, x.part.about, x.state, f"{x.seconds:.0f}") for x in outcomes],
        ),
        *_titled("Tests", _tests(folder)),
        *_titled("TFLOP/s, forward / backward", _rates(speed)),
        *_titled("Short calls, forward and backward, in milliseconds", _short_calls(speed)),
        *_titled("Block sizes", _block_sizes(search)),
        *_titled("Kernels behind a switch: TFLOP/s, forward / backward", _rates(experiments)),
        *_titled("compute-sanitizer", _fenced(_sanitizers(folder))),
        *_titled("What is absent, and why", _fenced(_absent(folder))),
    ]
    if (folder / "speed_gpu.png").exists():
        sections.append("![Rates over the length](speed_gpu.png)")
    (folder / "report.md").write_text("\n\n".join(section for section in sections if section) + "\n")


def read_rows(path: Path) -> Rows:
    """The rows of a CSV; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _titled(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [" | ".join(line) for line in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {row} |" for row in rows)


def _fenced(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```"]) if lines else ""


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _tests(folder: Path) -> str:
    counts, failures = read_results(folder / "tests.tsv")
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    return "\n\n".join(filter(None, [counted, _fenced(failures[:MOST_FAILURES])]))


def _rates(rows: Rows) -> str:
    """A line for each case and a column for each provider."""
    rates = {(x["case"], x["provider"], x["mode"]): float(x["p50"]) for x in rows if x["metric"] == "throughput"}
    cases, names = (list(dict.fromkeys(key[i] for key in rates)) for i in (0, 1))

    def cell(case: str, name: str) -> str:
        values = [rates.get((case, name, mode)) for mode in (FORWARD, BACKWARD)]
        return "" if values == [None, None] else " / ".join("-" if x is None else f"{x:.0f}" for x in values)

    lines = [(case, *(cell(case, name) for name in names)) for case in cases]
    return _table(("case", *(PROVIDERS[name].label for name in names)), lines) if rates else ""


def _short_calls(rows: Rows) -> str:
    chosen = [row for row in rows if row["metric"] in ("call", "replay")]
    how = {"call": "called", "replay": "replayed from a CUDA graph"}
    lines = [(row["case"], PROVIDERS[row["provider"]].label, how[row["metric"]], row["p50"]) for row in chosen]
    return _table(("case", "provider", "how", "ms"), lines) if lines else ""


def _block_sizes(rows: Rows) -> str:
    """The fastest candidate of each kernel and head dim beside the one that ships."""
    lines = []
    for key in dict.fromkeys((row["kernel"], row["D"]) for row in rows):
        timed = [row for row in rows if (row["kernel"], row["D"]) == key and row["ms"] != "no room"]
        best = min(timed, key=lambda row: float(row["ms"]), default=None)
        ships = next((row for row in timed if row["ships"] == "True"), None)
        lines.append((*key, _described(best), _described(ships), str(len(timed))))
    return _table(("kernel", "D", "fastest", "ships", "candidates with room"), lines) if lines else ""


def _described(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    return f"{row['block_m']}x{row['block_n']}, {row['warps']} warps, {row['stages']} stages: {row['ms']} ms"


def _sanitizers(folder: Path) -> list[str]:
    lines = [f"{tool}: {line}" for tool in ("memcheck", "racecheck") for line in _lines(folder / f"{tool}.txt")]
    return [line for line in lines if re.search(r"SUMMARY|=========\s+(Invalid|Error|Race|Warning)", line)]


def _absent(folder: Path) -> list[str]:
    lines = [line for name in ("speed", "experiments") for line in _lines(folder / f"{name}.txt")]
    return list(dict.fromkeys(line for line in lines if " is absent" in line or " is WRONG" in line))
