"""`python -m triton_offset_bias.info` tells what serves here, and why something does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_offset_bias import features, info
from triton_offset_bias.backends.contract import BACKENDS


def test_every_backend_is_listed_with_what_it_serves() -> None:
    """One section a backend, whether it can serve or not."""
    report = info.report()
    for name, backend in BACKENDS.items():
        assert f"\n{name}: {'cannot serve' if backend.unavailable_reasons() else 'ready'}\n" in report
        assert backend.SERVES in report
        for reason in backend.unavailable_reasons():
            assert reason in report


def test_the_command_says_why_a_build_that_was_asked_for_cannot_serve() -> None:
    """The engine's reason reaches the reader, and the reference is still ready."""
    environment = os.environ | {"TRITON_OFFSET_BIAS_BUILD": "nonesuch"}
    command = [sys.executable, "-m", "triton_offset_bias.info"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "cpp: cannot serve" in printed
    assert "must be one of avx512_bf16, avx512, avx2, portable, got 'nonesuch'" in printed
    assert "reference: ready" in printed


def test_the_documented_table_of_features_is_the_one_that_the_backends_give() -> None:
    """Line by line, docs/backends.md has what `--features` prints."""
    page = (Path(__file__).parents[1] / "docs" / "backends.md").read_text()
    assert features.as_markdown(features.feature_table()) in page


def test_a_feature_that_a_backend_refuses_shows_its_reason(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Backend by backend, for that feature alone."""
    cpp = BACKENDS["cpp"]
    before = features.feature_table()
    monkeypatch.setattr(cpp, "problem_reasons", lambda problem: ["is out of ink"] if problem.dropout_p else [])
    info.main(["--features"])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("| `dropout_p`")]
    assert line == "| `dropout_p` | no: is out of ink | yes | yes |"
    assert len(printed.splitlines()) == len(before) + 1
