"""`python -m triton_offset_bias.info` tells which backends serve here, and why others do not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_offset_bias import info, offset_bias_attention
from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.checks.tensors import FLOAT_DTYPES


def test_every_backend_is_listed_with_what_it_serves() -> None:
    """Each backend has one section, whether it can serve or not."""
    report = info.report()
    for name, backend in BACKENDS.items():
        assert f"\n{name}: {'cannot serve' if backend.unavailable_reasons() else 'ready'}\n" in report
        assert backend.PROPERTIES["serves"] in report
        for reason in backend.unavailable_reasons():
            assert reason in report


def test_the_command_says_why_a_build_that_was_asked_for_cannot_serve() -> None:
    """The command prints the engine's reason. The reference is still ready."""
    environment = os.environ | {"TRITON_OFFSET_BIAS_BUILD": "nonesuch"}
    command = [sys.executable, "-m", "triton_offset_bias.info"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "cpp: cannot serve" in printed
    assert "must be one of amx, avx512_bf16, avx512, avx2, portable, got 'nonesuch'" in printed
    assert "reference: ready" in printed


def test_the_documented_table_of_features_is_the_one_that_the_command_prints(capsys) -> None:
    """docs/backends.md has every line that `--features` prints."""
    info.main(["--features"])
    assert capsys.readouterr().out in (Path(__file__).parents[1] / "docs" / "backends.md").read_text()


def _reasons(backend: str, dtype: torch.dtype = torch.float16, head_dim: int = 8) -> set[str]:
    x = torch.zeros(1, 1, 2, head_dim, dtype=dtype)
    try:
        offset_bias_attention(x, x, x, None, backend=backend)
    except NotImplementedError as error:
        return set(str(error).split("; "))
    return set()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_serves_the_dtypes_and_head_dims_that_it_names_and_no_others(backend: str) -> None:
    """Reasons against a small call in float16 do not count, because the backend may not be available here."""
    serves = BACKENDS[backend].PROPERTIES["serves"]
    usual = _reasons(backend)
    for dtype in FLOAT_DTYPES:
        is_named = str(dtype).removeprefix("torch.") in re.findall(r"\w+", serves)
        assert is_named == (_reasons(backend, dtype=dtype) <= usual), dtype
    assert _reasons(backend, head_dim=256) <= usual
    assert ("head dims 1 to 256" in serves) == (not _reasons(backend, head_dim=257) <= usual)
