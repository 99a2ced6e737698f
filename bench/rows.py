"""The results: one schema of rows, read from and written to a CSV."""

import csv
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import Case

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One quantity of one provider: quantiles over the rounds, the shape, and where it was measured."""

    case: str
    provider: str
    mode: str
    metric: str
    unit: str
    p50: float
    p20: float
    p80: float
    B: int
    H: int
    M: int
    N: int
    D: int
    dtype: str
    causal: bool
    device: str
    torch: str
    triton: str
    commit: str
    date: str


# What /proc/cpuinfo calls instructions that multiply bfloat16 numbers; other processors are named as torch names them.
CAPABILITIES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}
FIELDS = tuple(field.name for field in fields(Row))


class RowMaker:
    """Makes rows that share the machine, the versions and the date of this run."""

    def __init__(self, device: str) -> None:
        """Asks for the machine, the versions and the date. `device` is a torch device."""
        self._is_cpu = device == "cpu"
        self._device = f"{device} {_processor()}" if device == "cpu" else torch.cuda.get_device_name(device)
        self._origin = {
            "torch": torch.__version__,
            "triton": _version("triton"),
            "commit": _commit(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def make(
        self, case: Case, provider: str, mode: str, metric: str, unit: str, values: np.ndarray, threads: int
    ) -> Row:
        """The row of a quantity from its value in every round."""
        p20, p50, p80 = (float(f"{x:.5g}") for x in np.quantile(values, [0.2, 0.5, 0.8]))
        return Row(
            case=case.name,
            provider=provider,
            mode=mode,
            metric=metric,
            unit=unit,
            p50=p50,
            p20=p20,
            p80=p80,
            B=case.batch,
            H=case.heads,
            M=case.queries,
            N=case.length,
            D=case.head_dim,
            dtype=case.dtype,
            causal=case.is_causal,
            device=f"{self._device}, {threads} thread{'s' * (threads > 1)}" if self._is_cpu else self._device,
            **self._origin,
        )


def write_rows(path: Path, rows: list[Row], keep_others: bool) -> None:
    """Writes the CSV, if there are rows. With `keep_others`, its rows that were not measured again stay.

    The file is replaced whole, so that a process which is killed leaves either the old file or the new one.
    """
    if not rows:
        return
    written = [asdict(row) for row in rows]
    if keep_others and path.exists():
        measured = {_key(row) for row in written}
        with path.open(newline="") as file:
            written = [row for row in csv.DictReader(file) if _key(row) not in measured] + written
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(written)
    unfinished.replace(path)


def append_rows(path: Path, rows: list[Row]) -> None:
    """Appends to the CSV at once, so that an error later on leaves these rows."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerows(map(asdict, rows))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    """The values of a row that a later measurement of the same quantity shares."""
    return tuple(row[field] for field in ("case", "provider", "mode", "metric", "device"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = next((name for flag, name in CAPABILITIES.items() if flag in flags), None)
    return f"{names[0] if names else platform.machine()} {known or torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
