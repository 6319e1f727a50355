"""Problems in, attempts at them out: the one place where a model is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

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


Solve = Callable[[Sequence[Problem], int], list[Attempt]]
"""One attempt at each problem of a batch, by a seed that the batch's randomness comes from."""


def solve_directly(prompts: Prompts, generate: Generate, decoding: Decoding) -> Solve:
    """A model that answers in one go."""

    def solve(problems: Sequence[Problem], seed: int) -> list[Attempt]:
        asked = [prompts.ids(problem.question) for problem in problems]
        rows = generate(asked, replace(decoding, seed=seed), prompts.ended)
        return [Attempt(prompts.text(row), len(row), _stopped(row)) for row in rows]

    def _stopped(row: list[int]) -> Literal["answered", "length"]:
        ended = bool(row) and (row[-1] in decoding.stop_ids or prompts.ended(row))
        return "answered" if ended else "length"

    return solve


def whole_batch(rows: int, replicas: int) -> int:
    """The rows, rounded up to as many as the replicas of the model can share equally."""
    return -(-rows // replicas) * replicas
