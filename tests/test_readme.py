"""Every code block of the README and of the docs runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from bare import skip_without
from conftest import AVAILABLE

from triton_offset_bias import dispatch

ROOT = Path(__file__).parents[1]
NEEDS_FUSED = pytest.mark.skipif(AVAILABLE == ["reference"], reason="no fused backend is available here")
# Its example loads this model from the Hub. tests/integrations/test_sentence_transformers.py runs it with a small one.
DOWNLOADED = "all-mpnet-base-v2"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(language: str) -> list:
    """Every fenced block of the language in the pages, with a readable id."""
    found = []
    for page in PAGES:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if DOWNLOADED in match.group(1):
                continue
            line = page.read_text()[: match.start()].count("\n") + 1
            libraries = re.findall(r"^(?:from|import) (\w+)", match.group(1), re.MULTILINE)
            libraries += ["matplotlib"] if "plot_bias" in match.group(1) else []
            marks = [skip_without(*libraries), *([NEEDS_FUSED] if "fused backends" in match.group(1) else [])]
            found.append(pytest.param(match.group(1), id=f"{page.name}:{line}", marks=marks))
    return found


@pytest.mark.parametrize("code", code_blocks("python"))
def test_a_python_block_runs_and_its_assertions_hold(monkeypatch, code: str) -> None:
    """Each block is a complete program, and asserts what it claims. Nothing was warned of before."""
    monkeypatch.setattr(dispatch, "_shown", set())
    exec(compile(code, "<readme>", "exec"), {"__name__": "__readme__"})


@pytest.mark.parametrize("code", code_blocks("sh"))
def test_a_shell_block_names_commands_that_exist(code: str) -> None:
    """`make` lines are dry-run, because they would start this test again. Other lines are run."""
    for line in code.splitlines():
        command = line.split("#")[0].split()
        if command[0] == "make":
            command.insert(1, "--dry-run")
        elif command[0] == "python":
            command[0] = sys.executable
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stderr}"


def test_every_block_has_a_language_that_is_tested() -> None:
    """A block in another language would escape the tests above."""
    for page in PAGES:
        languages = re.findall(r"^```(\w*)\n(?:.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        assert set(languages) <= {"python", "sh", "text"}, page.name
    assert code_blocks("python")
    assert code_blocks("sh")


@skip_without("pandas")
def test_the_numbers_are_those_of_the_results() -> None:
    """`python -m bench.readme` prints what README.md and docs/speed.md have to say, for every measured processor."""
    from bench.readme import paragraphs, published, worth
    from bench.report import read_results

    results = [read_results(path) for path in published()]
    assert len(results) >= 2
    assert worth(results) in (ROOT / "README.md").read_text()
    assert paragraphs(results) in (ROOT / "docs/speed.md").read_text()
