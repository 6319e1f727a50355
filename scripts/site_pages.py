"""A hook of mkdocs: the checkout's README, CONTRIBUTING and CHANGELOG are pages of the site too, kept in one place.

Their links lead from the checkout's root to ``docs/``, and those of pages in ``docs/`` up to them; on the site all are
side by side.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File in the checkout's root: page of the site."""


def on_files(files: Any, config: Any) -> Any:
    """Add the root's files to those of ``docs/``."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links as they stand in the checkout to the pages of the site."""
    if page.file.src_uri in PAGES.values():
        for name, target in PAGES.items():
            markdown = markdown.replace(f"]({name}", f"]({target}")
        return markdown.replace("](docs/", "](")
    for name, target in PAGES.items():
        markdown = re.sub(rf"\]\(\.\./((?:\.\./)*){re.escape(name)}", rf"](\1{target}", markdown)
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name code as Python's own documentation does, ``:meth:`name` ``: here the name alone is shown."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)
