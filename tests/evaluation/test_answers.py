"""Answers are read and compared as the published GSM8K figures do it."""

from __future__ import annotations

import json

import pytest

from numina_finetune.evaluation import answers_match, extract_answer
from numina_finetune.evaluation.answers import majority_baseline
from numina_finetune.evaluation.intervals import wilson_interval
from tests.conftest import real_data


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        ("so 3\n#### 72", "gsm8k", "72"),
        ("#### 5\n#### 6", "gsm8k", "5"),
        ("#### -1,234.50", "gsm8k", "-1,234.50"),
        ("####72", "gsm8k", None),
        ("the answer is 72", "gsm8k", None),
        ("first 3, then $1,200.", "gsm8k-flexible", "$1,200."),
        ("it is 7", "gsm8k-flexible", "7"),
        ("from 5 to -3", "gsm8k-flexible", "-3"),
        ("no number", "gsm8k-flexible", None),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} done", "boxed", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} done", "boxed", r"\left\{ x \right."),
        (r"\boxed {3}", "boxed", "3"),
        (r"\boxed{4} and \boxed{unclosed", "boxed", "4"),
        ("no box", "boxed", None),
    ],
)
def test_the_final_answer_is_found(text: str, style: str, expected: str | None) -> None:
    assert extract_answer(text, style=style) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "predicted", "same"),
    [
        ("1,000", "1000", True),
        ("18", "$18", True),
        ("18", "18.", True),
        ("18", "18.00", True),
        ("-3", "3", False),
        ("so <<1+1=2>>2\n#### 2", "2", True),
        ("2", None, False),
        (None, None, False),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        ("nan", "nan", True),
        ("nan", "inf", False),
    ],
)
def test_answers_are_compared_without_separators_and_currency(
    gold: str | None, predicted: str | None, same: bool
) -> None:
    assert answers_match(gold, predicted) is same


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="'latex' is unknown"):
        extract_answer("1", style="latex")  # type: ignore[arg-type]


def test_extraction_and_verdicts_agree_with_the_recorded_ones_on_real_responses() -> None:
    path = real_data() / "answer_check" / "gsm8k_metric_cases.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        strict = extract_answer(case["response"]) or "[invalid]"
        flexible = extract_answer(case["response"], style="gsm8k-flexible") or "[invalid]"
        assert strict == case["strict_extract"]
        assert flexible == case["flexible_extract"]
        assert answers_match(case["gold"], strict) is case["strict_match"]
        assert answers_match(case["gold"], flexible) is case["flexible_match"]


def test_every_gsm8k_solution_has_its_answer() -> None:
    path = real_data() / "gsm8k" / "test.jsonl"
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(answers_match(answer.split("#### ")[1], extract_answer(answer)) for answer in answers)


def test_the_majority_baseline_counts_equal_answers_together() -> None:
    assert majority_baseline(["1,000", "1000", "7", "8"]) == 0.5
    assert majority_baseline([]) == 0.0


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    # Brown, Cai and DasGupta (2001), equation 4, for 8 of 10.
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == 1.0
