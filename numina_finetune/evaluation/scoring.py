"""What attempts are worth: one record a problem, and the figures of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from numina_finetune.evaluation.answers import (
    Style,
    answers_match,
    extract_answer,
    majority_baseline,
    same_in_harness,
)
from numina_finetune.evaluation.intervals import mean_interval, pass_at_k, wilson_interval
from numina_finetune.evaluation.solving import Attempt
from numina_finetune.evaluation.tasks import Problem

WILSON = "Wilson's, over problems"
CENTRAL_LIMIT = "normal approximation, over problems' shares of right attempts"


@dataclass(frozen=True)
class Graded:
    """An attempt and its grades, by style."""

    attempt: Attempt
    answers: Mapping[str, str | None]
    """As extracted; None where there is none."""
    right: Mapping[str, bool]


@dataclass(frozen=True)
class Record:
    """A problem and the attempts at it: a line of ``problems.jsonl``."""

    problem: Problem
    graded: tuple[Graded, ...]

    def share(self, style: str) -> float:
        """Of its attempts, those that are right."""
        return sum(one.right[style] for one in self.graded) / len(self.graded)

    def to_mapping(self) -> dict[str, Any]:
        attempts = [
            {**asdict(one.attempt), "rounds": list(one.attempt.rounds), "answers": one.answers, "right": one.right}
            for one in self.graded
        ]
        return {**asdict(self.problem), "attempts": attempts}

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_mapping`.

        Raises:
            KeyError, TypeError: it is not such a mapping.
        """
        values = dict(mapping)
        graded = []
        for entry in values.pop("attempts"):
            fields = dict(entry)
            answers, right, rounds = fields.pop("answers"), fields.pop("right"), tuple(fields.pop("rounds"))
            graded.append(Graded(Attempt(**fields, rounds=rounds), answers, right))
        return Record(Problem(**values), tuple(graded))


@dataclass(frozen=True)
class Figures:
    """How often answers are right, read in one style."""

    style: str
    problems: int
    attempts: int
    """At each problem."""
    accuracy: float
    """pass@1: the mean over problems of the share of right attempts."""
    lower: float
    upper: float
    interval: str
    """What the 95% interval is."""
    without_answer: int
    """Attempts in which none was found; they count as wrong."""
    pass_at: dict[str, float]
    """With several attempts: the probability that one of k is right, by k."""
    majority: float
    """Accuracy of always giving the most frequent right answer."""

    @property
    def line(self) -> str:
        """The figures as one line."""
        more = "".join(f"; pass@{k} {value:.1%}" for k, value in self.pass_at.items())
        return (
            f"{self.accuracy:.1%} of {self.problems} (95% {self.lower:.1%} to {self.upper:.1%}){more}; "
            f"{self.without_answer} without an answer; the commonest answer alone {self.majority:.1%}"
        )


def measured_styles(style: Style) -> tuple[Style, ...]:
    """The styles in which answers are read: both of GSM8K's, or ``boxed``."""
    return ("boxed",) if style == "boxed" else ("gsm8k", "gsm8k-flexible")


def grade(problem: Problem, attempts: Sequence[Attempt], styles: Sequence[Style]) -> Record:
    """The attempts with their answers and verdicts: GSM8K's as the harness has them, ``boxed`` mathematically."""
    graded = []
    for attempt in attempts:
        answers: dict[str, str | None] = {style: extract_answer(attempt.text, style=style) for style in styles}
        right: dict[str, bool] = {
            style: (answers_match if style == "boxed" else same_in_harness)(problem.gold, answer)
            for style, answer in answers.items()
        }
        graded.append(Graded(attempt, answers, right))
    return Record(problem, tuple(graded))


def figures(records: Sequence[Record], style: str) -> Figures:
    """Of records that all have the same number of attempts."""
    shares = [record.share(style) for record in records]
    attempts = len(records[0].graded) if records else 0
    single = attempts <= 1
    right = [sum(one.right[style] for one in record.graded) for record in records]
    lower, upper = wilson_interval(sum(right), len(records)) if single else mean_interval(shares)
    sizes = [2**power for power in range(1, attempts.bit_length()) if 2**power <= attempts]
    return Figures(
        style=style,
        problems=len(records),
        attempts=attempts,
        accuracy=float(np.mean(shares)) if records else 0.0,
        lower=lower,
        upper=upper,
        interval=WILSON if single else CENTRAL_LIMIT,
        without_answer=sum(one.answers[style] is None for record in records for one in record.graded),
        pass_at={str(k): float(np.mean([pass_at_k(attempts, count, k) for count in right])) for k in sizes},
        majority=majority_baseline([record.problem.gold for record in records]),
    )
