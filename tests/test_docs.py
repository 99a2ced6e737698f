"""The pages' statements about the repository hold: paths, links, targets of make, environment variables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "triton_offset_bias"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "csrc_ref" / "README.md"]
SOURCES = [
    path
    for folder in ("triton_offset_bias", "tests", "tools", "bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
]
ENDINGS = (".py", ".h", ".cpp", ".md", ".csv", ".yml", ".yaml", ".cff", ".toml", ".txt", ".png")
MADE = ("bench/out/",)  # folders that commands write
by_name = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def _without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _is_path(word: str) -> bool:
    """Whether a word in backticks names one of the repository's files or folders."""
    if not re.fullmatch(r"[\w./-]+", word) or re.search(r"\b[A-Z]{3,}\b", word.removesuffix(".md")):
        return word in ("CONTRIBUTING.md", "CHANGELOG.md", "README.md", "SECURITY.md")
    return word.endswith(ENDINGS) or (word.endswith("/") and not word.startswith("/"))


def _missing_paths(page: Path) -> list[str]:
    """The paths that the page names which are neither in the root, nor in the package, nor beside the page."""
    words = {word for word in re.findall(r"`([^`\n]+)`", _without_blocks(page)) if _is_path(word)}
    folders = (ROOT, PACKAGE, page.parent)
    return sorted(
        word for word in words if not word.startswith(MADE) and not any((folder / word).exists() for folder in folders)
    )


@by_name
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """Paths in backticks begin at the root, in the package, or beside the page."""
    if page.name != "CHANGELOG.md":  # it also names files of the past
        assert _missing_paths(page) == []


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """A link leads to a file of the repository, and to its heading if the link names one; other sites are not asked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_blocks(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page if not name else page.parent / name
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target


@by_name
def test_every_make_command_of_a_page_has_a_target(page: Path) -> None:
    """The commands are in backticks, with or without options."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= targets


def test_the_table_of_environment_variables_is_complete() -> None:
    """CONTRIBUTING.md lists every variable that the repository's Python code asks for, and none that nobody reads."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE)
    listed = {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    text = "\n".join(path.read_text() for path in SOURCES if path != Path(__file__))
    read = set(re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\s*\"([A-Z_]+)\"", text))
    read |= set(re.findall(r"^\w+_VARIABLE = \"(\w+)\"", text, re.MULTILINE))
    assert read - {"PYTHONPATH"} <= listed
    makefile = (ROOT / "Makefile").read_text()
    assert [
        name for name in listed if name not in text and not re.search(rf"^{name} \?=", makefile, re.MULTILINE)
    ] == []


def test_the_readme_is_short() -> None:
    """A newcomer reads it in one go."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_citation_has_the_packages_version() -> None:
    """CITATION.cff is written by hand."""
    import triton_offset_bias

    assert f"\nversion: {triton_offset_bias.__version__}\n" in (ROOT / "CITATION.cff").read_text()
