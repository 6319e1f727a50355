"""The documentation's Markdown, taken apart: fenced blocks, shell commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_SEPARATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, as words, without what stands before it (variables, ``exec``)."""

    block: Block
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.block.name} {shlex.join(self.words[:4])}"


@cache
def pages() -> tuple[Path, ...]:
    """Every page: the three of the checkout's root, and all of ``docs/``."""
    root = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return (*root, *sorted(DOCS.rglob("*.md")))


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of all pages in these languages."""
    found = []
    for page in pages():
        for match in _FENCE.finditer(text_of(page)):
            if _language(match) in languages:
                line = text_of(page).count("\n", 0, match.start()) + 1
                lines = (each.removeprefix(match["indent"]) for each in match["text"].splitlines())
                found.append(Block(page, line, _language(match), "\n".join(lines) + "\n"))
    return found


def _language(match: re.Match[str]) -> str:
    """As the block says it; one that says none is for a shell if a program's name stands at its beginning."""
    shell = re.match(r"\s*([A-Z_]+=\S+ )*(numina-finetune|python|accelerate|torchrun|gcloud|pip)\b", match["text"])
    return match["language"] or ("bash" if shell else "text")


def languages() -> set[str]:
    return {_language(match) for page in pages() for match in _FENCE.finditer(text_of(page))}


def commands() -> list[Command]:
    """Every command of the ``bash`` blocks, and what is typed in the ``console`` ones."""
    found = []
    for block in blocks("bash", "console"):
        for words in split_commands(typed(block)):
            found.append(Command(block, words))
    return found


def typed(block: Block) -> str:
    """What a reader would type: all of a ``bash`` block, of a ``console`` block what stands behind ``$``."""
    if block.language == "bash":
        return block.text
    joined = block.text.replace("\\\n", " ")
    return "".join(f"{line[2:]}\n" for line in joined.splitlines() if line.startswith("$ "))


def split_commands(script: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a script without control structures."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if word in _SEPARATORS:
                if command := _bare(words):
                    yield command
                words = []
            elif redirected or word in ("<", ">", ">>"):
                redirected = not redirected
            else:
                words.append(word)


def _bare(words: list[str]) -> tuple[str, ...]:
    while words and (re.match(r"[A-Za-z_]+=", words[0]) or words[0] in ("exec", "nohup", "time")):
        words = words[1:]
    return tuple(words)


def links(page: Path) -> list[str]:
    """The targets of the page's links and pictures, those in code left out."""
    return [match["target"] for match in _LINK.finditer(re.sub(r"`[^`\n]*`", "", prose_of(page)))]


@cache
def anchors(page: Path) -> frozenset[str]:
    """What its headings can be linked by, where GitHub and the site agree."""
    toc = pytest.importorskip("markdown.extensions.toc")
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        on_github = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        if toc.slugify(plain, "-") == on_github:
            found.add(on_github)
    return frozenset(found)
