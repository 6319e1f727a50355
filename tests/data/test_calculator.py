from fractions import Fraction

import pytest

from numina_finetune.data import format_example, validate_messages
from numina_finetune.data.calculator import CALCULATOR_TOOL, evaluate, from_messages, to_messages
from numina_finetune.errors import DataError

ANSWER = "In May 48/2 = <<48/2=24>>24.\nIn all <<48+24=72>>72.\n#### 72"


def call(number, expression):
    function = {"name": "calculator", "arguments": f'{{"expression": "{expression}"}}'}
    return [{"id": f"call_{number}", "type": "function", "function": function}]


def test_annotation_becomes_a_call_and_the_text_goes_on_with_the_repeated_result():
    example = format_example({"question": "How many?", "answer": ANSWER}, format="gsm8k", gsm8k_style="calculator")
    assert example == {
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "In May 48/2 = ", "tool_calls": call(1, "48/2")},
            {"role": "tool", "tool_call_id": "call_1", "content": "24"},
            {"role": "assistant", "content": "24.\nIn all ", "tool_calls": call(2, "48+24")},
            {"role": "tool", "tool_call_id": "call_2", "content": "72"},
            {"role": "assistant", "content": "72.\n#### 72"},
        ],
        "tools": [CALCULATOR_TOOL],
    }
    assert validate_messages(example["messages"], example["tools"]) == example["messages"]


def test_answer_without_annotation_is_a_plain_answer_without_tools():
    example = format_example({"question": "q", "answer": "#### 1"}, format="gsm8k", gsm8k_style="calculator")
    assert example["tools"] is None
    assert example["messages"][1:] == [{"role": "assistant", "content": "#### 1"}]


@pytest.mark.parametrize("answer", [ANSWER, "<<1+1=2>><<2+2=4>>4", "a << b\n", "<<1+1=2>>", "a << b <<1+1=2>>2"])
def test_answer_rebuilds(answer):
    assert from_messages(to_messages(answer)) == answer


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*-4", -20),
        ("0.1+0.2", Fraction(3, 10)),
        (".5*4.", 2),
        ("7//2", 3),
        ("1/3", Fraction(1, 3)),
        ("20%*50", 10),
        ("50%", Fraction(1, 2)),
        ("1,000,000+1", 1000001),
        ("05+1.05", Fraction(121, 20)),
    ],
)
def test_expression_has_its_exact_value(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "x", "2**9", "7%3", "1(2)", "1,2", "1e9", "__import__('os')", "1/0", "(" * 150, "1+" * 300 + "1", "(1"],
)
def test_what_is_no_arithmetic_is_refused(expression):
    with pytest.raises(DataError):
        evaluate(expression)


@pytest.mark.parametrize("annotation", ["10/3=3", "10/3=3.33", "2/3=0.67", "5/2=2", "5/2=3", "20/100=20%"])
def test_result_may_be_rounded_to_its_last_digit(annotation):
    assert to_messages(f"<<{annotation}>>")[1]["content"] == annotation.split("=")[1]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("1+1=3", "the result is 2"),
        ("10/3=3.4", "the result is 3.33333"),
        ("1+1", "has no result"),
        ("1+1=", "no arithmetic"),
        ("x=1", "no arithmetic"),
        ("1/0=1", "divides by zero"),
    ],
)
def test_wrong_annotation_is_refused_with_its_place_and_reason(annotation, reason):
    with pytest.raises(DataError, match=reason) as refusal:
        to_messages(f"<<1+1=2>>2 <<{annotation}>>")
    assert "annotation 2" in str(refusal.value) and annotation in str(refusal.value)


def test_every_wrong_annotation_is_told_at_once():
    with pytest.raises(DataError) as refusal:
        to_messages("<<1+1=3>> <<1+1=2>> <<x=1>>")
    assert len(refusal.value.problems) == 2


def test_messages_of_another_kind_cannot_be_converted_back():
    for messages in ([], [{"role": "user"}], to_messages(ANSWER)[1:]):
        with pytest.raises(DataError, match="converted back"):
            from_messages(messages)


def test_unknown_style_is_refused():
    with pytest.raises(DataError, match="'calculators' is unknown"):
        format_example({"question": "q", "answer": ANSWER}, format="gsm8k", gsm8k_style="calculators")


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_real_answer_is_converted_valid_and_rebuilds(split, real_rows):
    rows = real_rows(f"gsm8k/{split}.jsonl")
    calls = 0
    for row in rows:
        example = format_example(row, format="gsm8k", gsm8k_style="calculator")
        said = validate_messages(example["messages"], example["tools"])[1:]
        assert from_messages(said) == row["answer"]
        calls += len(said) // 2
    assert calls == sum(row["answer"].count("<<") for row in rows)
