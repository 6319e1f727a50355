"""The generated problems: correct, deterministic, in GSM8K's format, and honestly held out."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from numina_finetune.data import synthetic
from numina_finetune.data.synthetic import generate_problems, is_test_pair

STEP = re.compile(r"(\d+)([-+])(\d+) = <<\1\2\3=(\d+)>>\4")


def steps_of(rows: list[dict[str, str]]) -> list[tuple[int, str, int, int]]:
    return [(int(a), op, int(b), int(c)) for row in rows for a, op, b, c in STEP.findall(row["answer"])]


@pytest.fixture(scope="module")
def train() -> list[dict[str, str]]:
    return generate_problems("train")


@pytest.fixture(scope="module")
def test() -> list[dict[str, str]]:
    return generate_problems("test")


def test_no_operand_pair_of_a_test_problem_occurs_in_training_in_either_order_or_for_any_operation(
    train: list[dict[str, str]], test: list[dict[str, str]]
) -> None:
    shown = {frozenset((a, b)) for a, _, b, _ in steps_of(train)}
    asked = {frozenset((a, b)) for a, _, b, _ in steps_of(test)}
    assert asked and not asked & shown


def test_the_split_of_pairs_does_not_depend_on_the_seed() -> None:
    for seed in range(3):
        assert not any(is_test_pair(a, b) for a, _, b, _ in steps_of(generate_problems("train", seed, 300)))
        assert all(is_test_pair(b, a) for a, _, b, _ in steps_of(generate_problems("test", seed, 100)))


def test_every_annotation_is_right_and_the_last_one_is_the_answer(
    train: list[dict[str, str]], test: list[dict[str, str]]
) -> None:
    for row in train[:3000] + test:
        *solution, last = row["answer"].split("\n")
        assert all(STEP.match(line) for line in solution), row
        steps = steps_of([row])
        assert all(eval(f"{a}{op}{b}") == c for a, op, b, c in steps)
        assert last == f"#### {steps[-1][3]}"


def test_a_later_step_goes_on_from_the_result_before(train: list[dict[str, str]]) -> None:
    chains = [steps for row in train if len(steps := steps_of([row])) > 1]
    assert chains
    assert all(after[0] == before[3] for steps in chains for before, after in pairwise(steps))


def test_every_operand_can_be_read_in_the_question(train: list[dict[str, str]]) -> None:
    for row in train[:3000]:
        numbers = [int(number) for number in re.findall(r"\d+", row["question"])]
        steps = steps_of([row])
        assert sorted(numbers) == sorted([steps[0][0], *(b for _, _, b, _ in steps)])


def test_problems_are_the_same_each_time_and_others_for_another_seed() -> None:
    assert generate_problems("test") == generate_problems("test", 0, 256)
    assert generate_problems("train", 7, 50) == generate_problems("train", 7, 50)
    assert generate_problems("train", 7, 50) != generate_problems("train", 8, 50)


def test_no_question_occurs_twice(train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    questions = [row["question"] for row in train + test]
    assert len(set(questions)) == len(questions)
    assert len(test) >= 200


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'valid' is unknown: use one of train, test"):
        generate_problems("valid")


def test_more_rows_than_there_are_questions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHARES", {"+": 1})
    monkeypatch.setattr(synthetic, "PEOPLE", {"Tom": "He", "Ana": "She"})
    monkeypatch.setattr(synthetic, "ITEMS", ("eggs",))
    monkeypatch.setattr(synthetic, "MOST_REPEATS", 200)
    with pytest.raises(ValueError, match="count 100000 is too large: the test split has hardly more than"):
        generate_problems("test", count=100_000)
