"""Problems and examples come from benchmarks and files, and no problem is shown as an example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.errors import DataError
from numina_finetune.evaluation.tasks import (
    TASKS,
    Problem,
    Problems,
    Task,
    find_task,
    load_examples,
    load_problems,
)
from tests.conftest import real_data


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(name: str, **named: str | None) -> Problems:
    return load_problems(find_task(name, named.get("question"), named.get("answer"), named.get("style")))


@pytest.mark.parametrize(
    ("file", "style", "count", "first"),
    [
        ("gsm8k/test.jsonl", "gsm8k", 1319, "18"),
        ("math/math500_test.jsonl", "boxed", 500, r"\left( 3, \frac{\pi}{2} \right)"),
        ("math/math_test.jsonl", "boxed", 5000, "2"),
    ],
)
def test_real_benchmarks_load_whole_with_their_style_and_final_answers(
    file: str, style: str, count: int, first: str
) -> None:
    found = load(str(real_data() / file))
    assert (found.style, len(found.problems), found.left_out) == (style, count, 0)
    assert found.problems[0].gold == first


def test_the_benchmarks_are_held_out_splits() -> None:
    assert {name: task.source.split for name, task in TASKS.items()} == {
        "gsm8k": "test",
        "math500": "test",
        "synthetic-gsm8k": "test",
    }
    assert load("synthetic-gsm8k").problems != load("synthetic-gsm8k[train]").problems


def test_columns_can_be_named_and_missing_ones_are_all_told(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"q": "1+1?", "a": "#### 2"})
    assert load(path, question="q", answer="a").problems == [Problem("0", "1+1?", "2", "#### 2")]
    with pytest.raises(DataError) as fault:
        load(path)
    assert len(fault.value.problems) == 2
    assert "--question-field" in fault.value.problems[0] and "it has q, a" in fault.value.problems[0]


def test_rows_without_a_final_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"problem": "p", "solution": "s", "answer": "7"},
        {"problem": "p", "solution": "s", "answer": "proof"},
        {"problem": "p", "solution": "s", "answer": ""},
        {"problem": "p", "solution": "s", "answer": r"\frac12"},
    ]
    found = load(written(tmp_path / "a.jsonl", *rows))
    assert ([problem.gold for problem in found.problems], found.left_out, found.style) == (
        ["7", r"\frac12"],
        2,
        "boxed",
    )
    with pytest.raises(DataError, match="no row has a question"):
        load(written(tmp_path / "b.jsonl", {"problem": "p", "solution": "it is so"}))


def test_a_chosen_part_is_the_same_for_the_same_seed_and_in_order() -> None:
    task = find_task("synthetic-gsm8k", None, None, None)
    some = load_problems(task, 20, seed=1).problems
    assert some == load_problems(task, 20, seed=1).problems != load_problems(task, 20, seed=2).problems
    assert [int(problem.id) for problem in some] == sorted(int(problem.id) for problem in some)
    assert len(load_problems(task, 10_000).problems) == 256


def test_examples_come_from_the_training_split_and_ask_none_of_the_problems(tmp_path: Path) -> None:
    task = find_task("synthetic-gsm8k", None, None, None)
    problems = load_problems(task).problems
    examples = load_examples(task, None, problems, 5, seed=0)
    assert examples == load_examples(task, None, problems, 5, seed=0) != load_examples(task, None, problems, 5, seed=1)
    assert all("####" in example.solution for example in examples)

    asked = {"question": f" {problems[3].question.upper()} ", "answer": "#### 1"}  # typeset otherwise
    other = {"question": "Of what?", "answer": "#### 2"}
    path = written(tmp_path / "shots.jsonl", asked, other)
    assert [example.question for example in load_examples(task, path, problems, 1, seed=0)] == ["Of what?"]
    with pytest.raises(DataError, match="has 1 examples whose questions are not the task's"):
        load_examples(task, path, problems, 2, seed=0)


def test_a_task_without_a_training_split_needs_a_file_of_examples() -> None:
    task = Task("math500", TASKS["math500"].source, "boxed")
    with pytest.raises(DataError, match="--shots-file"):
        load_examples(task, None, [], 2, seed=0)


def test_a_file_that_is_not_there_is_told_by_the_option_that_names_it() -> None:
    with pytest.raises(DataError, match=r"--task nowhere\.jsonl does not exist"):
        load("nowhere.jsonl")
