import copy
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from numina_finetune.data import validate_messages
from numina_finetune.data.conversation import Conversation
from numina_finetune.data.tool_calls import validate_conversation, validate_tools
from numina_finetune.errors import DataError

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def call(identifier="c1", name="f", arguments='{"x": 1}', **more):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}} | more


def answer(identifier="c1", **more):
    return {"role": "tool", "tool_call_id": identifier, "content": "r"} | more


def talk(*calls, answers=("c1",)):
    return [ASK, {"role": "assistant", "content": None, "tool_calls": list(calls)}, *map(answer, answers), SAY]


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS} | more}


def problems(messages, tools=None):
    with pytest.raises(DataError) as caught:
        validate_messages(messages, tools)
    return caught.value.problems


def without(message, *keys):
    return {key: value for key, value in message.items() if key not in keys}


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


# --- what is brought into form


def test_none_keys_are_deleted_wherever_they_stand():
    messages = [
        {"role": "user", "content": "q", "tool_calls": None, "name": None, "meta": {"a": None, "b": [{"c": None}]}},
        {"role": "assistant", "content": None, "tool_calls": [call(index=None)]},
        answer(name=None),
        SAY,
    ]
    expected = [{"role": "user", "content": "q", "meta": {"b": [{}]}}, {"role": "assistant", "tool_calls": [call()]}]
    assert validate_messages(messages) == [*expected, answer(), SAY]


def test_empty_lists_of_calls_are_deleted():
    assert validate_messages([ASK | {"tool_calls": []}, SAY | {"tool_calls": []}]) == [ASK, SAY]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2", "image_url": None}]
    assert validate_messages([{"role": "user", "content": parts}, SAY])[0] == {"role": "user", "content": "1+2"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x": 1, "filled": None, "deep": {"filled": None, "kept": "é"}}, '{"x": 1, "deep": {"kept": "é"}}'),
        ({}, "{}"),
        ('{"x":1,  "null": null}', '{"x":1,  "null": null}'),
    ],
)
def test_arguments_become_json_text_and_text_is_kept_as_it_is(arguments, text):
    messages = validate_messages(talk(call(arguments=arguments)))
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == text


def test_missing_types_and_ids_are_filled_in_and_answers_take_the_calls_in_order():
    bare = {"function": {"name": "f", "arguments": "{}"}}
    calls = [bare, bare | {"id": None, "type": None}, call("call_1_3"), bare]
    anonymous = without(answer(), "tool_call_id")
    answers = [anonymous, answer("call_1_3"), anonymous | {"tool_call_id": None}, anonymous]
    messages = validate_messages([ASK, {"role": "assistant", "tool_calls": calls}, *answers, SAY])
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["call_1_0", "call_1_1", "call_1_3", "call_1_3_"]
    assert {call["type"] for call in messages[1]["tool_calls"]} == {"function"}
    assert [m["tool_call_id"] for m in messages[2:6]] == ["call_1_0", "call_1_3", "call_1_1", "call_1_3_"]


def test_legacy_function_calls_become_tool_calls_with_answers():
    legacy = [
        ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "r"},
        SAY,
    ]
    assert validate_messages(legacy, [tool()]) == [
        ASK,
        {"role": "assistant", "tool_calls": [call("call_1_0")]},
        answer("call_1_0", name="f"),
        SAY,
    ]


def test_ids_may_recur_in_later_messages():
    assert validate_messages(talk(call()) + talk(call())) == [*validate_messages(talk(call()))] * 2


def test_every_call_of_a_message_is_answered_in_any_order():
    assert len(validate_messages(talk(call("a"), call("b"), answers=("b", "a")))) == 5


@pytest.mark.parametrize(
    "tools",
    [
        [tool()],
        (tool(),),
        [tool()["function"]],
        [{"type": "function", **tool()["function"]}],
        [{"type": None, "function": tool()["function"]}],
        [json.dumps(tool())],
        json.dumps([tool()["function"]]),
        [tool(parameters=json.dumps(PARAMETERS))],
        [tool(parameters={**PARAMETERS, "default": None}, strict=None, description=None)],
    ],
)
def test_tools_are_read_from_json_text_and_bare_functions(tools):
    assert validate_tools(tools) == [tool()]
    assert validate_conversation(talk(call()), tools) == Conversation(validate_messages(talk(call())), [tool()])


@pytest.mark.parametrize("tools", [None, [], (), "", "[]", "null"])
def test_no_tools_are_none(tools):
    assert validate_tools(tools) is None
    assert validate_conversation([ASK, SAY], tools).tools is None


@pytest.mark.parametrize("parameters", ["", "null", None])
def test_tool_without_parameters_takes_any_arguments(parameters):
    assert validate_tools([tool(parameters=parameters)]) == [{"type": "function", "function": {"name": "f"}}]
    assert validate_messages(talk(call(arguments='{"any": "thing"}')), [tool(parameters=parameters)])


def test_input_is_not_modified():
    messages = talk(call(arguments={"x": 1, "y": None}), {"function": {"name": "f", "arguments": {"x": 2}}}, answers=())
    messages[2:2] = [answer(), {"role": "function", "name": "f", "content": [{"type": "text", "text": "r"}]}]
    tools = [tool(parameters=json.dumps(PARAMETERS), strict=None), tool("g")["function"]]
    before = copy.deepcopy((messages, tools))
    normal, normal_tools = validate_messages(messages, tools), validate_tools(tools)
    assert (messages, tools) == before
    normal[1]["tool_calls"][0]["function"]["name"] = "changed"
    normal_tools[1]["function"]["parameters"]["required"].append("changed")
    assert (messages, tools) == before
    assert validate_tools(tools)[1] == tool("g")


def test_our_own_keys_are_kept():
    marked = {"role": "assistant", "content": "abcdef", "weight": 1, "no_loss": [[0, 2], (3, 6)], "reasoning": "r"}
    assert validate_messages([ASK, marked])[1] == marked | {"no_loss": [[0, 2], [3, 6]]}


# --- what is a fault

MESSAGE_FAULTS = [
    (3, "messages[0]", "is int"),
    (None, "messages[0]", "missing"),
    ({"content": "q"}, "messages[0].role", "missing"),
    ({"role": "bot", "content": "q"}, "messages[0].role", "'bot'"),
    ({"role": ["user"], "content": "q"}, "messages[0].role", "is list"),
    ({"role": "user", "content": None}, "messages[0].content", "missing"),
    ({"role": "user", "content": 3}, "messages[0].content", "is int"),
    ({"role": "user", "content": {"text": "q"}}, "messages[0].content", "is dict"),
    ({"role": "user", "content": []}, "messages[0].content", "is empty"),
    ({"role": "user", "content": ["q"]}, "messages[0].content[0]", "is str"),
    ({"role": "user", "content": [{"text": "q"}]}, "messages[0].content[0]", "has no type"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "missing"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]", "only text can be trained on"),
    ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]", "only text can be trained on"),
    ({"role": "user", "content": "\ud83d"}, "messages[0].content", "lone surrogate"),
    ({"role": "user", "content": "q", "m": [{"a b": "\udc00"}]}, "messages[0].m[0]['a b']", "lone surrogate"),
    ({"role": "user", "content": "q", "m": {"\udc00": 1}}, "messages[0].m", "lone surrogate"),
    ({"role": "user", "content": "q", 3: 4}, "messages[0]", "key"),
    ({"role": "user", "content": "q", "name": 3}, "messages[0].name", "is int"),
    ({"role": "user", "content": "q", "tool_calls": [call()]}, "messages[0].tool_calls", "only an assistant"),
    ({"role": "system", "content": "q", "function_call": {}}, "messages[0].function_call", "only an assistant"),
    ({"role": "developer"}, "messages[0].content", "missing"),
    ({"role": "assistant"}, "messages[0].content", "content or tool_calls"),
    ({"role": "assistant", "refusal": "no"}, "messages[0].content", "content or tool_calls"),
    (SAY | {"refusal": 3}, "messages[0].refusal", "is int"),
    (SAY | {"audio": {"id": "a"}}, "messages[0].audio", "only text can be trained on"),
    (SAY | {"reasoning_content": ["r"]}, "messages[0].reasoning_content", "is list"),
    (SAY | {"weight": 2}, "messages[0].weight", "'2', needs 0 or 1"),
    (SAY | {"weight": 0.5}, "messages[0].weight", "is float"),
    (SAY | {"weight": True}, "messages[0].weight", "is bool"),
    (SAY | {"no_loss": {"start": 0}}, "messages[0].no_loss", "is dict"),
    (SAY | {"no_loss": [[0, 1, 1]]}, "messages[0].no_loss[0]", "[start, end]"),
    (SAY | {"no_loss": [[0, 1.0]]}, "messages[0].no_loss[0][1]", "is float"),
    (SAY | {"no_loss": [[0, 2]]}, "messages[0].no_loss[0]", "range"),
    (SAY | {"no_loss": [[-1, 1]]}, "messages[0].no_loss[0]", "range"),
    (SAY | {"no_loss": [[1, 1]]}, "messages[0].no_loss[0]", "range"),
    ({"role": "assistant", "content": "abcd", "no_loss": [[2, 3], [0, 1]]}, "messages[0].no_loss[1]", "range"),
    ({"role": "assistant", "content": "abcd", "no_loss": [[0, 2], [2, 3]]}, "messages[0].no_loss[1]", "range"),
    (SAY | {"tool_calls": {}}, "messages[0].tool_calls", "is dict"),
    (SAY | {"tool_calls": [3]}, "messages[0].tool_calls[0]", "is int"),
    (without(answer(), "tool_call_id"), "messages[0].tool_call_id", "missing"),
    ({"role": "function", "name": "f", "content": "r"}, "messages[0].tool_call_id", "missing"),
    (answer(), "messages[0].tool_call_id", "answers no open tool call"),
]

CALL_FAULTS = [
    (call(id=3), "id", "is int"),
    (call(id=""), "id", "is empty"),
    (call(type="custom"), "type", "'custom'"),
    (call(function=None), "function", "missing"),
    (call(function="f"), "function", "is str"),
    (call(name=None), "function.name", "missing"),
    (call(name=""), "function.name", "is empty"),
    (call(name="a.b"), "function.name", "'a.b'"),
    (call(name="a\n"), "function.name", "'a\\n'"),
    (call(name="a" * 65), "function.name", "1 to 64"),
    (call(arguments=None), "function.arguments", "missing"),
    (call(arguments=[1]), "function.arguments", "is list"),
    (call(arguments=""), "function.arguments", "is not JSON"),
    (call(arguments='{"x": '), "function.arguments", "is not JSON"),
    (call(arguments="{'x': 1}"), "function.arguments", "is not JSON"),
    (call(arguments="[1]"), "function.arguments", "is not a JSON object"),
    (call(arguments='{"x": NaN}'), "function.arguments", "NaN"),
    (call(arguments='{"x": -Infinity}'), "function.arguments", "-Infinity"),
    (call(arguments='{"x": 1e999}'), "function.arguments", "too large"),
    (call(arguments='{"x": %s}' % ("9" * 5000)), "function.arguments", "too many digits"),
    (call(arguments='{"x": 1, "x": 2}'), "function.arguments", "twice"),
    (call(arguments='{"x":' * 100_000), "function.arguments", "nested too deeply"),
    (call(arguments='{"x": "\\ud83d"}'), "function.arguments", "lone surrogate"),
    (call(arguments='{"x": "\ud83d"}'), "function.arguments", "lone surrogate"),
    (call(arguments={"x": "\ud83d"}), "function.arguments", "lone surrogate"),
    (call(arguments={"x": float("nan")}), "function.arguments", "JSON cannot write"),
    (call(arguments={"x": b"bytes"}), "function.arguments", "JSON cannot write"),
    (call(note="\ud83d"), "note", "lone surrogate"),
]


@pytest.mark.parametrize(("message", "place", "words"), MESSAGE_FAULTS)
def test_fault_of_a_message_is_the_only_one_told_and_has_its_place(message, place, words):
    (problem,) = problems([message, ASK, SAY])
    assert problem.startswith(f"{place}: ")
    assert words in problem


@pytest.mark.parametrize(("faulty", "place", "words"), CALL_FAULTS)
def test_fault_of_a_call_is_the_only_one_told_and_has_its_place(faulty, place, words):
    (problem,) = problems(talk(call("c2"), faulty, answers=("c2", "c1")))
    assert problem.startswith(f"messages[1].tool_calls[1].{place}: ")
    assert words in problem


@pytest.mark.parametrize(
    ("messages", "place", "words"),
    [
        ([], "messages", "is empty"),
        (None, "messages", "missing"),
        ({"role": "user"}, "messages", "is dict"),
        ([ASK], "messages", "no assistant message"),
        (talk(call(), call(), answers=("c1", "c1")), "messages[1].tool_calls[1].id", "names two calls"),
        (talk(call(), answers=()), "messages[1].tool_calls[0]", "no tool message"),
        (talk(call(), call("c2")), "messages[1].tool_calls[1]", "no tool message"),
        (talk(call())[:2], "messages[1].tool_calls[0]", "no tool message"),
        ([*talk(call()), answer()], "messages[4].tool_call_id", "answers no open tool call"),
        (talk(call(), answers=("c1", "c1")), "messages[3].tool_call_id", "answers no open tool call"),
        (talk(call(), answers=("c1", "c9")), "messages[3].tool_call_id", "'c9'"),
        ([nested(100_000), SAY], "messages", "nested too deeply"),
    ],
)
def test_fault_of_the_conversation_is_told_with_its_place(messages, place, words):
    (problem,) = problems(messages)
    assert problem.startswith(f"{place}: ")
    assert words in problem


@pytest.mark.parametrize(
    ("legacy", "place"),
    [
        ({"name": "f"}, ".arguments"),
        ({"name": "f", "arguments": "{"}, ".arguments"),
        ({"name": "a.b", "arguments": "{}"}, ".name"),
        ("auto", ""),
    ],
)
def test_fault_of_a_legacy_call_has_the_place_where_it_was_written(legacy, place):
    messages = [ASK, {"role": "assistant", "function_call": legacy}, {"role": "function", "content": "r"}, SAY]
    (problem,) = problems(messages)
    assert problem.startswith(f"messages[1].function_call{place}: ")
    assert problems([ASK, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}])[0].startswith(
        "messages[1].function_call: the call"
    )


def test_legacy_call_beside_tool_calls_is_refused():
    messages = talk(call())
    messages[1]["function_call"] = {"name": "f", "arguments": "{}"}
    assert problems(messages)[0].startswith("messages[1].function_call: ")


@pytest.mark.parametrize(
    ("tools", "place", "words"),
    [
        (3, "tools", "is int"),
        ({"type": "function"}, "tools", "is dict"),
        ("[{", "tools", "is not JSON"),
        ([3], "tools[0]", "is int"),
        (["{"], "tools[0]", "is not JSON"),
        ([{"type": "function"}], "tools[0].function", "missing"),
        ([{"type": "custom", "function": {"name": "f"}}], "tools[0].type", "'custom'"),
        ([tool(name=None)], "tools[0].function.name", "missing"),
        ([tool(name="a b")], "tools[0].function.name", "'a b'"),
        ([tool("g"), tool("g")], "tools[1].function.name", "'g' is the name of an earlier tool"),
        ([tool(description=3)], "tools[0].function.description", "is int"),
        ([tool(description="\ud83d")], "tools[0].function.description", "lone surrogate"),
        ([tool(strict="yes")], "tools[0].function.strict", "is str"),
        ([tool(strict=1)], "tools[0].function.strict", "is int"),
        ([tool(parameters=3)], "tools[0].function.parameters", "is int"),
        ([tool(parameters="{")], "tools[0].function.parameters", "is not JSON"),
        ([tool(parameters={"type": "dict"})], "tools[0].function.parameters", "breaks the rule"),
        ([tool(parameters={"pattern": "("})], "tools[0].function.parameters", "breaks the rule format"),
        ([tool(parameters={"default": float("nan")})], "tools[0]", "JSON cannot write"),
        ([tool(parameters=nested(100_000))], "tools", "nested too deeply"),
    ],
)
def test_fault_of_a_tool_is_told_with_its_place(tools, place, words):
    with pytest.raises(DataError) as caught:
        validate_tools(tools)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{place}: ")
    assert words in problem
    assert problems([ASK, SAY], tools) == [problem]


OBJECT = {"type": "object", "properties": {"deep": {"items": PARAMETERS}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("parameters", "arguments", "words"),
    [
        (PARAMETERS, '{"x": "1"}', "at 'x'"),
        (PARAMETERS, '{"y": 1}', "required 'x' missing"),
        (OBJECT, '{"deep": [{"x": 1}, {"x": 1.5}]}', "at 'deep[1].x' '1.5' breaks the rule type: '\"integer\"'"),
        (OBJECT, '{"other": 1}', "the schema has no 'other'"),
        ({"properties": {"x": False}}, '{"x": 1}', "'1' stands where the schema allows nothing"),
        ({"properties": {"x": {"enum": ["m", "km"]}}}, '{"x": "mi"}', '["m", "km"]'),
        ({"$ref": "#/$defs/nowhere"}, "{}", "no usable schema"),
        ({"$ref": "#"}, "{}", "no usable schema"),
        ({"multipleOf": 0.1, "properties": {"x": {"multipleOf": 0.1}}}, '{"x": 1%s}' % ("0" * 400), "no usable schema"),
    ],
)
def test_arguments_that_do_not_fit_the_tools_schema_are_a_fault(parameters, arguments, words):
    (problem,) = problems(talk(call(arguments=arguments)), [tool(parameters=parameters)])
    assert problem.startswith("messages[1].tool_calls[0].function.arguments: ")
    assert words in problem


def test_schemas_are_never_fetched():
    class Everything(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    with HTTPServer(("127.0.0.1", 0), Everything) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        parameters = {"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"}
        (problem,) = problems(talk(call()), [tool(parameters=parameters)])
        server.shutdown()
    assert "no usable schema" in problem


def test_several_misfits_of_one_call_are_all_told():
    arguments = '{"a": 1, "b": 2}'
    parameters = {"properties": {"a": {"type": "string"}, "b": {"type": "null"}}, "required": ["c", "d"]}
    told = problems(talk(call(arguments=arguments)), [tool(parameters=parameters)])
    assert len(told) == 3
    assert sum("'c, d'" in problem for problem in told) == 1


def test_called_name_must_be_one_of_the_tools():
    (problem,) = problems(talk(call(name="h")), [tool("f"), tool("g")])
    assert problem.startswith("messages[1].tool_calls[0].function.name: 'h'")
    assert "'f, g'" in problem


def test_name_is_not_called_unknown_where_it_may_be_the_faulty_tools():
    (problem,) = problems(talk(call(name="h")), [tool("f"), {"type": "function"}])
    assert problem.startswith("tools[1].function: ")


def test_every_fault_is_told_at_once_in_the_order_of_the_messages():
    messages = [
        {"role": "bot", "content": "x"},
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "t"}, 3], "name": 4},
        {"role": "assistant", "tool_calls": [call("a", name="no"), call("b", arguments="{"), call("b", arguments=3)]},
        answer("c", content=None),
        SAY | {"weight": 7, "no_loss": [[0, 9]]},
    ]
    places = [problem.split(": ")[0] for problem in problems(messages, [tool(), tool("")])]
    assert places == [
        "messages[0].role",
        "messages[1].content[0]",
        "messages[1].content[2]",
        "messages[1].name",
        "messages[2].tool_calls[2].function.arguments",
        "messages[2].tool_calls[1].function.arguments",
        "messages[2].tool_calls[2].id",
        "messages[2].tool_calls[0]",
        "messages[2].tool_calls[1]",
        "messages[2].tool_calls[2]",
        "messages[3].content",
        "messages[3].tool_call_id",
        "messages[4].weight",
        "messages[4].no_loss[0]",
        "tools[1].function.name",
    ]


@pytest.mark.parametrize("text", ["it's", 'say "it\'s"', "'", "\n''\"", "x" * 500])
def test_reasons_are_the_same_for_all_rows_but_for_numbers_and_quoted_values(text):
    def reasons(value):
        messages = [ASK | {"role": value}, *talk(call(value, arguments=value), answers=(f"x{value}",))]
        told = problems(messages, [tool(), tool(parameters={"type": value})])
        return [re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", problem) for problem in told]

    assert reasons(text) == reasons("plain")


def test_problems_can_be_printed_whatever_the_data_hold():
    bad = "a\ud83d\n"
    messages = [{"role": bad, bad: 1}, *talk(call(bad, name=bad, arguments=bad), answers=(bad,))]
    for problem in problems(messages, [tool(bad, parameters={bad: {}, "type": bad})]):
        assert problem.encode().count(b"\n") == 0


def test_real_tool_conversations_are_accepted_unless_their_arguments_break_the_tools_schema(real_rows):
    kept, refused = 0, Counter()
    for row in real_rows("toolcalls/glaive_openai.jsonl"):
        try:
            conversation = validate_conversation(row["messages"], row["tools"])
        except DataError as error:
            refused.update(error.problems)
            continue
        kept += 1
        assert [message["role"] for message in conversation.messages] == [m["role"] for m in row["messages"]]
        assert conversation.tools == (row["tools"] or None)
    misfit = "at 'calories_per_item' '[150, 350, 800]' breaks the rule type: '\"number\"'"
    assert refused == {f"messages[3].tool_calls[0].function.arguments: does not fit the tool: {misfit}": 1}
    assert kept == 154
