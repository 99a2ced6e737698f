"""Writes the repository's address into what a release shows: the links of README.md, and the URLs of the project.

The index of packages shows README.md without the repository around it, so that links to files need an address. The
release workflow runs this on its own checkout before it builds, because it knows the address:

    python tools/addresses.py https://github.com/OWNER/NAME v0.1.0
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
URLS = """
[project.urls]
Homepage = "{repository}"
Documentation = "{repository}/tree/{version}/docs"
Changelog = "{repository}/blob/{version}/CHANGELOG.md"
Issues = "{repository}/issues"
"""


def with_addresses(page: str, repository: str, version: str) -> str:
    """The Markdown `page` with absolute links to the files of one version.

    Args:
        page: Markdown, whose relative links begin at the repository's root.
        repository: address of the repository, such as "https://github.com/OWNER/NAME".
        version: tag, branch or commit.
    """

    def absolute(link: re.Match[str]) -> str:
        is_image, text, target = link.groups()
        if target.startswith(("https://", "#")):
            return link[0]
        return f"{is_image}[{text}]({repository}/{'raw' if is_image else 'blob'}/{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, page)


def write_addresses(root: Path, repository: str, version: str) -> None:
    """Writes the addresses into README.md and pyproject.toml of the checkout `root`.

    Raises:
        ValueError: they have addresses already.
    """
    readme, project = root / "README.md", root / "pyproject.toml"
    if "[project.urls]" in project.read_text():
        raise ValueError(f"`root` must be a checkout without addresses, got one with [project.urls] in {project}")
    readme.write_text(with_addresses(readme.read_text(), repository, version))
    project.write_text(project.read_text() + URLS.format(repository=repository, version=version))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="its address, such as https://github.com/OWNER/NAME")
    parser.add_argument("version", help="tag, branch or commit that links lead to, such as v0.1.0")
    arguments = parser.parse_args()
    write_addresses(ROOT, arguments.repository, arguments.version)
