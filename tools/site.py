"""Hooks of MkDocs (`mkdocs.yml`) that make one site of the pages in `docs/`, the pages in the root, and the notebooks.

Pages are written for readers of the repository. Their links to files that are no pages of the site lead to the
repository, if `SITE_REPOSITORY` has the address of a version of it, such as https://github.com/OWNER/NAME/blob/main.
Otherwise only their text is left.
"""

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ADDED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/results/gpu_static.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds files of the root, and a page for each notebook."""
    for name in ADDED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = posixpath.splitext(notebook.src_uri)[0]
        content = markdown_of(Path(str(notebook.abs_src_path)).read_text(), posixpath.basename(notebook.src_uri))
        files.append(File.generated(config, f"{name}.md", content=content))
    return files


def markdown_of(notebook: str, name: str) -> str:
    """The page of a notebook, with a link to it after the first cell."""
    cells = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        cells.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    cells.insert(1, f"[Download the notebook]({name})")
    return "\n\n".join(cells) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page that begin at its place in the repository."""
    source = page.file.src_uri if page.file.src_uri in ADDED else f"docs/{page.file.src_uri}"
    known = {file.src_uri for file in files}

    def turned(link: re.Match[str]) -> str:
        is_image, text, target, anchor = link.groups()
        if re.match(r"\w+:", target) or not target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = path.removeprefix("docs/")
        if uri in known:
            here = posixpath.dirname(page.file.src_uri) or "."
            return f"{is_image}[{text}]({posixpath.relpath(uri, here)}{anchor})"
        if not (ROOT / path).exists():
            return link[0]  # MkDocs says that it leads nowhere
        repository = os.environ.get("SITE_REPOSITORY")
        return f"[{text}]({repository}/{path}{anchor})" if repository else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s#]*)((?:#[^)\s]*)?)\)", turned, markdown)
