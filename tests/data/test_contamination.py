import os
import subprocess
import sys
import time

import pytest

from numina_finetune.data.contamination import Contamination, build_benchmark, ngram_words, question_of
from numina_finetune.errors import ConfigError, DataError
from tests.conftest import ROOT

FARM = (
    "A farmer keeps 12 hens in each of his 4 barns, and every hen lays 3 eggs in a week. "
    "How many eggs does the farmer collect from all of his barns in 2 weeks?"
)
PENS = "Tom has {} pens and buys {} boxes of {} pens each. Then he gives {} pens to each of {} friends. What is left?"


def index(*questions, name="bench", n=13):
    return Contamination([build_benchmark(name, questions, n)])


@pytest.fixture(scope="module")
def grade_school(real_rows):
    return build_benchmark("gsm8k", [row["question"] for row in real_rows("gsm8k/test.jsonl")])


@pytest.fixture(scope="module")
def competition(real_rows):
    return build_benchmark("math", [row["problem"] for row in real_rows("math/math_test.jsonl")])


@pytest.mark.parametrize(
    ("question", "variant"),
    [
        (FARM, f"  {FARM.upper()}\n"),
        (FARM, FARM.replace(",", "").replace(" hens ", "\n hens ")),
        ("Find $x^2+1$.", "Find $x^{2} + 1$"),
        ("Find $x^2+1$.", r"Find \(x ^ { 2 }\, +\, 1\)!"),
        ("Find $x^2 - 1$.", "Find x² − 1"),
        ("Simplify $3xy \\cdot 2$.", "Simplify $3 x y \\times 2$"),
        (r"$\dfrac12 + \frac{1}{3}$", r"$\frac{1}{2}+\tfrac 13$"),
        (r"$\left(0,\frac{\pi}{2}\right)$", r"(0, \frac{\pi}{2})"),
        (r"It costs $1{,}000\text{ cm}$", "It costs 1000 cm"),
        (r"It costs $1,\!000$, 20\% off", "It costs $1,000, 20% off"),
        ("a three-digit number", "a three digit number"),
        (r"$a \leq b$", "$a \\le b$ "),
    ],
)
def test_typesetting_makes_no_difference_to_an_exact_match(question, variant):
    overlap = index("Something else?", question).find(variant)
    assert overlap is not None
    assert (overlap.kind, overlap.benchmark, overlap.index) == ("exact", "bench", 1)


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("What is $2(3+4)$?", "What is $2\\cdot3+4$?"),
        ("What is $3+4$?", "What is $3-4$?"),
        ("What is $2^{3+1}$?", "What is $2^3+1$?"),
        (r"What is $\frac{1}{23}$?", r"What is $\frac{12}{3}$?"),
        ("What is 1.5?", "What is 15?"),
        ("What is 5!?", "What is 5?"),
        ("Is it in $[0,1)$?", "Is it in $(0,1)$?"),
        ("How much is $20\\%$?", "How much is $20$?"),
        (PENS.format(5, 3, 12, 7, 2), PENS.format(6, 4, 10, 9, 3)),
        (FARM, "How many eggs does the farmer collect?"),
    ],
)
def test_another_problem_is_no_overlap(question, other):
    assert index(question).find(other) is None


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not():
    words = ngram_words(FARM)
    overlap = index("Another question?", FARM).find("Once more: " + " ".join(words[5:18]) + " of the neighbours?")
    assert overlap is not None
    assert (overlap.kind, overlap.index, overlap.text) == ("ngram", 1, " ".join(words[5:18]))
    assert index(FARM).find("Once more: " + " ".join(words[5:17]) + " of the neighbours?") is None


def test_words_of_two_neighbouring_questions_make_no_ngram():
    first, second = FARM.split(". ")
    joint = " ".join([*first.split()[-9:], *second.split()[:9]])
    assert index(first, second).find(joint) is None
    assert index(FARM).find(joint) is not None


def test_question_shorter_than_an_ngram_is_found_as_a_whole_only():
    short = index("What is the sum of 3 and 4?")
    assert short.find("what is the sum of 3 and 4").kind == "exact"
    assert short.find("Think first. What is the sum of 3 and 4?") is None
    assert index("What is the sum of 3 and 4?", n=5).find("Think first. What is the sum of 3 and 4?").kind == "ngram"


def test_phrase_that_three_questions_of_a_benchmark_share_is_no_overlap_and_one_of_two_questions_is():
    phrase = "Give the answer as a fraction in lowest terms, with a positive denominator and no spaces."
    questions = [f"What is {number} divided by 9? {phrase}" for number in (4, 5, 7)]
    assert index(*questions).find(f"How long is the rope of Anna? {phrase}") is None
    assert index(*questions[:2]).find(f"How long is the rope of Anna? {phrase}").kind == "ngram"


def test_drawings_count_for_an_exact_match_only():
    drawing = "[asy] size(150); defaultpen(linewidth(0.8)); draw((0,0)--(5,0)--(5,5)--(0,5)--cycle); dot((2,2)); [/asy]"
    benchmark = index(f"What is the area of the square? {drawing}")
    assert benchmark.find(f"How long is its side? {drawing}") is None
    assert benchmark.find("What is the area of the square?") is None
    assert benchmark.find(f"What is the area of the square?{drawing}").kind == "exact"


def test_exact_match_in_a_later_benchmark_goes_before_an_ngram_in_an_earlier_one():
    benchmarks = [build_benchmark("near", [f"{FARM} Explain."]), build_benchmark("same", [FARM])]
    overlap = Contamination(benchmarks).find(FARM)
    assert (overlap.benchmark, overlap.kind) == ("same", "exact")


def test_questions_without_words_match_nothing_and_do_not_move_the_indices():
    benchmark = index("", "$$", FARM)
    assert benchmark.find("") is None and benchmark.find("?!") is None
    assert benchmark.find(FARM).index == 2


def test_benchmark_without_questions_or_with_a_senseless_ngram_is_refused():
    with pytest.raises(DataError, match=r"benchmark gsm8k: no question .* column"):
        build_benchmark("gsm8k", ["", " "])
    with pytest.raises(ConfigError, match="n-grams of 0 words"):
        build_benchmark("gsm8k", [FARM], n=0)


def test_question_of_a_conversation_is_what_the_user_says():
    messages = [
        {"role": "system", "content": "Solve it."},
        {"role": "user", "content": "Two numbers add up to 7."},
        {"role": "assistant", "content": "And?"},
        {"role": "user", "content": "Which are they?"},
        {"role": "assistant", "content": "3 and 4, say."},
    ]
    assert question_of(messages) == "Two numbers add up to 7.\nWhich are they?"


def test_index_is_the_same_in_every_process():
    code = (
        "from numina_finetune.data.contamination import build_benchmark\n"
        f"print(build_benchmark('b', [{FARM!r}]).hashes.tolist())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and seen.pop().count(",") == len(ngram_words(FARM)) - 13


def test_every_math500_question_is_found_where_it_stands_in_the_math_test_split(competition, real_rows):
    math = [row["problem"] for row in real_rows("math/math_test.jsonl")]
    questions = [row["problem"] for row in real_rows("math/math500_test.jsonl")]
    overlaps = [Contamination([competition]).find(question) for question in questions]
    assert [overlap.kind for overlap in overlaps] == ["exact"] * 500
    assert all(
        math[overlap.index].split() == question.split() for overlap, question in zip(overlaps, questions, strict=True)
    )


def test_real_tool_integrated_rows_are_found_in_the_test_splits_that_they_solve(grade_school, competition, real_rows):
    benchmarks = Contamination([grade_school, competition])
    for file, count, name in (
        ("tir/tora_gsm8k_test_70b.jsonl", 602, "gsm8k"),
        ("tir/mathcoder_math_test_7b.jsonl", 379, "math"),
    ):
        overlaps = [benchmarks.find(row["problem"]) for row in real_rows(file)]
        assert [(overlap.benchmark, overlap.kind) for overlap in overlaps] == [(name, "exact")] * count


def test_real_test_questions_are_found_inside_a_longer_prompt(grade_school, competition, real_rows):
    benchmarks = Contamination([grade_school, competition])
    rows = [*real_rows("gsm8k/test.jsonl", 500), *real_rows("math/math_test.jsonl", 1500)]
    questions = [row.get("question") or row["problem"] for row in rows]
    missed = [
        question
        for question in questions
        if len(ngram_words(question)) >= 13
        and not benchmarks.find(f"Solve this. {question} Give your answer in a box.")
    ]
    assert missed == []


def test_gsm8k_training_split_is_not_taken_for_its_test_split_and_is_looked_up_in_seconds(
    grade_school, competition, real_rows
):
    benchmarks = Contamination([grade_school, competition])
    questions = [row["question"] for row in real_rows("gsm8k/train.jsonl")]
    start = time.perf_counter()
    overlaps = [overlap for question in questions if (overlap := benchmarks.find(question))]
    assert time.perf_counter() - start < 5
    assert {overlap.kind for overlap in overlaps} == {"ngram"}
    assert len(overlaps) <= 8  # templates of the test split with other numbers
