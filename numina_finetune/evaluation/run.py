"""A whole evaluation: batch by batch, each recorded before the next, then the figures and the reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from numina_finetune.evaluation.page import html_report, markdown_report
from numina_finetune.evaluation.results import REPORTS
from numina_finetune.evaluation.scoring import Record, figures, grade, measured_styles
from numina_finetune.evaluation.solving import Solve
from numina_finetune.evaluation.tasks import Problem, Problems


def run_batches(
    asked: Problems,
    solve: Solve,
    *,
    done: Sequence[Record] = (),
    record: Callable[[Sequence[Record]], None] = lambda graded: None,
    samples: int,
    rows: int,
    stop: Callable[[], bool],
) -> list[Record] | None:
    """Solve what is not done yet.

    All attempts at a problem are made in one batch. What is drawn at random depends on the seed and the prompt alone,
    so that it is all the same what stands beside it in a batch, and where an earlier life was cut. Collective.

    Args:
        done: records of earlier lives, the same on every process.
        record: keeps the records of one batch.
        samples: attempts at each problem.
        rows: attempts that are generated together, at least one problem's.
        stop: whether to end before the next batch, the same on every process.

    Returns:
        All records, in the problems' order; None if it was to stop before.
    """
    records = {one.problem.id: one for one in done}
    styles = measured_styles(asked.style)
    missing = [problem for problem in asked.problems if problem.id not in records]
    for batch in _batches(missing, max(1, rows // samples)):
        if stop():
            return None
        attempts = iter(solve([problem for problem in batch for _ in range(samples)]))
        graded = [grade(problem, list(islice(attempts, samples)), styles) for problem in batch]
        record(graded)
        records |= {one.problem.id: one for one in graded}
    return [records[problem.id] for problem in asked.problems]


def progress_line(records: Sequence[Record], asked: Problems) -> str:
    """How far an evaluation is."""
    share = float(np.mean([one.share(asked.style) for one in records]))
    return f"  {len(records)}/{len(asked.problems)} problems, {share:.1%} of them right"


def summarise(asked: Problems, records: Sequence[Record], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``summary.json`` says."""
    attempts = [one.attempt for record in records for one in record.graded]
    lengths = [attempt.tokens for attempt in attempts]
    calls = Counter(outcome for attempt in attempts for outcome in attempt.rounds)
    return {
        "task": asked.task,
        "headline": asked.style,
        "figures": {style: asdict(figures(records, style)) for style in measured_styles(asked.style)},
        "left_out": asked.left_out,
        "tokens": {"mean": float(np.mean(lengths)), "median": float(np.median(lengths)), "most": max(lengths)},
        "stopped": dict(Counter(attempt.stopped for attempt in attempts)),
        **({"calls": dict(calls)} if calls else {}),
        "settings": dict(settings),
    }


def reports(summary: Mapping[str, Any], records: Sequence[Record]) -> dict[str, str]:
    """The pages for people, by file name."""
    texts = (markdown_report(summary, records), html_report(summary, records))
    return dict(zip(REPORTS, texts, strict=True))


def _batches(problems: Sequence[Problem], size: int) -> Iterator[list[Problem]]:
    """Problems of similar length together, so that little is padded."""
    ordered = sorted(problems, key=lambda problem: len(problem.question))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
