import pytest

from numina_finetune.data import validate_messages
from numina_finetune.errors import DataError


def call(identifier="c1", name="f", arguments='{"x": 1}', **more):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}} | more


def talk(*calls, answers=("c1",)):
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
        *({"role": "tool", "tool_call_id": identifier, "content": "r"} for identifier in answers),
        {"role": "assistant", "content": "a"},
    ]


def problems(messages, tools=None):
    with pytest.raises(DataError) as caught:
        validate_messages(messages, tools)
    return caught.value.problems


def test_none_keys_are_deleted_and_the_input_is_untouched():
    messages = [
        {"role": "user", "content": "q", "tool_calls": None, "name": None},
        {"role": "assistant", "content": "a", "tool_calls": []},
    ]
    assert validate_messages(messages) == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert messages[0]["name"] is None


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "3"}]
    assert validate_messages(messages)[0]["content"] == "1+2"


def test_answered_calls_pass_and_ids_may_recur_in_later_messages():
    assert len(validate_messages(talk(call()) + talk(call()))) == 8


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ([{"role": "bot", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "\ud83d"}], "messages[0].content"),
        ([{"role": "user", "content": "q"}, {"role": "assistant"}], "messages[1].content"),
        ([{"role": "user", "content": "q"}], "messages"),
        (talk(call(arguments={"x": 1})), "messages[1].tool_calls[0].function.arguments"),
        (talk(call(arguments='{"x": ')), "messages[1].tool_calls[0].function.arguments"),
        (talk(call(arguments="[1]")), "messages[1].tool_calls[0].function.arguments"),
        (talk(call(name="")), "messages[1].tool_calls[0].function.name"),
        (talk(call(type="code")), "messages[1].tool_calls[0].type"),
        (talk(call(), call(), answers=("c1", "c1")), "messages[1].tool_calls[1].id"),
        (talk(call(), answers=()), "messages[1].tool_calls[0]"),
        (talk(call(), call("c2")), "messages[1].tool_calls[1]"),
        (talk(call(), answers=("c1", "c9")), "messages[3].tool_call_id"),
        (talk(call())[:2], "messages[1].tool_calls[0]"),
        ([{"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}], "messages[0].tool_call_id"),
    ],
)
def test_fault_is_reported_with_its_place(messages, place):
    (problem,) = problems(messages)
    assert problem.startswith(f"{place}: ")


def test_every_fault_is_reported_at_once():
    messages = [{"role": "bot", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert len(problems(messages, tools=[{"type": "function"}])) == 5


def test_real_tool_conversations_are_valid(real_rows):
    for row in real_rows("toolcalls/glaive_openai.jsonl"):
        assert len(validate_messages(row["messages"], row["tools"])) == len(row["messages"])
