"""OpenAI's own JSON schema and generated conversations against our validation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from numina_finetune.data.tool_calls import validate_conversation, validate_messages, validate_tools
from numina_finetune.errors import DataError

SAY = {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def openai_schema(real_data: Path) -> Draft202012Validator:
    schema = json.loads((real_data / "openai_schema" / "chat_messages.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def openai_tool_schema(openai_schema: Draft202012Validator) -> Draft202012Validator:
    tools = {"type": "array", "items": {"$ref": "#/$defs/ChatCompletionTool"}}
    return Draft202012Validator(tools | {"$defs": openai_schema.schema["$defs"]})


def without_our_keys(messages):
    return [{key: value for key, value in message.items() if key != "no_loss"} for message in messages]


def accepted(validate, *values):
    """What ``validate`` returns, None where it refuses; any exception but DataError passes through."""
    try:
        return validate(*values)
    except DataError:
        return None


# --- generated conversations

text = st.text(max_size=12)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=3)
    | st.sampled_from(["\ud800", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.sampled_from(["\udc00", "role", "type"]), inner)
    ),
    max_leaves=6,
)
contents = text | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), min_size=1, max_size=3)
arguments = st.dictionaries(text, json_values, max_size=3)


def with_nones(message: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("name", "tool_calls", "function_call", "tool_call_id", "weight"), None) | message


@st.composite
def tool_rounds(draw):
    """An assistant message that calls tools, in today's form or the legacy one, and the answers."""
    content = draw(st.none() | contents)
    if draw(st.booleans()):
        function_call = {"name": draw(names), "arguments": draw(arguments | arguments.map(json.dumps))}
        message = {"role": "assistant", "content": content, "function_call": function_call}
        return [message, {"role": "function", "name": function_call["name"], "content": draw(text)}]
    named = draw(st.booleans())
    calls, answers = [], []
    for identifier in draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3, unique=True)):
        function = {"name": draw(names), "arguments": draw(arguments | arguments.map(json.dumps))}
        calls.append({"function": function} | ({"id": identifier, "type": "function"} if named else {}))
        answers.append({"role": "tool", "content": draw(contents)} | ({"tool_call_id": identifier} if named else {}))
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *answers]


prompts = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user"]), "content": contents}, optional={"name": text}
)
replies = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": contents},
    optional={"weight": st.sampled_from([0, 1]), "name": text, "refusal": text, "tool_calls": st.just([])},
)
conversations = st.lists(
    tool_rounds() | st.tuples(prompts).map(list) | st.tuples(replies).map(list), min_size=1, max_size=4
).map(lambda rounds: [with_nones(message) for messages in rounds for message in messages] + [SAY])


def places(value: Any, path: tuple[Any, ...] = ()):
    """Where something stands in nested lists and dicts."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def damaged(draw, whole):
    """A value with anything put in one place of it, or that place deleted."""
    value = copy.deepcopy(draw(whole))
    *path, last = draw(st.sampled_from(list(places(value))))
    parent = value
    for key in path:
        parent = parent[key]
    if draw(st.booleans()):
        del parent[last]
    else:
        parent[last] = draw(anything)
    return value


schemas = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "string", "dict", ["object", "null"]]),
        "properties": st.dictionaries(text, st.booleans() | st.just({"type": "string", "multipleOf": 0.1}), max_size=2),
        "required": st.lists(text, max_size=2),
        "additionalProperties": st.booleans(),
        "$ref": st.sampled_from(["#", "#/properties", "http://[", "urn:x", "#/$defs/a"]),
        "$id": st.sampled_from(["http://a/b", "http://[", "#", "urn:x"]),
        "$schema": st.sampled_from(["http://json-schema.org/draft-07/schema#", "urn:none", "x"]),
        "pattern": st.sampled_from(["(", "a{99999999999}", "^a"]),
        "multipleOf": st.sampled_from([0, 0.5, 1e-300, 10**400]),
    },
)
tool_lists = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("fg") | names, "parameters": schemas}), min_size=1, max_size=2
)

generated = settings(max_examples=100, deadline=None, database=None)


# --- what is accepted satisfies OpenAI's schema


@generated
@given(messages=conversations)
def test_conversations_in_any_accepted_form_become_openais(openai_schema, messages):
    before = copy.deepcopy(messages)
    normal = validate_messages(messages)
    assert messages == before
    assert [error.message for error in openai_schema.iter_errors(normal)] == []
    assert validate_messages(normal) == normal
    assert len(normal) == len(messages)


@generated
@given(messages=damaged(conversations))
def test_damaged_conversations_are_refused_or_become_openais(openai_schema, messages):
    normal = accepted(validate_messages, messages)
    if normal is None:
        return
    assert [error.message for error in openai_schema.iter_errors(without_our_keys(normal))] == []
    assert validate_messages(normal) == normal


def test_real_conversations_become_openais(openai_schema, openai_tool_schema, real_rows):
    for row in real_rows("toolcalls/glaive_openai.jsonl"):
        normal = validate_messages(row["messages"])
        assert [error.message for error in openai_schema.iter_errors(normal)] == []
        assert validate_messages(normal) == normal
        tools = validate_tools(row["tools"])
        assert [error.message for error in openai_tool_schema.iter_errors(tools or [])] == []
        assert validate_tools(tools) == tools


@generated
@given(tools=damaged(tool_lists) | tool_lists)
def test_tools_are_refused_or_become_openais(openai_tool_schema, tools):
    normal = accepted(validate_tools, tools)
    assert [error.message for error in openai_tool_schema.iter_errors(normal or [])] == []
    assert validate_tools(normal) == normal


# --- what OpenAI's schema refuses is refused

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        "hi",
        {},
        {"role": "bot", "content": "q"},
        {"role": "User", "content": "q"},
        {"role": "system"},
        {"role": "developer", "content": None},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": "user", "content": []},
        {"role": "user", "content": ["q"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "user", "content": "q", "name": 3},
        {"role": "system", "content": [{"type": "image_url", "image_url": {"url": "https://example.org"}}]},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": {"text": "a"}},
        {"role": "assistant", "content": "a", "name": ["x"]},
        {"role": "assistant", "content": "a", "refusal": 3},
        {"role": "assistant", "content": "a", "audio": {}},
        {"role": "assistant", "content": "a", "tool_calls": {"id": "c"}},
        {"role": "assistant", "content": "a", "tool_calls": ["c"]},
        {"role": "assistant", "tool_calls": [CALL | {"id": 3}]},
        {"role": "assistant", "tool_calls": [CALL | {"type": "code"}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]},
        {"role": "assistant", "tool_calls": [CALL | {"function": {"arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": 3}}]},
        {"role": "assistant", "function_call": "auto"},
        {"role": "assistant", "function_call": {"name": "f"}},
        {"role": "tool", "content": "r"},
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "tool", "tool_call_id": "c", "content": []},
        {"role": "tool", "tool_call_id": 3, "content": "r"},
        {"role": "function", "content": "r"},
    ],
)
def test_messages_that_openais_schema_refuses_are_refused(openai_schema, message):
    assert not openai_schema.is_valid([message, SAY])
    with pytest.raises(DataError):
        validate_messages([message, SAY])


# --- nothing but DataError


@generated
@given(messages=anything | st.lists(anything, max_size=3), tools=anything | st.lists(anything, max_size=2))
def test_arbitrary_values_raise_data_errors_only(messages, tools):
    with pytest.raises(DataError):
        validate_conversation(messages, tools)


@generated
@given(tools=tool_lists, arguments=arguments, name=st.sampled_from("fg"))
def test_odd_schemas_raise_data_errors_only(tools, arguments, name):
    call = {"function": {"name": name, "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    conversation = accepted(validate_conversation, messages, tools)
    assert conversation is None or conversation.tools == validate_tools(tools)


def test_circular_values_raise_data_errors():
    message: dict[str, Any] = {"role": "user", "content": "q"}
    message["self"] = message
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"again": schema}
    with pytest.raises(DataError) as caught:
        validate_conversation([message, SAY], [{"name": "f", "parameters": schema}])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["messages", "tools"]


@generated
@given(value=arguments)
def test_arguments_survive_the_way_to_text(value):
    call = {"function": {"name": "f", "arguments": value}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    written = validate_messages(messages)[0]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(written) == value
