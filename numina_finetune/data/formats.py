"""Rows of published datasets -> OpenAI conversations.

Columns as published: ``openai/gsm8k`` (question, answer), ``AI-MO/NuminaMath-CoT`` (source, problem, solution,
messages), ``AI-MO/NuminaMath-TIR`` (problem, solution, messages; with code and its output in the solution),
``AI-MO/NuminaMath-1.5`` (problem, solution, answer, problem_is_valid, solution_is_valid, …), MATH (problem, level,
type, solution), and any dataset with OpenAI ``messages``, with or without ``tools``. Rows of questions and answers may
hold tool calls in further columns (``tool_columns.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from numina_finetune.config import FORMATS, GSM8K_STYLES, TIR_STYLES, SourceConfig
from numina_finetune.data import calculator, tir
from numina_finetune.data.conversation import Message
from numina_finetune.data.tool_calls import without_none
from numina_finetune.data.tool_columns import ToolColumns, call_messages, row_tools, tool_faults, usable_columns
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
    "numina_tir": ("problem", "solution"),
}
"""Format -> (question column, answer column)."""

UNUSABLE_ANSWERS = ("proof", "notfound")
"""NuminaMath-1.5's ``answer`` where there is no final answer to learn."""

_FINAL_LINE = re.compile(r"^####", re.MULTILINE)


def format_example(
    row: Mapping[str, Any],
    *,
    format: str = "auto",
    question_field: str | None = None,
    answer_field: str | None = None,
    messages_field: str = "messages",
    tool_calls_field: str | None = None,
    tool_name_field: str | None = None,
    tool_input_field: str | None = None,
    tool_output_field: str | None = None,
    system_prompt: str | None = None,
    gsm8k_style: str = "plain",
    tir_style: str = "tool_calls",
) -> Example:
    """One row of a dataset as a conversation.

    Args:
        row: column name -> value.
        format: one of ``config.FORMATS``; ``auto`` recognises it by the row.
        question_field: column of the question, instead of the format's own.
        answer_field: column of the answer, instead of the format's own.
        messages_field: column of the OpenAI messages.
        tool_calls_field: column of OpenAI tool calls, see ``tool_columns.py``. Rows of ``numina_tir`` that lack one of
            the four columns of tool calls that are named are read by their code blocks.
        tool_name_field: column of the names of the tools.
        tool_input_field: column of their inputs.
        tool_output_field: column of their results.
        system_prompt: put first where the conversation has no system message of its own.
        gsm8k_style: ``plain`` strips GSM8K's ``<<48/2=24>>``, ``annotated`` keeps it, ``calculator`` makes it a call
            of the tool ``calculator``.
        tir_style: ``tool_calls`` makes the code blocks of ``numina_tir`` calls of the tool ``python``; ``text`` keeps
            the solution as one turn, with the output blocks out of the loss (``no_loss``).

    Raises:
        DataError: a column is missing or not text, or the row is unfit for its format (the reason is said).
    """
    tool_columns = None
    if tool_calls_field or tool_name_field or tool_input_field or tool_output_field:
        tool_columns = ToolColumns(tool_calls_field, tool_name_field, tool_input_field, tool_output_field)
    if format == "auto":
        format = recognise(row, question_field, answer_field, messages_field, tool_columns)
    if format not in FORMATS:
        raise DataError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if tool_columns is not None:
        tool_columns = usable_columns(tool_columns, row, format)
    by_messages = format == "numina_cot" and tool_columns is None and row.get(messages_field)
    if format == "messages" or by_messages:
        example = _from_messages(row, messages_field)
    elif format == "numina_tir":
        example = _from_tir(row, question_field, answer_field, messages_field, tool_columns, tir_style)
    else:
        example = _from_pair(row, format, question_field, answer_field, tool_columns, gsm8k_style)
    if system_prompt and not _has_system_message(example["messages"]):
        example["messages"].insert(0, {"role": "system", "content": system_prompt})
    return example


# --- which format -----------------------------------------------------------------------------------------------------


def recognise(
    row: Mapping[str, Any],
    question_field: str | None = None,
    answer_field: str | None = None,
    messages_field: str = "messages",
    tool_columns: ToolColumns | None = None,
) -> str:
    """The format that ``auto`` means for this row.

    Columns named by the user come first. GSM8K is told from other questions and answers by its ``####`` line, and
    NuminaMath-TIR from other problems and solutions by code with its output.

    Raises:
        DataError: no format has these columns.
    """
    format = recognise_columns(row, question_field, answer_field, messages_field, tool_columns)
    if format is None:
        raise DataError(f"no format is known for the columns {_listed(row)}: name them with --question-field …")
    if format != "numina_1.5" and _own_names(question_field, answer_field) and _is_tir(row, messages_field):
        return "numina_tir"
    if format == "numina_tir":  # as its columns may be, but not what it says
        has_calls = tool_columns is not None and not tool_columns.missing(row)
        return "math" if question_field or answer_field or has_calls else "messages"
    answer = row.get(answer_field or "answer")
    if format == "qa" and isinstance(answer, str) and _FINAL_LINE.search(answer):
        return "gsm8k"
    return format


def recognise_columns(
    columns: Iterable[str],
    question_field: str | None,
    answer_field: str | None,
    messages_field: str,
    tool_columns: ToolColumns | None = None,
) -> str | None:
    """Like :func:`recognise` from the columns alone; None if they fit no format.

    It is ``qa`` for GSM8K, and ``numina_tir`` for any problem, solution and messages without NuminaMath-CoT's source.
    """
    present = set(columns)
    may_be_tir = "source" not in present and {"problem", "solution", messages_field} <= present
    if may_be_tir and _own_names(question_field, answer_field):
        return "numina_tir"
    if question_field or answer_field:
        return "qa"
    has_pair = {"question", "answer"} <= present or {"problem", "solution"} <= present
    if messages_field in present and not (has_pair and tool_columns and not tool_columns.missing(present)):
        return "messages"
    if {"problem", "solution", "problem_is_valid", "solution_is_valid"} <= present:
        return "numina_1.5"
    if {"question", "answer"} <= present:
        return "qa"
    if {"problem", "solution"} <= present:
        return "math"
    return None


def _own_names(question_field: str | None, answer_field: str | None) -> bool:
    """Whether the question and the answer are read from where NuminaMath-TIR has them."""
    return question_field in (None, "problem") and answer_field in (None, "solution")


def _is_tir(row: Mapping[str, Any], messages_field: str) -> bool:
    """Whether a solution, which is also what the messages say if there are any, runs code.

    One without any code may still be of NuminaMath-TIR, so there the columns decide.
    """
    solution = row.get("solution")
    if not isinstance(solution, str) or "problem" not in row:
        return False
    try:
        if row.get(messages_field) and _pair_messages(row, messages_field)[-1]["content"] != solution:
            return False
    except DataError:
        return False
    may_be_tir = messages_field in row and "source" not in row
    return tir.has_runs(solution) or (may_be_tir and not tir.has_code(solution))


def required_columns(format: str, source: SourceConfig) -> list[tuple[str, ...]]:
    """Alternatives, best first: a dataset that has all columns of one of them can be read; none for ``auto``."""
    if format == "auto":
        return []
    if format == "messages":
        return [(source.messages_field,)]
    question, answer = DEFAULT_FIELDS[format]
    pair = (source.question_field or question, source.answer_field or answer)
    if format in ("numina_cot", "numina_tir"):
        return [(source.messages_field,), pair]
    if format == "numina_1.5":
        return [(*pair, "problem_is_valid", "solution_is_valid")]
    return [pair]


def column_faults(columns: Iterable[str], source: SourceConfig) -> list[str]:
    """What is wrong with a dataset's columns for its format, with the flag that mends it; empty if nothing."""
    present = list(columns)
    fields = (source.question_field, source.answer_field, source.messages_field)
    tool_columns = ToolColumns.of(source)
    format = source.format if source.format != "auto" else recognise_columns(present, *fields, tool_columns)
    if format is None:
        return [
            f"dataset {source.name} has the columns {_listed(present)}, which fit no format: name the question and "
            "the answer with --question-field and --answer-field, or the messages with --messages-field"
        ]
    if not _may_be_tir(present, source) and (faults := tool_faults(tool_columns, present, format)):
        return [f"{fault} (dataset {source.name})" for fault in faults]
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


def _may_be_tir(present: list[str], source: SourceConfig) -> bool:
    """Whether the rows will tell that this is NuminaMath-TIR, which needs no tool columns."""
    own_names = _own_names(source.question_field, source.answer_field)
    return source.format == "auto" and own_names and {"problem", "solution", source.messages_field} <= set(present)


# --- conversations ----------------------------------------------------------------------------------------------------


def _from_messages(row: Mapping[str, Any], messages_field: str) -> Example:
    messages = _decoded(_column(row, messages_field), messages_field)
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"column {messages_field}: is {type(messages).__name__}, needs a list of OpenAI messages")
    tools = _decoded(row.get("tools"), "tools")
    return {"messages": [dict(message) for message in messages], "tools": without_none(tools) or None}


def _from_tir(
    row: Mapping[str, Any],
    question_field: str | None,
    answer_field: str | None,
    messages_field: str,
    tool_columns: ToolColumns | None,
    style: str,
) -> Example:
    """From the messages, or from problem and solution where there are none, or where columns are named."""
    if style not in TIR_STYLES:
        raise DataError(f"tir_style {style!r} is unknown: use one of {', '.join(TIR_STYLES)}")
    if question_field or answer_field or not row.get(messages_field):
        question_column, answer_column = DEFAULT_FIELDS["numina_tir"]
        opening = [{"role": "user", "content": _text(row, question_field or question_column)}]
        solution = _text(row, answer_field or answer_column)
    else:
        *opening, last = _pair_messages(row, messages_field)
        solution = last["content"]
    calls = call_messages(row, tool_columns) if tool_columns is not None else []
    if calls:
        messages = [*opening, *calls, {"role": "assistant", "content": solution}]
        return {"messages": messages, "tools": row_tools(row, calls)}
    if style == "tool_calls":
        said = tir.to_messages(solution)
        return {"messages": [*opening, *said], "tools": [tir.PYTHON_TOOL] if len(said) > 1 else None}
    turn: Message = {"role": "assistant", "content": solution}
    if ranges := tir.output_ranges(solution):
        turn["no_loss"] = ranges
    return {"messages": [*opening, turn], "tools": None}


def _pair_messages(row: Mapping[str, Any], messages_field: str) -> list[Message]:
    """The messages, if they are a user's question and its answer, perhaps after a system message.

    Raises:
        DataError: they are more than that.
    """
    messages: list[Message] = without_none(_from_messages(row, messages_field)["messages"])
    roles = [message.get("role") for message in messages]
    if roles[:1] in (["system"], ["developer"]):
        del roles[0]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"column {messages_field}: its roles are {_listed(map(str, roles))}, but numina_tir has one user and one "
            "assistant message: use --format messages"
        )
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"column {messages_field}: the {message['role']} message has no text")
        if further := [key for key, value in message.items() if key not in ("role", "content") and value != []]:
            raise DataError(
                f"column {messages_field}: the {message['role']} message has {_listed(further)} besides its role and "
                "content, which numina_tir has no use for: use --format messages"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _from_pair(
    row: Mapping[str, Any],
    format: str,
    question_field: str | None,
    answer_field: str | None,
    tool_columns: ToolColumns | None,
    gsm8k_style: str,
) -> Example:
    question_column, answer_column = DEFAULT_FIELDS[format]
    if format == "numina_1.5":
        _refuse_unusable(row)
    question = {"role": "user", "content": _text(row, question_field or question_column)}
    answer = _text(row, answer_field or answer_column)
    if format == "gsm8k":
        _refuse_without_final_line(answer)
        if gsm8k_style == "plain":
            answer = calculator.without_annotations(answer)
        elif gsm8k_style == "calculator":
            return _with_calculator(question, answer, tool_columns)
        elif gsm8k_style not in GSM8K_STYLES:
            raise DataError(f"gsm8k_style {gsm8k_style!r} is unknown: use one of {', '.join(GSM8K_STYLES)}")
    final = {"role": "assistant", "content": answer}
    if tool_columns is None:
        return {"messages": [question, final], "tools": None}
    calls = call_messages(row, tool_columns)
    return {"messages": [question, *calls, final], "tools": row_tools(row, calls)}


def _with_calculator(question: Message, answer: str, tool_columns: ToolColumns | None) -> Example:
    if tool_columns is not None:
        raise DataError(
            f"gsm8k_style calculator makes tool calls of the annotations, and {_listed(tool_columns.flags())} name "
            "others: keep one of them"
        )
    said = calculator.to_messages(answer)
    return {"messages": [question, *said], "tools": [calculator.CALCULATOR_TOOL] if len(said) > 1 else None}


def _refuse_without_final_line(answer: str) -> None:
    finals = len(_FINAL_LINE.findall(answer))
    if finals != 1:
        raise DataError(f"GSM8K answer has {finals} lines that start with ####, needs exactly one")


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
