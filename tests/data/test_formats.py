import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numina_finetune.config import FORMATS, SourceConfig
from numina_finetune.data import format_example
from numina_finetune.data.formats import column_faults, recognise, recognise_columns
from numina_finetune.errors import DataError

GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}
VALID = {"problem_is_valid": "Yes", "solution_is_valid": "Yes", "answer": "3"}
PAIR = {"problem": "1+2?", "solution": "\\boxed{3}"}


def contents(example):
    return [(message["role"], message["content"]) for message in example["messages"]]


def roles(example):
    return [message["role"] for message in example["messages"]]


def test_gsm8k_loses_its_annotations_and_keeps_the_rest():
    assert contents(format_example(GSM8K)) == [("user", "How many?"), ("assistant", "48/2 = 24 clips.\n#### 24")]


def test_only_annotations_are_taken_out_of_gsm8k():
    row = {"question": "q", "answer": "1 << 2, <<1+1=2>>2 >> 1\n#### 2"}
    assert format_example(row)["messages"][1]["content"] == "1 << 2, 2 >> 1\n#### 2"


def test_gsm8k_annotated_is_kept_as_published():
    assert format_example(GSM8K, gsm8k_style="annotated")["messages"][1]["content"] == GSM8K["answer"]


@pytest.mark.parametrize("answer", ["24", "a\n#### 1\n#### 2"])
def test_gsm8k_answer_without_exactly_one_final_line_is_refused(answer):
    with pytest.raises(DataError, match="exactly one"):
        format_example({"question": "q", "answer": answer}, format="gsm8k")


def test_auto_reads_questions_and_answers_without_final_line_as_they_are():
    row = {"question": "q", "answer": "a << b >> c"}
    assert contents(format_example(row)) == [("user", "q"), ("assistant", "a << b >> c")]


def test_named_columns_are_used_in_auto():
    row = {"prompt": "q", "completion": "a", "messages": "not these"}
    example = format_example(row, question_field="prompt", answer_field="completion")
    assert contents(example) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("format", ["auto", "math", "numina_cot"])
def test_problem_and_solution_become_question_and_answer(format):
    assert contents(format_example(PAIR, format=format)) == [("user", "1+2?"), ("assistant", "\\boxed{3}")]


def test_numina_cot_prefers_its_messages():
    row = PAIR | {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert contents(format_example(row, format="numina_cot")) == [("user", "x"), ("assistant", "y")]


def test_valid_numina_15_row_is_recognised_and_kept():
    assert contents(format_example(PAIR | VALID)) == [("user", "1+2?"), ("assistant", "\\boxed{3}")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"problem_is_valid": "Incomplete"}, "problem_is_valid"),
        ({"solution_is_valid": "No"}, "solution_is_valid"),
        ({"answer": "proof"}, "proof"),
        ({"answer": "notfound"}, "notfound"),
    ],
)
def test_unfit_numina_15_row_is_refused_with_its_reason(change, reason):
    with pytest.raises(DataError, match=reason):
        format_example(PAIR | VALID | change, format="numina_1.5")


def test_tools_are_read_from_a_list_or_from_json_text():
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": messages, "tools": tools}, {"messages": messages, "tools": json.dumps(tools)}):
        assert format_example(row)["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert format_example({"messages": messages, "tools": []})["tools"] is None


def test_system_prompt_is_put_first_unless_the_conversation_has_its_own():
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}
    assert contents(format_example(GSM8K, system_prompt="be brief"))[0] == ("system", "be brief")
    assert contents(format_example(own, system_prompt="be brief"))[0] == ("system", "own")


def test_formatting_leaves_the_row_untouched():
    row = {"messages": [{"role": "user", "content": "q"}]}
    format_example(row, system_prompt="s")
    assert row == {"messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize("row", [{"question": "", "answer": "a"}, {"question": "q", "answer": None}, {"text": "t"}])
def test_row_without_question_or_answer_is_refused(row):
    with pytest.raises(DataError):
        format_example(row)


def test_missing_column_fault_names_column_dataset_columns_and_flag():
    (fault,) = column_faults(["question", "reply"], SourceConfig("my.jsonl", format="qa"))
    for part in ("'answer'", "my.jsonl", "question, reply", "--answer-field"):
        assert part in fault


def test_unrecognised_columns_are_a_fault_that_names_the_flags():
    (fault,) = column_faults(["text"], SourceConfig("my.jsonl"))
    assert "text" in fault and "--question-field" in fault and "--messages-field" in fault


@pytest.mark.parametrize(
    ("columns", "source"),
    [
        (["question", "answer"], SourceConfig("d")),
        (["q", "a"], SourceConfig("d", question_field="q", answer_field="a")),
        (["chat"], SourceConfig("d", messages_field="chat")),
        (["problem", "solution"], SourceConfig("d", format="numina_cot")),
    ],
)
def test_columns_that_fit_have_no_fault(columns, source):
    assert column_faults(columns, source) == []


def test_real_gsm8k_rows_keep_every_character_but_the_annotations(real_rows):
    for row in real_rows("gsm8k/test.jsonl"):
        question, answer = (text for _, text in contents(format_example(row)))
        assert question == row["question"]
        assert "<<" not in answer and answer.count("####") == 1
        assert answer.split("#### ")[1] == row["answer"].split("#### ")[1]


def test_real_numina_rows_are_recognised(real_rows):
    for row in real_rows("numina/numinamath_cot_rows.jsonl"):
        assert contents(format_example(row)) == [("user", row["problem"]), ("assistant", row["solution"])]
    for row in real_rows("numina/numinamath_tir_rows.jsonl"):
        assert recognise(row) == recognise_columns(row, None, None, "messages") == "numina_tir"
        assert roles(format_example(row)) == ["user", "assistant", "tool", "assistant"]
    with pytest.raises(DataError, match="proof"):
        format_example(real_rows("numina/numinamath_1.5_rows.jsonl")[0])


def test_real_math_solutions_are_kept_as_they_are(real_rows):
    for row in real_rows("math/math_test.jsonl"):
        assert contents(format_example(row)) == [("user", row["problem"]), ("assistant", row["solution"])]


# --- NuminaMath-TIR ---------------------------------------------------------------------------------------------------

CODE = "```python\n1\n```\n"
RUN = CODE + "```output\n1\n```\nOne."
ASK = {"role": "user", "content": "q"}


def tir_row(solution, **more):
    messages = [ASK, {"role": "assistant", "content": solution}]
    return {"problem": "q", "solution": solution, "messages": messages} | more


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (tir_row(RUN), "numina_tir"),
        (tir_row("Plain."), "numina_tir"),
        (tir_row(RUN, source="s"), "numina_tir"),
        (tir_row(RUN, messages=json.dumps(tir_row(RUN)["messages"])), "numina_tir"),
        (tir_row(RUN, messages=[{"role": "system", "content": "s"}, *tir_row(RUN)["messages"]]), "numina_tir"),
        ({"problem": "q", "solution": RUN}, "numina_tir"),
        (tir_row("Plain.", source="s"), "messages"),
        (tir_row(CODE + "Run it."), "messages"),
        (tir_row(RUN, messages=[ASK, {"role": "assistant", "content": "other"}]), "messages"),
        (tir_row(RUN, messages=[ASK, {"role": "assistant", "content": RUN}, ASK]), "messages"),
        ({"messages": tir_row(RUN)["messages"]}, "messages"),
        ({"messages": tir_row(CODE)["messages"]}, "messages"),
        ({"problem": "q", "solution": CODE + "Run it."}, "math"),
        (tir_row(RUN) | VALID, "numina_tir"),
        ({"problem": "q", "solution": RUN} | VALID, "numina_1.5"),
    ],
)
def test_numina_tir_is_told_by_its_columns_and_by_code_with_its_output(row, format):
    assert recognise(row) == format


def test_naming_the_columns_that_numina_tir_has_anyway_changes_nothing():
    assert recognise(tir_row(RUN), "problem", "solution") == "numina_tir"
    assert recognise(tir_row(RUN), "problem", "other") == "qa"
    assert recognise(tir_row(CODE), "problem", "solution") == "math"


def test_numina_tir_keeps_its_own_system_message():
    own = {"role": "system", "content": "own"}
    example = format_example(tir_row(RUN, messages=[own, *tir_row(RUN)["messages"]]), system_prompt="other")
    assert example["messages"][0] == own
    assert roles(example) == ["system", "user", "assistant", "tool", "assistant"]


def test_numina_tir_needs_messages_or_problem_and_solution():
    assert column_faults(["messages"], SourceConfig("d", format="numina_tir")) == []
    assert column_faults(["problem", "solution"], SourceConfig("d", format="numina_tir")) == []
    (fault,) = column_faults(["problem"], SourceConfig("d", format="numina_tir"))
    assert "'solution'" in fault and "--answer-field" in fault


def test_numina_tir_reads_named_columns():
    row = {"prompt": "q", "reply": RUN}
    example = format_example(row, format="numina_tir", question_field="prompt", answer_field="reply")
    assert roles(example) == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASK], "its roles are user"),
        ([ASK, {"role": "assistant", "content": RUN}, ASK, {"role": "assistant", "content": RUN}], "its roles are"),
        ([ASK, {"role": "assistant", "content": None}], "the assistant message has no text"),
        ([ASK, {"role": "assistant", "content": RUN, "weight": 0}], "has weight"),
        ("[1]", "needs a list of OpenAI messages"),
    ],
)
def test_numina_tir_refuses_other_conversations_with_the_reason(messages, reason):
    with pytest.raises(DataError, match=reason):
        format_example(tir_row(RUN, messages=messages), format="numina_tir")


def test_keys_that_arrow_fills_with_nothing_do_not_matter():
    empty = {"tool_calls": [], "name": None}
    row = tir_row(RUN, messages=[ASK | empty, {"role": "assistant", "content": RUN} | empty])
    assert format_example(row) == format_example(tir_row(RUN))


# --- any row ----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "[", '{"a": 1}', "[1]", RUN, "python"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "function", "name", "arguments", "output"]), inner)
    ),
    max_leaves=6,
)
COLUMNS = ["question", "answer", "problem", "solution", "messages", "tools", "calls", "name", "input", "output"]


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES),
    st.sampled_from(FORMATS),
    st.sets(st.sampled_from(["calls", "name", "input", "output"])),
)
def test_any_row_is_formatted_or_refused_with_a_data_error(row, format, named):
    fields = {f"tool_{what}_field": what for what in named}
    try:
        example = format_example(row, format=format, gsm8k_style="calculator", **fields)
    except DataError:
        return
    assert all(isinstance(message, dict) for message in example["messages"])
