"""What the project declares is what it imports and tries; what a release shows has absolute addresses."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from addresses import with_addresses, write_addresses  # noqa: E402

PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = ROOT / ".github" / "workflows"
REPOSITORY, VERSION = "https://example.org/owner/name", "v1.2.3"
pytestmark = pytest.mark.cpu_only


def _listed(name: str, text: str = PROJECT) -> list[str]:
    """The strings of a list in TOML or YAML, by the name before it."""
    found = re.search(rf"^ *{name}(?: =|:) \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return re.findall(r"\"([^\"]+)\"", found[1])


def _oldest(requirements: list[str]) -> dict[str, str]:
    """The lower bound of every requirement, or "" if it has none."""
    bounds = (re.match(r"([\w-]+)(?:>=([\d.]+))?", requirement) for requirement in requirements)
    return {bound[1]: bound[2] or "" for bound in bounds if bound}


def _imported(path: Path) -> set[str]:
    """The packages that a module imports without a `try`, or inside of a function."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_the_dependencies_are_what_the_package_imports() -> None:
    """The GPU kernels and the integrations are imported where Triton, or the other library, is there."""
    package = ROOT / "triton_offset_bias"
    optional = {package / "backends" / "triton", *(package / "integrations").iterdir()}
    modules = [path for path in package.rglob("*.py") if not optional & {path, *path.parents}]
    imported = set.union(*map(_imported, modules)) - {"triton_offset_bias"}
    assert imported - {"typing_extensions"} == set(_oldest(_listed("dependencies")))  # torch depends on the latter
    assert set.union(*map(_imported, (package / "backends" / "triton").rglob("*.py"))) >= {"triton"}


def test_every_extra_has_a_lower_bound_that_is_tried() -> None:
    """The bounds of users' extras are versions that a make target, or the pinned environment, installs."""
    tried = (ROOT / "Makefile").read_text() + (ROOT / "constraints.txt").read_text()
    for extra in ("transformers", "timm", "x-transformers"):
        ((name, oldest),) = _oldest(_listed(extra)).items()
        assert re.search(rf"\b{name}==?{re.escape(oldest)}(\.0)?\b", tried), (name, oldest)


def test_the_ci_tries_every_declared_python_on_the_oldest_torch() -> None:
    """The matrix has the classifiers' Pythons, and begins with the torch that is the lower bound."""
    matrix = (WORKFLOWS / "ci.yml").read_text()
    declared = re.findall(r"Python :: (3\.\d+)\"", PROJECT)
    assert _listed("python", matrix) == declared
    assert f'requires-python = ">={declared[0]}"' in PROJECT
    assert _listed("torch", matrix)[0] == _oldest(_listed("dependencies"))["torch"] + ".0"


def test_a_release_shows_links_and_images_with_addresses(tmp_path: Path) -> None:
    """Each relative link of the README leads to the same file as before, at the version's address."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    relative = re.findall(r"\]\((?!https://|#)([^)#\s]+)", (ROOT / "README.md").read_text())
    write_addresses(tmp_path, REPOSITORY, VERSION)
    page = (tmp_path / "README.md").read_text()
    assert not re.findall(r"\]\((?!https://)", page)
    absolute = re.findall(rf"\]\({REPOSITORY}/(?:raw|blob)/{VERSION}/([^)#\s]+)", page)
    assert absolute == relative != []
    assert all((ROOT / path).exists() for path in absolute)
    assert "![The bias" in page
    assert f"({REPOSITORY}/raw/{VERSION}/docs/images/demo.png)" in page
    assert f'Issues = "{REPOSITORY}/issues"' in (tmp_path / "pyproject.toml").read_text()
    with pytest.raises(ValueError, match="`root` must be a checkout without addresses"):
        write_addresses(tmp_path, REPOSITORY, VERSION)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("[a](docs/a.md#b)", f"[a]({REPOSITORY}/blob/{VERSION}/docs/a.md#b)"),
        ("![a](b.png)", f"![a]({REPOSITORY}/raw/{VERSION}/b.png)"),
        ("[a](https://b.c)", "[a](https://b.c)"),
        ("[a](#b)", "[a](#b)"),
    ],
)
def test_each_kind_of_link(page: str, expected: str) -> None:
    """Links to files become absolute; links to other sites and within the page stay."""
    assert with_addresses(page, REPOSITORY, VERSION) == expected
