"""Validation of OpenAI conversations: their shape, the protocol of tool calls, and the calls' arguments.

Source: https://platform.openai.com/docs/api-reference/chat/create (messages) and the fine-tuning format (weight).
The shapes are pydantic's to check; what no schema can say is checked here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Discriminator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from numina_finetune.data.conversation import ROLES, Conversation, Message
from numina_finetune.data.normalise import (
    Fault,
    Normalised,
    decode_json,
    is_encodable,
    kind,
    normalise_messages,
    quoted,
    role_of,
    shape_faults,
    unencodable,
    without_none,
)
from numina_finetune.data.tool_schemas import NAME_NEED, FunctionName, Toolbox, read_tools
from numina_finetune.errors import DataError

__all__ = ["validate_conversation", "validate_messages", "validate_tools", "without_none"]


def validate_messages(messages: Any, tools: Any = None) -> list[Message]:
    """A normalised copy of ``messages``.

    ``None`` keys and empty ``tool_calls`` are deleted, text parts joined, arguments written as JSON text, missing call
    ids and types filled in, and the legacy ``function_call`` and ``function`` messages rewritten.

    Args:
        messages: OpenAI chat messages.
        tools: OpenAI tool definitions (see :func:`validate_tools`), which the calls must fit.

    Raises:
        DataError: every fault with its place, such as ``messages[3].tool_calls[0].function.arguments: …``.
    """
    return validate_conversation(messages, tools).messages


def validate_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A normalised copy of ``tools``; None where there are none.

    Args:
        tools: OpenAI tool definitions, or bare ``{"name", "parameters"}`` functions, which are wrapped; the list, each
            of them, or its parameters may be JSON text.

    Raises:
        DataError: every fault with its place, such as ``tools[0].function.parameters: …``.
    """
    box = read_tools(tools)
    if box.faults:
        raise DataError(box.faults)
    return box.tools


def validate_conversation(messages: Any, tools: Any = None) -> Conversation:
    """Messages and tools as :func:`validate_messages` and :func:`validate_tools` normalise them.

    Raises:
        DataError: every fault of both, with its place.
    """
    box = read_tools(tools)
    normal: list[Message] = []
    if not isinstance(messages, list | tuple) or not messages:
        found = "is empty" if isinstance(messages, list | tuple) else kind(messages)
        problems = [f"messages: {found}, needs a list of messages with at least one of the assistant's"]
    else:
        try:
            normal, problems = _checked(messages, box)
        except RecursionError:
            problems = ["messages: are nested too deeply"]
    if problems or box.faults:
        raise DataError(problems + box.faults)
    return Conversation(normal, box.tools)


class _Function(TypedDict):
    name: FunctionName
    arguments: str


class _Call(TypedDict):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: _Function


class _Prompt(TypedDict):
    role: Literal["system", "developer", "user"]
    content: str
    name: NotRequired[str]


class _Assistant(TypedDict):
    role: Literal["assistant"]
    content: NotRequired[str]
    tool_calls: NotRequired[list[_Call]]
    name: NotRequired[str]
    refusal: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    weight: NotRequired[Annotated[int, Field(ge=0, le=1)]]
    no_loss: NotRequired[list[Annotated[list[int], Field(min_length=2, max_length=2)]]]


class _Answer(TypedDict):
    role: Literal["tool"]
    tool_call_id: Annotated[str, Field(min_length=1)]
    content: str
    name: NotRequired[str]


_MESSAGES = TypeAdapter(
    list[Annotated[_Prompt | _Assistant | _Answer, Discriminator("role")]], config=ConfigDict(strict=True)
)

_NEEDS = {
    "": "an object with role and content",
    ".role": f"one of {', '.join(ROLES)}",
    ".content": "text or a list of text parts",
    ".name": "text",
    ".refusal": "text",
    ".reasoning_content": "text",
    ".reasoning": "text",
    ".thinking": "text",
    ".tool_call_id": "the id of an open tool call",
    ".tool_calls": "a list of tool calls",
    ".tool_calls[]": "an object with id, type and function",
    ".tool_calls[].id": "non-empty text",
    ".tool_calls[].type": "'function', the only kind of call that can be trained on",
    ".tool_calls[].function": "an object with name and arguments",
    ".tool_calls[].function.name": NAME_NEED,
    ".tool_calls[].function.arguments": "a JSON object as text",
    ".weight": "0 or 1",
    ".no_loss": "a list of [start, end]",
    ".no_loss[]": "[start, end]",
    ".no_loss[][]": "a whole number",
}


def _checked(messages: list[Any] | tuple[Any, ...], box: Toolbox) -> tuple[list[Message], list[str]]:
    """The messages in form, and every problem with them, in the order of the messages."""
    normal = normalise_messages(messages)
    faults = normal.faults
    try:
        _MESSAGES.validate_python(normal.messages)
    except ValidationError as error:
        faults += shape_faults(error, _NEEDS, many=True)
    unranged = {fault.position for fault in faults if fault.path.startswith((".no_loss", ".content"))}
    for position, message in enumerate(normal.messages):
        if not isinstance(message, dict):
            continue
        if not is_encodable(message):
            faults += [Fault(position, path, words) for path, words in unencodable(message)]
        if role_of(message) == "assistant":
            faults += _assistant_faults(message, position, box)
            if "no_loss" in message and position not in unranged:
                faults += _range_faults(message, position)
        elif "tool_calls" in message or "function_call" in message:
            key = "tool_calls" if "tool_calls" in message else "function_call"
            faults.append(Fault(position, f".{key}", "only an assistant message can call tools"))
    faults += _pairing_faults(normal.messages)
    faults += _silence_faults(normal.messages)
    return normal.messages, _told(normal) if faults else []


def _assistant_faults(message: Message, position: int, box: Toolbox) -> list[Fault]:
    faults = []
    if "content" not in message and "tool_calls" not in message:
        faults.append(Fault(position, ".content", "missing, an assistant message needs content or tool_calls"))
    if "audio" in message:
        faults.append(Fault(position, ".audio", "is no text, only text can be trained on"))
    if "function_call" in message:
        faults.append(Fault(position, ".function_call", "stands beside tool_calls: keep tool_calls alone"))
    calls = message.get("tool_calls")
    seen: set[str] = set()
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        if not isinstance(call, dict):
            continue
        path = f".tool_calls[{number}]"
        identifier = call["id"]
        if isinstance(identifier, str):
            if identifier in seen:
                faults.append(Fault(position, f"{path}.id", f"{quoted(identifier)} names two calls of one message"))
            seen.add(identifier)
        if isinstance(call.get("function"), dict):
            faults += [Fault(position, f"{path}.function{inner}", words) for inner, words in _function(call, box)]
    return faults


def _function(call: dict[str, Any], box: Toolbox) -> list[tuple[str, str]]:
    """What is wrong with a call's function, as (path, words): its arguments, and whether it is among the tools."""
    name, arguments = call["function"].get("name"), call["function"].get("arguments")
    faults = []
    schema = None
    if isinstance(name, str) and box.tools is not None:
        schema = box.schemas.get(name)
        if name not in box.schemas and not box.faults:  # it may be the name of the faulty tool
            faults.append((".name", f"{quoted(name)} is none of the tools, which are {quoted(', '.join(box.schemas))}"))
    if not isinstance(arguments, str):
        return faults
    try:
        decoded = decode_json(arguments)
    except ValueError as error:
        return [*faults, (".arguments", f"{quoted(arguments)} is not JSON ({error})")]
    if not isinstance(decoded, dict):
        return [*faults, (".arguments", f"{quoted(arguments)} is not a JSON object")]
    if "\\u" in arguments and not is_encodable(decoded):
        faults.append((".arguments", "holds an escaped lone surrogate, which is not valid Unicode text"))
    if schema is not None:
        faults += [(".arguments", f"does not fit the tool: {words}") for words in schema.faults(decoded)]
    return faults


def _range_faults(message: Message, position: int) -> list[Fault]:
    """Where ``no_loss`` is not ascending, apart and inside the content."""
    content = message.get("content", "")
    if not isinstance(content, str):
        return []
    faults = []
    least = 0
    for number, (start, end) in enumerate(message["no_loss"]):
        if not least <= start < end <= len(content):
            words = "is no range of the content that begins after the one before it: needs start < end, in characters"
            faults.append(Fault(position, f".no_loss[{number}]", words))
        least = max(least, end + 1)
    return faults


def _pairing_faults(messages: list[Any]) -> list[Fault]:
    """Calls without an answer before the next message that is no answer, and answers without a call.

    Where a message is too faulty to tell, neither it nor the answers to it are judged: it has a fault already.
    """
    faults: list[Fault] = []
    waiting: dict[str, list[Fault]] | None = {}  # call id -> what to say where it stays unanswered; None = cannot tell
    for position, message in enumerate(messages):
        if role_of(message) == "tool":
            identifier = message.get("tool_call_id")
            if waiting is None or not isinstance(identifier, str) or not identifier:
                continue
            if waiting.get(identifier):
                waiting[identifier].pop(0)
            else:
                faults.append(Fault(position, ".tool_call_id", f"{quoted(identifier)} answers no open tool call"))
            continue
        faults += _unanswered(waiting)
        waiting = _calls_to_answer(message, position)
    return faults + _unanswered(waiting)


def _unanswered(waiting: dict[str, list[Fault]] | None) -> list[Fault]:
    return [fault for faults in (waiting or {}).values() for fault in faults]


def _calls_to_answer(message: Any, position: int) -> dict[str, list[Fault]] | None:
    role = role_of(message)
    if role not in ROLES:
        return None
    waiting: dict[str, list[Fault]] = {}
    calls = message.get("tool_calls", ()) if role == "assistant" else ()
    if not isinstance(calls, list | tuple):
        return None
    for number, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call["id"], str) or not call["id"]:
            return None
        words = f"the call {quoted(call['id'])} has no tool message that answers it before the next other message"
        waiting.setdefault(call["id"], []).append(Fault(position, f".tool_calls[{number}]", words))
    return waiting


def _silence_faults(messages: list[Any]) -> list[Fault]:
    """Without an assistant message there is nothing to learn; not said where a role is unknown and may be meant."""
    roles = [role_of(message) for message in messages]
    if "assistant" in roles or any(role not in ROLES for role in roles):
        return []
    return [Fault(-1, "", "there is no assistant message, so there is nothing to learn")]


def _told(normal: Normalised) -> list[str]:
    """The faults as problems, in the order of the messages."""
    problems = []
    for position, path, words in sorted(normal.faults, key=lambda fault: fault.position):
        if position in normal.legacy:
            path = path.replace(".tool_calls[0].function", ".function_call").replace(".tool_calls[0]", ".function_call")
        place = f"messages[{position}]" if position >= 0 else "messages"
        problems.append(f"{place}{path}: {words}")
    return problems
