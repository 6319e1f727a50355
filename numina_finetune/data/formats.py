"""Rows of published datasets -> OpenAI conversations.

Columns as published: ``openai/gsm8k`` (question, answer), ``AI-MO/NuminaMath-CoT`` (source, problem, solution,
messages), ``AI-MO/NuminaMath-1.5`` (problem, solution, answer, problem_is_valid, solution_is_valid, …), MATH
(problem, level, type, solution), and any dataset with OpenAI ``messages``, with or without ``tools``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from numina_finetune.config import FORMATS, SourceConfig
from numina_finetune.data.tool_calls import without_none
from numina_finetune.errors import DataError


class Example(TypedDict):
    """A row as a conversation; not validated yet."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


DEFAULT_FIELDS = {
    "qa": ("question", "answer"),
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
    "numina_cot": ("problem", "solution"),
    "numina_1.5": ("problem", "solution"),
}
"""Format -> (question column, answer column)."""

UNUSABLE_ANSWERS = ("proof", "notfound")
"""NuminaMath-1.5's ``answer`` where there is no final answer to learn."""

_ANNOTATION = re.compile(r"<<[^>]*>>")
_FINAL_LINE = re.compile(r"^####", re.MULTILINE)


def format_example(
    row: Mapping[str, Any],
    *,
    format: str = "auto",
    question_field: str | None = None,
    answer_field: str | None = None,
    messages_field: str = "messages",
    system_prompt: str | None = None,
    gsm8k_style: str = "plain",
) -> Example:
    """One row of a dataset as a conversation.

    Args:
        row: column name -> value.
        format: one of ``config.FORMATS``; ``auto`` recognises it by the columns.
        question_field, answer_field: columns that replace the format's own.
        messages_field: column of the OpenAI messages.
        system_prompt: put first where the conversation has no system message of its own.
        gsm8k_style: ``plain`` strips GSM8K's ``<<48/2=24>>``, ``annotated`` keeps it.

    Raises:
        DataError: a column is missing or not text, or the row is unfit for its format (the reason is said).
    """
    if format == "auto":
        format = recognise(row, question_field, answer_field, messages_field)
    if format not in FORMATS:
        raise DataError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if format == "messages" or (format == "numina_cot" and row.get(messages_field)):
        example = _from_messages(row, messages_field)
    else:
        example = _from_pair(row, format, question_field, answer_field, gsm8k_style)
    if system_prompt and not _has_system_message(example["messages"]):
        example["messages"].insert(0, {"role": "system", "content": system_prompt})
    return example


def recognise(
    row: Mapping[str, Any],
    question_field: str | None = None,
    answer_field: str | None = None,
    messages_field: str = "messages",
) -> str:
    """The format that ``auto`` means for this row.

    Columns named by the user come first. GSM8K is told from other questions and answers by its ``####`` line.

    Raises:
        DataError: no format has these columns.
    """
    format = recognise_columns(row, question_field, answer_field, messages_field)
    if format is None:
        raise DataError(f"no format is known for the columns {_listed(row)}: name them with --question-field …")
    answer = row.get(answer_field or "answer")
    if format == "qa" and isinstance(answer, str) and _FINAL_LINE.search(answer):
        return "gsm8k"
    return format


def recognise_columns(
    columns: Iterable[str], question_field: str | None, answer_field: str | None, messages_field: str
) -> str | None:
    """Like :func:`recognise` from the columns alone, with ``qa`` for GSM8K; None if they fit no format."""
    present = set(columns)
    if question_field or answer_field:
        return "qa"
    if messages_field in present:
        return "messages"
    if {"problem", "solution", "problem_is_valid", "solution_is_valid"} <= present:
        return "numina_1.5"
    if {"question", "answer"} <= present:
        return "qa"
    if {"problem", "solution"} <= present:
        return "math"
    return None


def required_columns(format: str, source: SourceConfig) -> list[tuple[str, ...]]:
    """Alternatives, best first: a dataset that has all columns of one of them can be read; none for ``auto``."""
    if format == "auto":
        return []
    if format == "messages":
        return [(source.messages_field,)]
    question, answer = DEFAULT_FIELDS[format]
    pair = (source.question_field or question, source.answer_field or answer)
    if format == "numina_cot":
        return [(source.messages_field,), pair]
    if format == "numina_1.5":
        return [(*pair, "problem_is_valid", "solution_is_valid")]
    return [pair]


def column_faults(columns: Iterable[str], source: SourceConfig) -> list[str]:
    """What is wrong with a dataset's columns for its format, with the flag that mends it; empty if nothing."""
    present = list(columns)
    fields = (source.question_field, source.answer_field, source.messages_field)
    format = source.format if source.format != "auto" else recognise_columns(present, *fields)
    if format is None:
        return [
            f"dataset {source.name} has the columns {_listed(present)}, which fit no format: name the question and "
            "the answer with --question-field and --answer-field, or the messages with --messages-field"
        ]
    alternatives = required_columns(format, source)
    if any(set(needed) <= set(present) for needed in alternatives):
        return []
    return [
        f"column {column!r} is missing in dataset {source.name} (format {format}; it has {_listed(present)}): "
        f"{_remedy(column, format, source)}"
        for column in alternatives[-1]
        if column not in present
    ]


def _remedy(column: str, format: str, source: SourceConfig) -> str:
    if format == "messages":
        return "name the column with --messages-field, or choose another --format"
    question, answer = DEFAULT_FIELDS[format]
    if column == (source.question_field or question):
        return "name the column of the question with --question-field"
    if column == (source.answer_field or answer):
        return "name the column of the answer with --answer-field"
    return "choose another --format, such as math"


def _from_messages(row: Mapping[str, Any], messages_field: str) -> Example:
    messages = _decoded(_column(row, messages_field), messages_field)
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"column {messages_field}: is {type(messages).__name__}, needs a list of OpenAI messages")
    tools = _decoded(row.get("tools"), "tools")
    return {"messages": [dict(message) for message in messages], "tools": without_none(tools) or None}


def _from_pair(
    row: Mapping[str, Any], format: str, question_field: str | None, answer_field: str | None, gsm8k_style: str
) -> Example:
    question_column, answer_column = DEFAULT_FIELDS[format]
    if format == "numina_1.5":
        _refuse_unusable(row)
    question = _text(row, question_field or question_column)
    answer = _text(row, answer_field or answer_column)
    if format == "gsm8k":
        answer = _gsm8k_answer(answer, gsm8k_style)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "tools": None}


def _gsm8k_answer(answer: str, style: str) -> str:
    finals = len(_FINAL_LINE.findall(answer))
    if finals != 1:
        raise DataError(f"GSM8K answer has {finals} lines that start with ####, needs exactly one")
    return answer if style == "annotated" else _ANNOTATION.sub("", answer)


def _refuse_unusable(row: Mapping[str, Any]) -> None:
    """NuminaMath-1.5 marks problems and solutions that its own checks found wanting."""
    for column in ("problem_is_valid", "solution_is_valid"):
        if _column(row, column) != "Yes":
            raise DataError(f"NuminaMath-1.5 row refused: {column} is not Yes but {row[column]!r}")
    if row.get("answer") in UNUSABLE_ANSWERS:
        raise DataError(f"NuminaMath-1.5 row refused: the answer column says {row['answer']}")


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _column(row, column)
    if not isinstance(value, str):
        raise DataError(f"column {column}: is {type(value).__name__}, needs text")
    if not value.strip():
        raise DataError(f"column {column}: is empty")
    return value


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(f"column {column!r} is missing: the row has {_listed(row)}")
    return row[column]


def _decoded(value: Any, column: str) -> Any:
    """Datasets keep nested values as JSON text where Arrow would unify their structs."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"column {column}: {value[:80]!r} is not JSON ({error})") from error


def _has_system_message(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[0].get("role") in ("system", "developer")


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(columns) or "none"
