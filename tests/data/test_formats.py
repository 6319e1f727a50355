import json

import pytest

from numina_finetune.config import SourceConfig
from numina_finetune.data import format_example
from numina_finetune.data.formats import column_faults
from numina_finetune.errors import DataError

GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}
VALID = {"problem_is_valid": "Yes", "solution_is_valid": "Yes", "answer": "3"}
PAIR = {"problem": "1+2?", "solution": "\\boxed{3}"}


def contents(example):
    return [(message["role"], message["content"]) for message in example["messages"]]


def test_gsm8k_loses_its_annotations_and_keeps_the_rest():
    assert contents(format_example(GSM8K)) == [("user", "How many?"), ("assistant", "48/2 = 24 clips.\n#### 24")]


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
    for row in real_rows("numina/numinamath_cot_rows.jsonl") + real_rows("numina/numinamath_tir_rows.jsonl"):
        assert contents(format_example(row)) == [("user", row["problem"]), ("assistant", row["solution"])]
    with pytest.raises(DataError, match="proof"):
        format_example(real_rows("numina/numinamath_1.5_rows.jsonl")[0])
