"""The notebooks of the documentation run, in a short form, and hold no outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bare import skip_without

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SHORT = {"steps = 300": "steps = 3", "epochs = 6": "epochs = 1"}
pytestmark = [pytest.mark.cpu_only, skip_without("matplotlib", "sklearn")]


def _cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Its cells run in order, with fewer steps of training, and its assertions hold."""
    cells = ["".join(cell["source"]) for cell in _cells(notebook)]
    program = "\n\n".join(SHORT.get(cell, cell) for cell in cells)
    assert any(short in program for short in SHORT.values())
    environment = os.environ | {"MPLBACKEND": "agg", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_notebooks_hold_no_outputs() -> None:
    """There is one each for text, vision and time series."""
    assert [path.stem for path in NOTEBOOKS] == ["series", "text", "vision"]
    for notebook in NOTEBOOKS:
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in _cells(notebook))
