"""Messages as datasets hold them -> OpenAI's current form, and the words in which faults are told.

Normalising never judges: what cannot be brought into form stays as it is, and the shape check names it. Only where the
value itself would be lost (content parts, arguments that are no JSON) is the fault told here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError


class Fault(NamedTuple):
    """What is wrong with a conversation, apart from where the conversation's own places begin."""

    position: int
    """Number of the message (or tool), −1 for the whole."""
    path: str
    """Place inside it, such as ``.tool_calls[0].id``."""
    words: str


class Normalised(NamedTuple):
    """Messages in form."""

    messages: list[Any]
    """Fresh copies; what is no object is kept as it was."""
    legacy: set[int]
    """Positions of the messages whose ``tool_calls`` were a ``function_call``."""
    faults: list[Fault]


def normalise_messages(messages: list[Any] | tuple[Any, ...]) -> Normalised:
    """Brings every message into form as far as that can be done without guessing.

    Raises:
        RecursionError: the messages are nested too deeply.
    """
    normal = Normalised([], set(), [])
    missing_ids = False
    for position, message in enumerate(messages):
        if isinstance(message, Mapping):
            message = _message(message, position, normal)
            missing_ids = missing_ids or (role_of(message) == "tool" and "tool_call_id" not in message)
        normal.messages.append(message)
    if missing_ids:
        _fill_answers(normal.messages)
    return normal


def role_of(message: Any) -> str | None:
    """The role of a message, None where it has none or is no message; every value may stand where a role should."""
    role = message.get("role") if isinstance(message, dict) else None
    return role if isinstance(role, str) else None


def without_none(value: Any) -> Any:
    """A copy of ``value`` without ``None``-valued keys, which Arrow adds where it unifies the rows' structs."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def decode_json(text: str) -> Any:
    """``text`` as strict JSON.

    Raises:
        ValueError: why it is none. Python's own decoder lets pass NaN, numbers that overflow and keys given twice.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from None
    except _NotJsonError:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # the interpreter's limit
        raise ValueError("a number has too many digits") from None


def is_encodable(value: Any) -> bool:
    """Whether all text in ``value`` can be written as UTF-8, and all keys are text."""
    if isinstance(value, str):
        return value.isascii() or _encodes(value)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not is_encodable(key) or not is_encodable(item):
                return False
        return True
    return not isinstance(value, list) or all(map(is_encodable, value))


def unencodable(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every (path, words) where ``is_encodable`` says no."""
    if isinstance(value, str) and not is_encodable(value):
        yield path, "holds a lone surrogate, which is not valid Unicode text"
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from unencodable(item, f"{path}[{position}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                yield path, f"has a key that {kind(key)}, needs text"
            elif not is_encodable(key):
                yield path, f"has the key {quoted(key)} with a lone surrogate, which is not valid Unicode text"
            else:
                yield from unencodable(item, f"{path}.{key}" if key.isidentifier() else f"{path}[{quoted(key)}]")


def shape_faults(error: ValidationError, needs: Mapping[str, str], *, many: bool) -> list[Fault]:
    """Pydantic's errors in our words.

    Args:
        needs: path, with ``[]`` for any number in it -> what is needed there.
        many: whether a list of messages, told apart by role, was checked; else one object, whose position is 0 here.
    """
    faults = []
    for entry in error.errors(include_url=False, include_context=False):
        location, value = entry["loc"], entry["input"]
        if entry["type"] == "string_unicode":
            continue  # unencodable tells it, for text in unknown keys too
        if entry["type"].startswith("union_tag"):  # no role, or an unknown one
            location, value = (*location, "", "role"), value.get("role")
        inside = location[2 if many else 0 :]
        need = needs["".join("[]" if isinstance(part, int) else f".{part}" for part in inside)]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)
        position = location[0] if many and isinstance(location[0], int) else 0
        faults.append(Fault(position, path, f"{_found(entry['type'], value)}, needs {need}"))
    return faults


def kind(value: Any) -> str:
    """What a value of the wrong type is."""
    return "missing" if value is None else f"is {type(value).__name__}"


def quoted(text: str) -> str:
    """``text`` on one line, shortened, in single quotes with none inside: reasons are counted without quoted text."""
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return "'" + repr(shown)[1:-1].replace("\\'", "'").replace("'", '"') + "'"


def _found(problem: str, value: Any) -> str:
    if problem == "missing" or value is None:
        return "missing"
    if isinstance(value, str | list) and not value:
        return "is empty"
    if isinstance(value, str) and not problem.endswith("_type"):
        return f"is {quoted(value)}"
    if problem.startswith(("greater", "less")) and abs(value) < 10**15:  # larger ones may be too long to print
        return f"is {quoted(str(value))}"
    return kind(value)


def _message(message: Mapping[str, Any], position: int, normal: Normalised) -> dict[str, Any]:
    """A copy in form; what was lost is told in ``normal.faults``, a legacy call noted in ``normal.legacy``."""
    copy = {
        key: value if isinstance(value, str) else without_none(value)
        for key, value in message.items()
        if value is not None
    }
    content = copy.get("content")
    if isinstance(content, list):
        copy["content"] = _joined_parts(content, position, normal.faults)
    role = role_of(copy)
    if role == "function":
        copy["role"] = "tool"
    elif role == "assistant" and "function_call" in copy and not copy.get("tool_calls"):
        copy["tool_calls"] = [{"type": "function", "function": copy.pop("function_call")}]
        normal.legacy.add(position)
    calls = copy.get("tool_calls")
    if isinstance(calls, list):
        if calls:
            _fill_calls(calls, position, normal.faults)
        else:
            del copy["tool_calls"]
    return copy


def _joined_parts(parts: list[Any], position: int, faults: list[Fault]) -> str:
    if not parts:
        faults.append(Fault(position, ".content", "is empty, needs at least one text part"))
    texts = []
    for number, part in enumerate(parts):
        path = f".content[{number}]"
        if not isinstance(part, dict):
            faults.append(Fault(position, path, f"{kind(part)}, needs a text part"))
        elif part.get("type") != "text":
            found = f"is {quoted(part['type'])}" if isinstance(part.get("type"), str) else "has no type"
            faults.append(Fault(position, path, f"{found}, only text can be trained on"))
        elif not isinstance(part.get("text"), str):
            faults.append(Fault(position, f"{path}.text", f"{kind(part.get('text'))}, needs text"))
        else:
            texts.append(part["text"])
    return "".join(texts)


def _fill_calls(calls: list[Any], position: int, faults: list[Fault]) -> None:
    """Writes arguments as text, and names what has no id or type, in place."""
    taken = {call["id"] for call in calls if isinstance(call, dict) and isinstance(call.get("id"), str)}
    for number, call in enumerate(calls):
        if not isinstance(call, dict):
            continue
        call.setdefault("type", "function")
        if "id" not in call:
            call["id"] = _fresh(f"call_{position}_{number}", taken)
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            try:
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError):
                function["arguments"] = "{}"
                words = "holds a value that JSON cannot write, such as NaN, bytes or a date: use numbers and text"
                faults.append(Fault(position, f".tool_calls[{number}].function.arguments", words))


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _fill_answers(messages: list[Any]) -> None:
    """Gives tool messages without an id the calls before them that no other one names, in order."""
    unnamed: Iterator[str] = iter(())
    for position, message in enumerate(messages):
        if role_of(message) != "tool":
            unnamed = _calls_nobody_names(messages, position)
        elif "tool_call_id" not in message and (identifier := next(unnamed, None)) is not None:
            message["tool_call_id"] = identifier


def _calls_nobody_names(messages: list[Any], position: int) -> Iterator[str]:
    """Ids of the calls of a message that none of the tool messages right after it answers by id."""
    calls = messages[position].get("tool_calls") if isinstance(messages[position], dict) else None
    if not isinstance(calls, list):
        return
    named = set()
    for answer in messages[position + 1 :]:
        if role_of(answer) != "tool":
            break
        if isinstance(answer.get("tool_call_id"), str):
            named.add(answer["tool_call_id"])
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("id"), str) and call["id"] not in named:
            yield call["id"]


class _NotJsonError(ValueError):
    """What Python's decoder would let pass."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _NotJsonError("a key is given twice in one object")
    return result


def _constant(name: str) -> NoReturn:
    raise _NotJsonError(f"{name} is no JSON number")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _NotJsonError("a number is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
