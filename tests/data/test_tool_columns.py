import json
import logging

import pytest

from numina_finetune.config import SourceConfig
from numina_finetune.data import format_example, validate_messages
from numina_finetune.data.formats import column_faults
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.errors import DataError

IN_OUT = {"tool_input_field": "code", "tool_output_field": "printed"}
NAMED = {"tool_name_field": "tool", **IN_OUT}
PAIR = {"question": "1+1?", "answer": "2"}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def rounds(row, **fields):
    """Each call as (tool, arguments, result) of a row that passes validation; its messages are in the right order."""
    example = format_example(PAIR | row, **fields)
    messages = validate_messages(example["messages"], example["tools"])
    assert messages[0] == {"role": "user", "content": "1+1?"}
    assert messages[-1] == {"role": "assistant", "content": "2"}
    said = []
    for turn, answer in zip(messages[1:-1:2], messages[2:-1:2], strict=True):
        (call,) = turn["tool_calls"]
        assert turn["role"] == "assistant" and answer["tool_call_id"] == call["id"]
        said.append((call["function"]["name"], json.loads(call["function"]["arguments"]), answer["content"]))
    return said


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        (["a", "b"], ["1", "2"]),
        ('["a", "b"]', '["1", "2"]'),
        (["a", "b"], '["1", "2"]'),
        ([{"code": "a"}, '{"code": "b"}'], ["1", "2"]),
        ('[{"code": "a"}, {"code": "b"}]', [1, 2]),
    ],
)
def test_lists_and_json_text_of_lists_are_sequential_rounds_of_python(code, printed):
    expected = [("python", {"code": "a"}, "1"), ("python", {"code": "b"}, "2")]
    assert rounds({"code": code, "printed": printed}, **IN_OUT) == expected


@pytest.mark.parametrize("printed", ["2", "", "[-1, 1]", '["a"]'])
def test_single_call_has_its_output_as_printed_even_if_it_looks_like_a_list(printed):
    assert rounds({"code": "x", "printed": printed}, **IN_OUT) == [("python", {"code": "x"}, printed)]


def test_output_that_is_not_text_is_written_as_json():
    said = rounds({"code": ["a", "b"], "printed": [{"é": 1.5}, [True]]}, **IN_OUT)
    assert [output for *_, output in said] == ['{"é": 1.5}', "[true]"]


def test_each_call_has_its_name_and_text_is_the_argument_input_of_other_tools():
    row = {"tool": ["search", "lookup"], "code": ["primes", {"key": 7, "absent": None}], "printed": ["2, 3", "seven"]}
    assert rounds(row, **NAMED) == [("search", {"input": "primes"}, "2, 3"), ("lookup", {"key": 7}, "seven")]


def test_one_name_is_that_of_every_call():
    row = {"tool": "search", "code": ["a", "b"], "printed": ["1", "2"]}
    assert [name for name, *_ in rounds(row, **NAMED)] == ["search", "search"]


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_row_without_calls_is_a_plain_question_and_answer(empty):
    for fields in (NAMED, {"tool_calls_field": "code", "tool_output_field": "printed"}):
        row = PAIR | {"tool": empty, "code": empty, "printed": empty}
        example = format_example(row, **fields)
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
        assert example["tools"] is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tool": ["python"], "code": ["a", "b"], "printed": ["1", "2"]}, "code 2, printed 2, tool 1"),
        ({"tool": "python", "code": ["a", "b"], "printed": ["1"]}, "code 2, printed 1"),
        ({"tool": "python", "code": ["a"], "printed": None}, "code 1, printed 0"),
        ({"tool": "python", "code": None, "printed": ["1"]}, "code 0, printed 1"),
    ],
)
def test_unequal_numbers_of_values_are_refused_with_columns_and_lengths(row, told):
    with pytest.raises(DataError, match=told):
        format_example(PAIR | row, **NAMED)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tool": [None], "code": ["a"], "printed": ["1"]}, "column tool, value 1"),
        ({"tool": "python", "code": ["a"], "printed": [None]}, "column printed, value 1: is null"),
        ({"tool": "python", "code": object(), "printed": ["1"]}, "column code: is object"),
        ({"tool": "python", "code": ["a"], "printed": ["1"], "tools": ["python"]}, "column tools"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_with_their_column(row, told):
    with pytest.raises(DataError, match=told):
        format_example(PAIR | row, **NAMED)


def test_openai_calls_are_parallel_in_one_turn_and_answered_in_order():
    given = [
        {"id": "x", "type": "function", "function": {"name": "search", "arguments": '{"q": "a"}'}},
        {"name": "search", "arguments": {"q": "b"}},
    ]
    expected = [
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "search", "arguments": '{"q": "a"}'}},
                {"id": "call_2", "type": "function", "function": {"name": "search", "arguments": '{"q": "b"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "x", "content": "1"},
        {"role": "tool", "tool_call_id": "call_2", "content": "2"},
    ]
    for calls in (given, json.dumps(given), [json.dumps(call) for call in given]):
        row = PAIR | {"calls": calls, "printed": ["1", "2"]}
        example = format_example(row, tool_calls_field="calls", tool_output_field="printed")
        assert example["messages"][1:-1] == expected
        assert validate_messages(example["messages"], example["tools"]) == example["messages"]


@pytest.mark.parametrize("key", ["output", "result"])
def test_one_openai_call_may_hold_its_own_result(key):
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}, key: {"value": 2}}
    messages = format_example(PAIR | {"calls": call}, tool_calls_field="calls")["messages"]
    assert messages[2] == {"role": "tool", "tool_call_id": "x", "content": '{"value": 2}'}
    assert key not in messages[1]["tool_calls"][0]


@pytest.mark.parametrize(
    ("row", "fields", "fix"),
    [
        ({"calls": [{"name": "f"}]}, {"tool_calls_field": "calls"}, "--tool-output-field"),
        ({"code": ["a"]}, {"tool_input_field": "code"}, "--tool-output-field"),
        ({"printed": ["1"]}, {"tool_output_field": "printed"}, "--tool-input-field"),
        ({"calls": [1]}, {"tool_calls_field": "calls"}, "is no OpenAI tool call"),
        ({"calls": [{"name": "f"}], "p": ["1", "2"]}, {"tool_calls_field": "calls", "tool_output_field": "p"}, "p 2"),
        ({"calls": [], "code": []}, {"tool_calls_field": "calls", "tool_input_field": "code"}, "keep one of them"),
    ],
)
def test_calls_without_results_and_results_without_calls_are_refused_with_the_fix(row, fields, fix):
    with pytest.raises(DataError, match=fix):
        format_example(PAIR | row, **fields)


def test_tools_are_those_of_the_row_and_python_where_it_is_called():
    def tools(names, **more):
        row = PAIR | {"tool": names, "code": ["a"] * len(names), "printed": ["1"] * len(names)} | more
        return format_example(row, **NAMED)["tools"]

    assert tools(["python"]) == [PYTHON_TOOL]
    assert tools(["search"]) is None
    assert tools(["search", "python"]) is None  # a list without search would make its call invalid
    assert tools(["search", "python"], tools=json.dumps([SEARCH])) == [SEARCH, PYTHON_TOOL]
    own = {"type": "function", "function": {"name": "python", "parameters": {"type": "object"}}}
    assert tools(["python"], tools=[own]) == [own]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("auto", {"question": "q", "answer": "a"}),
        ("qa", {"question": "q", "answer": "a"}),
        ("gsm8k", {"question": "q", "answer": "#### 1"}),
        ("math", {"problem": "q", "solution": "a"}),
        ("numina_cot", {"problem": "q", "solution": "a", "source": "s", "messages": [{"role": "user"}]}),
        ("auto", {"problem": "q", "solution": "a", "source": "s", "messages": [{"role": "user"}]}),
        ("numina_1.5", {"problem": "q", "solution": "a", "problem_is_valid": "Yes", "solution_is_valid": "Yes"}),
        ("numina_tir", {"problem": "q", "solution": "a"}),
    ],
)
def test_tool_columns_serve_every_format_of_questions_and_answers(format, row):
    example = format_example(row | {"code": ["x"], "printed": ["1"]}, format=format, **IN_OUT)
    assert [message["role"] for message in example["messages"]] == ["user", "assistant", "tool", "assistant"]


def test_tool_columns_and_the_calculator_style_are_refused_together():
    row = {"question": "q", "answer": "<<1+1=2>>2\n#### 2", "code": [], "printed": []}
    with pytest.raises(DataError, match="keep one of them"):
        format_example(row, format="gsm8k", gsm8k_style="calculator", **IN_OUT)


@pytest.mark.parametrize("format", ["auto", "numina_tir"])
@pytest.mark.parametrize("names", [{}, {"question_field": "problem", "answer_field": "solution"}])
@pytest.mark.parametrize("more", [{}, {"source": "where the problem is from"}])
def test_numina_tir_without_the_named_columns_is_read_by_its_blocks_with_one_notice(format, names, more, caplog):
    solution = "```python\n1\n```\n```output\n1\n```\nOne."
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": solution}]
    row = {"problem": "q", "solution": solution, "messages": messages} | more
    column = f"code of {format} {len(names)} {len(more)}"  # the notice is given once a process for the same columns
    fields = {"tool_input_field": column, "tool_output_field": "printed", "tool_calls_field": "calls", **names}
    assert column_faults(row, SourceConfig("d", format=format, **fields)) == []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            example = format_example(row, format=format, **fields)
            assert [message["role"] for message in example["messages"]] == ["user", "assistant", "tool", "assistant"]
    (notice,) = caplog.messages
    assert column in notice and "--tool-input-field" in notice


def test_numina_tir_with_the_columns_but_no_calls_in_a_row_is_read_by_its_blocks():
    row = {"problem": "q", "solution": "```python\n1\n```\n```output\n1\n```\nOne.", "code": [], "printed": []}
    example = format_example(row, format="numina_tir", **IN_OUT)
    assert [message["role"] for message in example["messages"]] == ["user", "assistant", "tool", "assistant"]


def test_missing_tool_column_is_a_fault_that_names_column_dataset_and_flag():
    (fault,) = column_faults(["question", "answer", "code"], SourceConfig("my.jsonl", **IN_OUT))
    for part in ("'printed'", "my.jsonl", "question, answer, code", "--tool-output-field"):
        assert part in fault
    with pytest.raises(DataError, match="'printed'"):
        format_example(PAIR | {"code": ["a"]}, **IN_OUT)


def test_present_tool_columns_are_no_fault():
    assert column_faults(["question", "answer", "code", "printed"], SourceConfig("d", **IN_OUT)) == []


def test_tool_columns_have_no_use_with_messages():
    faults = column_faults(["messages", "code", "printed"], SourceConfig("d", **IN_OUT))
    assert len(faults) == 2 and all("--format" in fault for fault in faults)
    with pytest.raises(DataError, match="format messages"):
        format_example({"messages": [], "code": [], "printed": []}, **IN_OUT)
