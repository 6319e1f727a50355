"""Answers are read and compared as the published GSM8K figures do it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from numina_finetune.evaluation import answers_match, extract_answer, latex
from numina_finetune.evaluation.answers import majority_baseline, same_in_harness
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
        (r"\frac{1}{2}", ".5", True),
        (r"\frac12", r"\dfrac{2}{4}", True),
        (r"x^2 - 1", "(x-1)(x+1)", True),
        ("1000", r"1{,}000", True),
        ("1,2", "12", False),
        ("(1,2)", "(12)", False),
        ("2", "x=2", True),
        ("2", "3 or 2", False),
        ("2", "[invalid]", False),
        (r"\$10", "10", True),
        ("5", "5.001", False),
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
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        strict = extract_answer(case["response"]) or "[invalid]"
        flexible = extract_answer(case["response"], style="gsm8k-flexible") or "[invalid]"
        assert strict == case["strict_extract"]
        assert flexible == case["flexible_extract"]
        assert same_in_harness(case["gold"], strict) is case["strict_match"]
        assert same_in_harness(case["gold"], flexible) is case["flexible_match"]
    assert len(cases) == 156


def test_flexible_verdicts_agree_with_every_label_of_real_model_solutions() -> None:
    path = real_data() / "gsm8k" / "example_model_solutions.jsonl"
    verdicts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold = row["ground_truth"].rpartition("A: ")[2]
        solutions = [value for value in row.values() if isinstance(value, dict)]
        verdicts += [
            same_in_harness(gold, extract_answer(solution["solution"], style="gsm8k-flexible"))
            is solution["is_correct"]
            for solution in solutions
        ]
    assert (len(verdicts), sum(verdicts)) == (5276, 5276)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 72", "72", "72"),
        ("#### 72\nThat is 6 dozen.", "72", "6"),
        ("The answer is 72.", None, "72."),
        ("#### $72", None, "$72"),
        ("####72", None, "72"),
        ("#### 5\nNo: #### 6", "5", "6"),
        ("#### x = 72", None, "72"),
        ("#### 1,200.50 dollars", "1,200.50", "1,200.50"),
        ("#### seventy-two", None, None),
    ],
)
def test_strict_takes_the_first_marked_number_and_flexible_the_last_number_of_all(
    text: str, strict: str | None, flexible: str | None
) -> None:
    assert extract_answer(text, style="gsm8k") == strict
    assert extract_answer(text, style="gsm8k-flexible") == flexible


def test_the_harness_compares_as_text() -> None:
    assert same_in_harness("1,000", "$1000.")
    assert not same_in_harness("18", "18.00")
    assert not same_in_harness(None, None)


DISAGREEMENTS = {
    ("1,22", "1.22"),
    (r"$(\begin{pmatrix}\frac{1}{3}\\ \frac{1}{5} \end{pmatrix})$", r"$\begin{pmatrix}0.33\\0.2 \end{pmatrix}$"),
    ("4, 10, -2", "10, 4, -2"),
    ("4, .1, 2", "0.1, 4, 2"),
    ("1.5", "1 1/2"),
    ("125.663", r"40\pi"),
    ("[0.5, 1]", r"\begin{matrix} \frac12 \\ 1 \end{matrix}"),
    (r"\begin{cases} a+b=0.5\\ a-b=1.732\end{cases}", r"\begin{cases} a+b=\frac12 \\ a-b=\sqrt3 \end{cases}"),
    (r"\frac{1}{432}", r"2.314814814815 \times 10^{-3}"),
}
"""Why each of them, says docs/evaluation.md."""


def test_verdicts_on_latex_agree_with_the_recorded_ones_but_for_nine_that_are_explained() -> None:
    path = real_data() / "answer_check" / "answer_pairs.jsonl"
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    differing = {
        (pair["gold"], pair["pred"]) for pair in pairs if answers_match(pair["gold"], pair["pred"]) is not pair["equal"]
    }
    assert (len(pairs), differing) == (187, DISAGREEMENTS)


def test_an_answer_that_cannot_be_computed_is_wrong_and_the_next_one_is_judged_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = tmp_path / "worker.py"
    quick.write_text(latex._WORKER.read_text(encoding="utf-8").replace("CPU_SECONDS = 5.0", "CPU_SECONDS = 1.5"))
    monkeypatch.setattr(latex, "_WORKER", quick)
    comparison = latex.LatexComparison()
    assert not comparison.equivalent("2", "10^{10^{10^{10}}}")
    assert comparison._process is None, "it was ended over it"
    assert comparison.equivalent(r"\frac12", "0.5")
    comparison.close()


def test_answers_are_judged_in_any_thread() -> None:
    verdicts: list[bool] = []
    threads = [threading.Thread(target=lambda: verdicts.append(answers_match(r"\frac12", "0.5"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 3


def test_every_gsm8k_solution_has_its_answer() -> None:
    path = real_data() / "gsm8k" / "test.jsonl"
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(answers_match(answer.split("#### ")[1], extract_answer(answer)) for answer in answers)


def test_the_majority_baseline_counts_equal_answers_together() -> None:
    assert majority_baseline(["1,000", "1000", "7", "8"]) == 0.5
    assert majority_baseline([]) == 0.0
