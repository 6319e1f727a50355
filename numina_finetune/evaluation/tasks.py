"""Problems with known answers: the benchmarks by name, or any dataset of questions and answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from numina_finetune.config import SourceConfig
from numina_finetune.data.contamination import whole_question
from numina_finetune.data.formats import UNUSABLE_ANSWERS
from numina_finetune.data.sources import SYNTHETIC, load_rows, parse_source_name
from numina_finetune.errors import DataError
from numina_finetune.evaluation.answers import FLEXIBLE, Style, extract_answer

QUESTION_FIELDS = ("question", "problem")
ANSWER_FIELDS = ("answer", "solution")
"""Columns that are looked for, in this order, where none are named."""
STYLES: tuple[Style, ...] = ("gsm8k", "gsm8k-flexible", "boxed")


@dataclass(frozen=True)
class Problem:
    """A question and the answer that is right."""

    id: str
    """Its row's number in the dataset."""
    question: str
    gold: str
    """The final answer alone."""
    solution: str
    """The whole of what the dataset answers; what an example shows."""


@dataclass(frozen=True)
class Task:
    """Where problems come from, and how answers to them are read."""

    name: str
    source: SourceConfig
    style: Style | None
    """None: told by the answers."""
    examples: SourceConfig | None = None
    """Where examples may come from."""


TASKS = {
    "gsm8k": Task(
        "gsm8k",
        SourceConfig("openai/gsm8k", config="main", split="test"),
        "gsm8k",
        SourceConfig("openai/gsm8k", config="main", split="train"),
    ),
    "math500": Task("math500", SourceConfig("HuggingFaceH4/MATH-500", split="test"), "boxed"),
    SYNTHETIC: Task(SYNTHETIC, SourceConfig(SYNTHETIC, split="test"), "gsm8k", SourceConfig(SYNTHETIC, split="train")),
}
"""The benchmarks; all of their problems are held out."""


@dataclass(frozen=True)
class Problems:
    """What a task asks."""

    task: str
    style: Style
    problems: list[Problem]
    left_out: int
    """Rows without a final answer, such as proofs."""


def find_task(name: str, question_field: str | None, answer_field: str | None, style: str | None) -> Task:
    """The benchmark of that name, or a dataset: ``name``, ``name[split]`` (the split is test if none is named), a file.

    Args:
        question_field: column of the question, if not the usual one.
        answer_field: column of the answer, if not the usual one.
        style: how answers are read; None: the benchmark's, or told by the dataset's answers.
    """
    known = TASKS.get(name)
    if known is None:
        plain, split = parse_source_name(name)
        known = Task(name, SourceConfig(plain, split=split or "test"), None)
    source = replace(known.source, question_field=question_field, answer_field=answer_field)
    return replace(known, source=source, style=cast(Style | None, style) or known.style)


def load_problems(task: Task, count: int | None = None, seed: int = 0) -> Problems:
    """The task's problems, or ``count`` of them chosen by ``seed``, in the dataset's order.

    Raises:
        DataError: there is no such dataset, or it has no questions with final answers.
    """
    rows = load_rows(task.source, flag="--task")
    question, answer = _columns(rows.column_names, task.source)
    pairs = [(number, _text(row, question), _text(row, answer)) for number, row in enumerate(rows)]
    style = task.style or _told_style([solution for _, _, solution in pairs])
    found = [
        Problem(str(number), asked, gold, solution)
        for number, asked, solution in pairs
        if asked and (gold := final_answer(solution, style, marked=answer == "solution")) is not None
    ]
    if not found:
        raise DataError(
            f"--task {task.name}: no row has a question in column {question!r} and a final answer in column "
            f"{answer!r}: name the columns with --question-field and --answer-field"
        )
    return Problems(task.name, style, chosen(found, count, seed), len(pairs) - len(found))


def load_examples(task: Task, file: str | None, problems: Sequence[Problem], count: int, seed: int) -> list[Problem]:
    """``count`` examples to put before each question, chosen by ``seed``; none of them asks what a problem asks.

    Args:
        file: of examples; None: the task's own training split.
        problems: all of the task.

    Raises:
        DataError: there are not as many.
    """
    if count == 0:
        return []
    source = replace(task.source, name=file, config=None, split="train", revision=None) if file else task.examples
    if source is None:
        raise DataError(
            f"--shots {count}: task {task.name} has no examples of its own, and its problems are not to be shown: name "
            "others with --shots-file"
        )
    rows = load_rows(source, flag="--shots-file")
    question, answer = _columns(rows.column_names, source)
    asked = {whole_question(problem.question) for problem in problems}
    usable = [
        Problem(str(number), _text(row, question), "", _text(row, answer))
        for number, row in enumerate(rows)
        if _text(row, question) and _text(row, answer) and whole_question(_text(row, question)) not in asked
    ]
    if len(usable) < count:
        raise DataError(
            f"--shots {count}: {file or source.name} has {len(usable)} examples whose questions are not the task's: "
            "ask for fewer"
        )
    return random.Random(f"examples/{seed}").sample(usable, count)


def chosen(problems: Sequence[Problem], count: int | None, seed: int) -> list[Problem]:
    """So many of the problems, the same ones for the same seed, in their order; all where there are no more."""
    if count is None or count >= len(problems):
        return list(problems)
    places = random.Random(f"problems/{seed}").sample(range(len(problems)), count)
    return [problems[place] for place in sorted(places)]


def final_answer(solution: str, style: Style, *, marked: bool) -> str | None:
    """What counts as right; None for what has no answer to compare with.

    Args:
        marked: only an answer that the solution marks, with ``####`` or a box, is one. Else the text itself may be it:
            of the GSM8K styles if it is a number.
    """
    found = extract_answer(solution, style="boxed" if style == "boxed" else "gsm8k")
    if found is not None or marked:
        return found or None
    if style != "boxed" and not FLEXIBLE.fullmatch(solution):
        return None
    return None if solution.lower() in UNUSABLE_ANSWERS else solution or None


def _told_style(solutions: Sequence[str]) -> Style:
    """``gsm8k`` where the first solution ends as GSM8K's do, else ``boxed``."""
    return "gsm8k" if solutions and extract_answer(solutions[0], style="gsm8k") is not None else "boxed"


def _columns(present: Sequence[str], source: SourceConfig) -> tuple[str, str]:
    """The columns of questions and answers.

    Raises:
        DataError: they are not there.
    """
    wanted = {
        "--question-field": (source.question_field, QUESTION_FIELDS),
        "--answer-field": (source.answer_field, ANSWER_FIELDS),
    }
    found, faults = [], []
    for flag, (named, usual) in wanted.items():
        choices = (named,) if named else usual
        match = next((name for name in choices if name in present), None)
        found.append(match or "")
        if match is None:
            faults.append(
                f"dataset {source.name} has no column {' or '.join(choices)} (it has {', '.join(present)}): name it "
                f"with {flag}"
            )
    if faults:
        raise DataError(faults)
    return found[0], found[1]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    return "" if value is None else str(value).strip()
