"""Validation and normalisation of OpenAI messages and their tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from numina_finetune.data.conversation import ROLES, Message
from numina_finetune.errors import DataError


def validate_messages(messages: Any, tools: Any = None) -> list[Message]:
    """A normalised copy of ``messages``: text parts joined into one string, ``None`` keys deleted.

    Args:
        messages: OpenAI chat messages.
        tools: OpenAI tool definitions, or None.

    Raises:
        DataError: every fault with its place, such as ``messages[3].tool_calls[0].function.arguments: …``.
    """
    faults: list[str] = []
    normalised = _messages(messages, faults)
    if not faults:
        faults += _unpaired_tool_messages(normalised)
        if not any(message["role"] == "assistant" for message in normalised):
            faults.append("messages: there is no assistant message, so there is nothing to learn")
    faults += _tool_faults(tools)
    if faults:
        raise DataError(faults)
    return normalised


def without_none(value: Any) -> Any:
    """A copy of ``value`` without ``None``-valued keys, which Arrow adds where it unifies the rows' structs."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def _messages(messages: Any, faults: list[str]) -> list[Message]:
    if not isinstance(messages, list | tuple) or not messages:
        faults.append(f"messages: {_kind(messages)}, needs a non-empty list of messages")
        return []
    return [_message(message, f"messages[{position}]", faults) for position, message in enumerate(messages)]


def _message(message: Any, place: str, faults: list[str]) -> Message:
    if not isinstance(message, Mapping):
        faults.append(f"{place}: {_kind(message)}, needs an object with role and content")
        return {}
    normalised: Message = without_none(message)
    role = normalised.get("role")
    if role not in ROLES:
        faults.append(f"{place}.role: {role!r} is unknown, use one of {', '.join(ROLES)}")
        return normalised
    if role == "assistant":
        _assistant(normalised, place, faults)
    else:
        _content(normalised, place, faults)
        if "tool_calls" in normalised:
            faults.append(f"{place}.tool_calls: a {role} message cannot call tools")
    if role == "tool" and not isinstance(normalised.get("tool_call_id"), str):
        faults.append(f"{place}.tool_call_id: {_kind(normalised.get('tool_call_id'))}, needs the id of a tool call")
    return normalised


def _assistant(message: Message, place: str, faults: list[str]) -> None:
    calls = message.get("tool_calls")
    if calls == []:  # Arrow's form of "no calls"
        del message["tool_calls"]
        calls = None
    if calls is not None:
        _calls(calls, f"{place}.tool_calls", faults)
    if "content" in message:
        _content(message, place, faults)
    elif calls is None:
        faults.append(f"{place}.content: missing, an assistant message needs content or tool_calls")


def _content(message: Message, place: str, faults: list[str]) -> None:
    """Checks ``message["content"]`` and joins its text parts in place."""
    content = message.get("content")
    if isinstance(content, list):
        content = message["content"] = _joined_parts(content, f"{place}.content", faults)
    if not isinstance(content, str):
        faults.append(f"{place}.content: {_kind(content)}, needs text or a list of text parts")
    elif not _encodable(content):
        faults.append(f"{place}.content: holds a lone surrogate, which is not valid Unicode text")


def _joined_parts(parts: list[Any], place: str, faults: list[str]) -> str:
    if not parts:
        faults.append(f"{place}: an empty list, needs at least one text part")
    texts = []
    for position, part in enumerate(parts):
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            faults.append(f"{place}[{position}]: {kind!r} is no text part, only text can be trained on")
    return "".join(texts)


def _calls(calls: Any, place: str, faults: list[str]) -> None:
    if not isinstance(calls, list):
        faults.append(f"{place}: {_kind(calls)}, needs a list of tool calls")
        return
    seen: set[str] = set()
    for position, call in enumerate(calls):
        where = f"{place}[{position}]"
        if not isinstance(call, Mapping):
            faults.append(f"{where}: {_kind(call)}, needs an object with id, type and function")
            continue
        identifier = call.get("id")
        if not isinstance(identifier, str) or not identifier:
            faults.append(f"{where}.id: {_kind(identifier)}, needs non-empty text")
        elif identifier in seen:
            faults.append(f"{where}.id: {identifier!r} names two calls of one message")
        else:
            seen.add(identifier)
        if call.get("type") != "function":
            faults.append(f"{where}.type: {call.get('type')!r}, needs 'function'")
        _function(call.get("function"), f"{where}.function", faults)


def _function(function: Any, place: str, faults: list[str]) -> None:
    if not isinstance(function, Mapping):
        faults.append(f"{place}: {_kind(function)}, needs an object with name and arguments")
        return
    if not isinstance(function.get("name"), str) or not function["name"]:
        faults.append(f"{place}.name: {_kind(function.get('name'))}, needs non-empty text")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        faults.append(f"{place}.arguments: {_kind(arguments)}, needs a JSON object as text")
        return
    try:
        decoded = json.loads(arguments)
    except ValueError as error:
        faults.append(f"{place}.arguments: {arguments[:80]!r} is not JSON ({error})")
        return
    if not isinstance(decoded, dict):
        faults.append(f"{place}.arguments: {arguments[:80]!r} is not a JSON object")


def _unpaired_tool_messages(messages: list[Message]) -> list[str]:
    """Calls without an answer before the next non-tool message, and answers without a call."""
    faults: list[str] = []
    waiting: dict[str, str] = {}  # call id -> place of the call
    for position, message in enumerate(messages):
        if message["role"] == "tool":
            identifier = message["tool_call_id"]
            if waiting.pop(identifier, None) is None:
                faults.append(f"messages[{position}].tool_call_id: {identifier!r} answers no open tool call")
            continue
        faults += _unanswered(waiting)
        waiting = {
            call["id"]: f"messages[{position}].tool_calls[{number}]"
            for number, call in enumerate(message.get("tool_calls", ()))
        }
    return faults + _unanswered(waiting)


def _unanswered(waiting: dict[str, str]) -> list[str]:
    return [
        f"{place}: the call {identifier!r} has no tool message that answers it before the next other message"
        for identifier, place in waiting.items()
    ]


def _tool_faults(tools: Any) -> list[str]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        return [f"tools: {_kind(tools)}, needs a list of tool definitions"]
    faults = []
    for position, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            faults.append(f"tools[{position}].function.name: missing, a tool needs a function with a name")
    return faults


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return "missing" if value is None else f"is {type(value).__name__}"
