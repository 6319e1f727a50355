"""Problems in, attempts at them out: the one place where a model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numina_finetune.evaluation.prompts import Prompts
from numina_finetune.evaluation.tasks import Problem
from numina_finetune.train.backend import Decoding, Ended

Generate = Callable[[Sequence[Sequence[int]], Decoding, Ended | None], list[list[int]]]
"""``Backend.generate``."""


@dataclass(frozen=True)
class Attempt:
    """What a model wrote."""

    text: str
    tokens: int
    """That it wrote, the one that ended it included."""
    stopped: str
    """``answered``, ``length`` (it was cut), or with tools ``max_rounds`` or ``malformed call``."""
    rounds: tuple[str, ...] = ()
    """With tools: what became of each call: ok, error, timeout or killed."""


Solve = Callable[[Sequence[Problem]], list[Attempt]]
"""One attempt at each problem of a batch; of those that stand there several times, different ones if they are drawn."""


def solve_directly(prompts: Prompts, generate: Generate, decoding: Decoding) -> Solve:
    """A model that answers in one go."""

    def solve(problems: Sequence[Problem]) -> list[Attempt]:
        rows = generate([prompts.ids(problem.question) for problem in problems], decoding, prompts.ended)
        return [Attempt(prompts.text(row), len(row), stopped(row)) for row in rows]

    def stopped(row: list[int]) -> str:
        return "answered" if row[-1] in decoding.stop_ids or prompts.ended(row) else "length"

    return solve
