"""An evaluation, or a comparison of two, as a page that a person reads: Markdown and self-contained HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from numina_finetune.evaluation.compare import Comparison
from numina_finetune.evaluation.scoring import Record

MOST_SHOWN = 500
"""Problems shown of those that failed, and of those that did not; the others stand in ``problems.jsonl``."""
_BARS = 20
_SHOWN_TEXT = 600
"""Characters of a text in Markdown."""


def markdown_report(summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """``report.md``: the figures, and the first failures."""
    return _render("report.md.j2", **_facts(summary, records, most=20), shorten=_shorten)


def html_report(summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """``report.html``: figures, lengths, and the problems, failed ones first."""
    return _render("report.html.j2", **_facts(summary, records, most=MOST_SHOWN), bars=length_bars(records))


def markdown_comparison(comparison: Comparison) -> str:
    """``comparison.md``: the figures, and every problem that changed."""
    return _render("comparison.md.j2", **vars(comparison), shorten=_shorten)


def html_comparison(comparison: Comparison) -> str:
    """``comparison.html``: the same, answers side by side."""
    return _render("comparison.html.j2", **vars(comparison))


def length_bars(records: Sequence[Record]) -> list[dict[str, int]]:
    """How many attempts have a length from ``first`` to ``last`` tokens, and how many of them were cut."""
    attempts = [one.attempt for record in records for one in record.graded]
    width = max((attempt.tokens for attempt in attempts), default=0) // _BARS + 1
    bars = [{"first": place * width, "last": (place + 1) * width - 1, "count": 0, "cut": 0} for place in range(_BARS)]
    for attempt in attempts:
        bars[attempt.tokens // width]["count"] += 1
        bars[attempt.tokens // width]["cut"] += attempt.stopped == "length"
    return bars


def _facts(summary: Mapping[str, Any], records: Sequence[Record], most: int) -> dict[str, Any]:
    style = summary["headline"]
    failed = [record for record in records if record.share(style) < 1]
    solved = [record for record in records if record.share(style) == 1]
    return {
        "summary": summary,
        "style": style,
        "failed": failed[:most],
        "failed_count": len(failed),
        "solved": solved[:most],
        "solved_count": len(solved),
    }


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]} …"


def _render(name: str, **facts: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**facts)
