"""Tool calls kept in columns beside a question and its answer.

The messages of such a row are, in this order: the user's question; the calls and their results; the assistant's
answer. The calls come in one of two ways:

* One column of inputs (with one of outputs, and perhaps one of names): sequential rounds, for each i an assistant
  message with call i and the tool message that answers it.
* One column of OpenAI ``tool_calls``: one assistant message with all of them (parallel calls), then a tool message
  for each, in the same order. The results are the values of the output column or, where none is named, each call's
  own ``output`` or ``result``.

A value is a list, JSON text of a list, or what stands for a list of one. Where the calls of a row are no list, its
output is not read as one either, since what a program printed may well look like a JSON list. Empty text, an empty
list or None is no call: the row is a plain question and answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from numina_finetune.config import SourceConfig
from numina_finetune.data.conversation import Message
from numina_finetune.data.tir import PYTHON, PYTHON_TOOL
from numina_finetune.data.tool_calls import without_none
from numina_finetune.errors import DataError

log = logging.getLogger(__name__)

TEXT_ARGUMENTS = {PYTHON: "code"}
"""Tool -> the argument that an input of plain text is; ``input`` for others."""

_to_json = json.JSONEncoder(ensure_ascii=False).encode


class ToolColumns(NamedTuple):
    """Column names, None for those that are not there."""

    calls: str | None = None
    name: str | None = None
    input: str | None = None
    output: str | None = None

    @staticmethod
    def of(source: SourceConfig) -> ToolColumns:
        return ToolColumns(
            source.tool_calls_field, source.tool_name_field, source.tool_input_field, source.tool_output_field
        )

    def flags(self) -> dict[str, str]:
        """Flag -> the column it names, of those that are named."""
        return {f"--tool-{what}-field": column for what, column in self._asdict().items() if column is not None}

    def missing(self, present: Iterable[str]) -> dict[str, str]:
        """Like :meth:`flags`, of the columns that are not among those present."""
        present = set(present)
        return {flag: column for flag, column in self.flags().items() if column not in present}


# --- which columns ----------------------------------------------------------------------------------------------------


def tool_faults(columns: ToolColumns, present: Iterable[str], format: str) -> list[str]:
    """What is wrong with naming these columns for rows of this format, with the fix; empty if nothing.

    NuminaMath-TIR's rows may lack them, as their calls are in the text.
    """
    present = list(present)
    missing = columns.missing(present)
    if format == "numina_tir" and missing:
        return []
    if format == "messages":
        return [
            f"{flag} {column!r} has no use with format messages, whose messages hold their tool calls: drop it, or "
            "choose another --format"
            for flag, column in columns.flags().items()
        ]
    return _flag_faults(columns) + [
        f"column {column!r} is missing, there are {', '.join(present)}: name the column with {flag}, or drop the flag"
        for flag, column in missing.items()
    ]


def usable_columns(columns: ToolColumns, row: Mapping[str, Any], format: str) -> ToolColumns | None:
    """The columns, or None where NuminaMath-TIR is read by its code blocks instead (with one notice).

    Raises:
        DataError: they cannot be used with this row.
    """
    if faults := tool_faults(columns, row, format):
        raise DataError(faults)
    missing = columns.missing(row)
    if missing:
        _notice_blocks(tuple(missing.items()))
    return None if missing else columns


@cache
def _notice_blocks(missing: tuple[tuple[str, str], ...]) -> None:
    named = ", ".join(f"{flag} {column}" for flag, column in missing)
    log.warning("the rows of numina_tir have no column for %s: the tool calls are read from their code blocks", named)


def _flag_faults(columns: ToolColumns) -> list[str]:
    """What is wrong with naming these columns together, with the fix; empty if nothing."""
    if columns.calls is not None:
        return [
            f"{flag} {column!r} has no use beside --tool-calls-field {columns.calls!r}, whose calls have their own "
            "names and inputs: keep one of them"
            for flag, column in columns._replace(calls=None, output=None).flags().items()
        ]
    if columns.input is None:
        return [
            f"{flag} {column!r} has no calls that it belongs to: name the column of their inputs with "
            "--tool-input-field, or of OpenAI tool calls with --tool-calls-field"
            for flag, column in columns.flags().items()
        ]
    if columns.output is None:
        return [
            f"--tool-input-field {columns.input!r} gives calls without results: name the column of the results with "
            "--tool-output-field"
        ]
    return []


# --- a row's calls ----------------------------------------------------------------------------------------------------


def call_messages(row: Mapping[str, Any], columns: ToolColumns) -> list[Message]:
    """The row's calls and their results as assistant and tool messages; empty where it has none.

    Args:
        row: column name -> value; it has all the columns that are named.
        columns: named so that ``tool_faults`` finds nothing.

    Names: one name (not a list) is that of every call; without a column of names the tool is ``python``.
    Inputs: an object, or JSON text of one, is the call's arguments; other text is the argument ``code`` of ``python``
    or ``input`` of another tool. Outputs that are not text are written as JSON.

    Raises:
        DataError: there are not as many results as calls, or a value cannot be read as what its column holds.
    """
    if columns.calls is not None:
        return _parallel(row, columns.calls, columns.output)
    if columns.input is not None and columns.output is not None:
        return _sequential(row, columns.name, columns.input, columns.output)
    return []


def row_tools(row: Mapping[str, Any], messages: Iterable[Message]) -> list[dict[str, Any]] | None:
    """The definitions that go with the messages: the row's ``tools``, and ``PYTHON_TOOL`` where python is called.

    None if the row has no ``tools`` and calls a tool besides python, whose parameters nobody has told us.

    Raises:
        DataError: the column ``tools`` is no list of objects.
    """
    tools = _objects(row.get("tools"), "tools")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("column tools: needs a list of OpenAI tool definitions, each an object")
    definitions: list[dict[str, Any]] = without_none(tools)
    called = {call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    if (
        PYTHON in called
        and not any(_defines(tool, PYTHON) for tool in definitions)
        and (definitions or len(called) == 1)
    ):
        definitions.append(PYTHON_TOOL)
    return definitions or None


def _sequential(row: Mapping[str, Any], name: str | None, input: str, output: str) -> list[Message]:
    inputs = _values(row[input], input)
    outputs = _outputs(row[output], output, several=_is_list(row[input]), calls=len(inputs))
    names = [PYTHON] * len(inputs) if name is None else _names(row[name], name, len(inputs))
    lengths = {input: len(inputs), output: len(outputs)} | ({} if name is None else {name: len(names)})
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{column} {length}" for column, length in lengths.items())
        raise DataError(f"the tool columns have different numbers of values ({told}): each call needs one of each")
    messages: list[Message] = []
    for number, (tool, value, result) in enumerate(zip(names, inputs, outputs, strict=True), 1):
        identifier = f"call_{number}"
        call = _call(identifier, tool, _arguments(value, tool))
        messages += [{"role": "assistant", "tool_calls": [call]}, _answer(identifier, result)]
    return messages


def _parallel(row: Mapping[str, Any], column: str, output: str | None) -> list[Message]:
    given = _objects(row[column], column)
    calls = [_given_call(value, number, column) for number, value in enumerate(given, 1)]
    if output is None:
        outputs = [_own_output(value, number, column) for number, value in enumerate(given, 1)]
    else:
        outputs = _outputs(row[output], output, several=_is_list(row[column]), calls=len(calls))
    if len(outputs) != len(calls):
        raise DataError(
            f"the tool columns have different numbers of values ({column} {len(calls)}, {output} {len(outputs)}): "
            "each call needs one result"
        )
    if not calls:
        return []
    answers = [_answer(call["id"], result) for call, result in zip(calls, outputs, strict=True)]
    return [{"role": "assistant", "tool_calls": calls}, *answers]


def _given_call(value: Any, number: int, column: str) -> dict[str, Any]:
    """A call of the column, which may lack its id and type, and may hold name and arguments without ``function``."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DataError(
            f"column {column}, call {number}: {str(value)[:80]!r} is no OpenAI tool call: it needs "
            '{"function": {"name": …, "arguments": …}}'
        )
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else _arguments(arguments, name)
    return _call(value.get("id") or f"call_{number}", name, text)


def _own_output(call: Mapping[str, Any], number: int, column: str) -> Any:
    for key in ("output", "result"):
        if call.get(key) is not None:
            return call[key]
    raise DataError(
        f"column {column}, call {number}: has no result (output or result): name the column of the results with "
        "--tool-output-field"
    )


# --- values -----------------------------------------------------------------------------------------------------------


def _values(value: Any, column: str) -> list[Any]:
    """The column's value as a list."""
    if isinstance(value, str):
        if not value.strip():
            return []
        if _is_list(value):
            return list(json.loads(value))
        return [value]
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping | int | float):
        return [value]
    raise DataError(f"column {column}: is {type(value).__name__}, needs text, an object, or a list of either")


def _objects(value: Any, column: str) -> list[Any]:
    """The column's value as a list, with what is JSON text of an object decoded."""
    return [(_object(item) or item) if isinstance(item, str) else item for item in _values(value, column)]


def _outputs(value: Any, column: str, several: bool, calls: int) -> list[Any]:
    """The results; ``several`` where the calls are a list, so that a text may be JSON of one."""
    if isinstance(value, str) and calls and not several:
        return [value]
    outputs = _values(value, column)
    for number, output in enumerate(outputs, 1):
        if output is None:
            raise DataError(f"column {column}, value {number}: is null, but its call needs a result (it may be empty)")
    return outputs


def _names(value: Any, column: str, count: int) -> list[str]:
    names = _values(value, column)
    if len(names) == 1 and not _is_list(value):
        names *= count
    for number, name in enumerate(names, 1):
        if not isinstance(name, str) or not name:
            raise DataError(f"column {column}, value {number}: {name!r} is no name of a tool: it needs text")
    return names


def _arguments(value: Any, tool: str) -> str:
    """A call's arguments as OpenAI has them: JSON text of an object."""
    if value is None:
        return "{}"
    decoded = _object(value) if isinstance(value, str) else value
    if isinstance(decoded, Mapping):
        return _to_json(without_none(decoded))
    return _to_json({TEXT_ARGUMENTS.get(tool, "input"): _text(value)})


def _call(identifier: str, tool: str, arguments: str) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": tool, "arguments": arguments}}


def _answer(identifier: str, output: Any) -> Message:
    return {"role": "tool", "tool_call_id": identifier, "content": _text(output)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _to_json(value)


def _is_list(value: Any) -> bool:
    """Whether a value is a list, or JSON text of one."""
    if not isinstance(value, str):
        return isinstance(value, list | tuple)
    return value.lstrip().startswith("[") and isinstance(_json(value), list)


def _object(text: str) -> dict[str, Any] | None:
    """The object that a text is as JSON; None if it is none."""
    value = _json(text) if text.lstrip().startswith("{") else None
    return value if isinstance(value, dict) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _defines(tool: Mapping[str, Any], name: str) -> bool:
    function = tool.get("function")
    return isinstance(function, Mapping) and function.get("name") == name
