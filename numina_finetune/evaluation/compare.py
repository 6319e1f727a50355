"""Two evaluations on the same problems: which is better, and how sure that is, problem by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from numina_finetune.errors import ConfigError
from numina_finetune.evaluation.intervals import bootstrap_difference, mcnemar_exact, newcombe_paired
from numina_finetune.evaluation.results import Results
from numina_finetune.evaluation.scoring import Record

NEWCOMBE = "Newcombe's for paired shares"
BOOTSTRAP = "paired bootstrap over problems"


@dataclass(frozen=True)
class Counts:
    """Of problems, with one attempt each."""

    both: int
    only_first: int
    only_second: int
    neither: int


@dataclass(frozen=True)
class Pair:
    """A problem in both evaluations."""

    first: Record
    second: Record


@dataclass(frozen=True)
class Side:
    """One of the two evaluations."""

    name: str
    url: str
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """What two evaluations say about two models."""

    task: str
    style: str
    problems: int
    first: Side
    second: Side
    difference: float
    """The second's accuracy minus the first's."""
    lower: float
    upper: float
    interval: str
    """What the 95% interval of the difference is."""
    counts: Counts | None
    """None where there are several attempts at a problem."""
    p: float | None
    """McNemar's, of the counts."""
    gained: list[Pair]
    """Problems that the second got right more often, best first."""
    lost: list[Pair]

    def to_mapping(self) -> dict[str, Any]:
        """``comparison.json``: the figures, and the problems that changed by their ids."""
        plain = {
            name: getattr(self, name)
            for name in ("task", "style", "problems", "difference", "lower", "upper", "interval", "p")
        }
        changed = {name: [pair.first.problem.id for pair in getattr(self, name)] for name in ("gained", "lost")}
        counts = None if self.counts is None else asdict(self.counts)
        return {**plain, "first": asdict(self.first), "second": asdict(self.second), "counts": counts, **changed}

    @property
    def line(self) -> str:
        """The figures as a few lines."""
        told = (
            f"first   {self.first.accuracy:.1%}  {self.first.name}\nsecond  {self.second.accuracy:.1%}  "
            f"{self.second.name}\nsecond minus first {100 * self.difference:+.1f} points over {self.problems} problems "
            f"(95% {100 * self.lower:+.1f} to {100 * self.upper:+.1f}, {self.interval})"
        )
        if self.counts is None:
            return told
        return (
            f"{told}\nboth right {self.counts.both}, only the first {self.counts.only_first}, only the second "
            f"{self.counts.only_second}, both wrong {self.counts.neither}; McNemar's exact p = {self.p:.3g}"
        )


def compare(first: Results, second: Results) -> Comparison:
    """Pair two evaluations by problem.

    Raises:
        ConfigError: they are not finished, or not on the same problems.
    """
    _refuse(first, second)
    assert first.summary is not None and second.summary is not None
    style = first.summary["headline"]
    theirs = {record.problem.id: record for record in second.records}
    pairs = [Pair(record, theirs[record.problem.id]) for record in first.records]
    before = [pair.first.share(style) for pair in pairs]
    after = [pair.second.share(style) for pair in pairs]
    single = all(len(record.graded) == 1 for pair in pairs for record in (pair.first, pair.second))
    counts = _counts(before, after) if single else None
    if counts is None:
        lower, upper = bootstrap_difference(before, after)
    else:
        lower, upper = newcombe_paired(counts.both, counts.only_first, counts.only_second, counts.neither)
    changes = sorted(zip(after, before, pairs, strict=True), key=lambda each: each[1] - each[0])
    return Comparison(
        task=first.summary["task"],
        style=style,
        problems=len(pairs),
        first=_side(first, before),
        second=_side(second, after),
        difference=float(np.mean(after) - np.mean(before)),
        lower=lower,
        upper=upper,
        interval=BOOTSTRAP if counts is None else NEWCOMBE,
        counts=counts,
        p=None if counts is None else mcnemar_exact(counts.only_first, counts.only_second),
        gained=[pair for now, then, pair in changes if now > then],
        lost=[pair for now, then, pair in reversed(changes) if now < then],
    )


def _side(results: Results, shares: Sequence[float]) -> Side:
    return Side(str(results.settings["model"]), results.url, float(np.mean(shares)))


def _counts(before: Sequence[float], after: Sequence[float]) -> Counts:
    pairs = [(then == 1, now == 1) for then, now in zip(before, after, strict=True)]
    return Counts(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def _refuse(first: Results, second: Results) -> None:
    faults = [
        f"{results.url} is not finished ({len(results.records)} problems so far): run its evaluate again to finish it"
        for results in (first, second)
        if results.summary is None
    ]
    if first.summary and second.summary and first.summary["headline"] != second.summary["headline"]:
        faults.append(
            f"{first.url} reads answers as {first.summary['headline']}, {second.url} as "
            f"{second.summary['headline']}: evaluate both with the same --answer-style"
        )
    ours, theirs = (
        {(record.problem.id, record.problem.question, record.problem.gold) for record in results.records}
        for results in (first, second)
    )
    if not faults and ours != theirs:
        faults.append(
            f"{first.url} and {second.url} are not on the same problems ({len(ours - theirs)} only in the first, "
            f"{len(theirs - ours)} only in the second): evaluate both on the same --task, --max-problems and --seed"
        )
    if faults:
        raise ConfigError(faults)
