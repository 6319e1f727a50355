"""The pages as a whole: every link leads somewhere, every page can be found, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.conftest import ROOT
from tests.docs.pages import DOCS, anchors, links, pages

ids = {"ids": lambda page: str(page.relative_to(ROOT))}


@pytest.mark.parametrize("page", pages(), **ids)
def test_every_link_leads_to_a_page_and_a_heading_of_it(page: Path) -> None:
    lost = []
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", pages(), **ids)
def test_links_to_elsewhere_are_whole_addresses(page: Path) -> None:
    for link in links(page):
        if re.match(r"\w+:", link):
            parts = urlsplit(link)
            assert parts.scheme == "https" and "." in parts.netloc, link


def test_every_page_is_in_the_sites_menu_and_in_no_other_place() -> None:
    listed = list(_leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    generated = {"index.md", "contributing.md", "changelog.md"}
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(written | generated)


def _leaves(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in _leaves(child)]


def test_readme_leads_to_every_page_of_docs() -> None:
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    pages_of_docs = {str(page.relative_to(ROOT)) for page in DOCS.glob("*.md")}
    assert pages_of_docs - linked == set()


def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "spot.html", "reference/data.html", "contributing.html"):
        html = (tmp_path / page).read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', html)
        assert [address for pair in loaded for address in pair if address.startswith(("http", "//"))] == [], page
        assert re.search(r":(?:meth|mod|class|func):", html) is None, page
