"""What ``metrics.jsonl`` says: the steps that count, evaluations, checkpoints, and the work that was lost.

One object a line; each has the optimizer ``step`` after which it was written and the number of the ``life`` that wrote
it. Besides, a step has ``loss`` and its figures, one that stood out ``spike`` in a record of its own, an evaluation
``eval_…``, a saved checkpoint ``checkpoint``, and the start of a life that makes steps again ``lost``: for an earlier
life how many, how long they took, and when they ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """The records by kind, each kind in the order of its steps."""

    steps: Sequence[Record] = ()
    """Those that count: a step made again counts for the life that made it last."""
    evaluations: Sequence[Record] = ()
    """Of each evaluated step the last one."""
    spikes: Sequence[Record] = ()
    """Beside the records of the same steps: what was usual then, and which rows the step took."""
    checkpoints: Sequence[Record] = ()
    lost: Sequence[Record] = ()
    torn: int = 0
    """Lines that are no record, such as one cut off by a kill."""


def parse_metrics(text: str) -> Metrics:
    """Read the content of ``metrics.jsonl``, which may be growing."""
    steps: dict[int, Record] = {}
    evaluations: dict[int, Record] = {}
    spikes: dict[int, Record] = {}
    checkpoints: list[Record] = []
    lost: list[Record] = []
    torn = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            torn += 1
            continue
        if record.get("loss") is not None:
            steps[step] = record
        elif is_evaluation(record):
            evaluations[step] = {**evaluations.get(step, {}), **record}
        elif "spike" in record:
            spikes[step] = record
        elif "checkpoint" in record:
            checkpoints.append(record)
        elif "lost" in record:
            lost.append(record)
    return Metrics(
        [steps[step] for step in sorted(steps)],
        [evaluations[step] for step in sorted(evaluations)],
        [spikes[step] for step in sorted(spikes)],
        sorted(checkpoints, key=lambda record: int(record["step"])),
        lost,
        torn,
    )


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether it says what an evaluation found."""
    return any(name.startswith("eval_") for name in record)


def life_of(record: Mapping[str, Any]) -> int:
    """The number of the life that wrote the record."""
    return int(record.get("life", 1))


def productive_seconds(step_seconds: Sequence[float]) -> float:
    """What one life's steps would have taken without compiling and other hiccups: their number times the median.

    Args:
        step_seconds: one figure for each step; the first ones hold the compilation.
    """
    return len(step_seconds) * median(step_seconds) if step_seconds else 0.0


def kept_seconds(metrics: Metrics) -> float:
    """`productive_seconds` of all lives' steps that count."""
    lives: dict[int, list[float]] = {}
    for record in metrics.steps:
        if "seconds_per_step" in record:
            lives.setdefault(life_of(record), []).append(float(record["seconds_per_step"]))
    return sum(map(productive_seconds, lives.values()))
