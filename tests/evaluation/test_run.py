"""An evaluation records every batch, goes on where it was cut, and two of them are compared problem by problem."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from numina_finetune.errors import ConfigError
from numina_finetune.evaluation import results
from numina_finetune.evaluation.answers import Style
from numina_finetune.evaluation.compare import Comparison, compare
from numina_finetune.evaluation.page import html_comparison, length_bars, markdown_comparison
from numina_finetune.evaluation.results import PROBLEMS, ResultFolder, read_results
from numina_finetune.evaluation.run import reports, run_batches, summarise
from numina_finetune.evaluation.scoring import Record, figures, grade, measured_styles
from numina_finetune.evaluation.solving import Attempt
from numina_finetune.evaluation.tasks import Problem, Problems
from tests.gcs import gcs

PROBLEMS_ASKED = [
    Problem(str(number), f"{number} + 1 = ?", str(number + 1), f"#### {number + 1}") for number in range(10)
]
ASKED = Problems("sums", "gsm8k", PROBLEMS_ASKED, 0)
SETTINGS = {"model": "scripted", "task": "sums", "max_new_tokens": 9}


class Killed(Exception):
    """Stands for the end of the process."""


class Solver:
    """Answers right where a problem's number is below ``right``."""

    def __init__(self, right: int, *, dies_after: int | None = None) -> None:
        self.right, self.dies_after, self.calls = right, dies_after, 0

    def __call__(self, problems: Sequence[Problem]) -> list[Attempt]:
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            raise Killed
        return [
            Attempt(f"so #### {int(p.id) + 1 if int(p.id) < self.right else 'unknown'}", 5, "answered")
            for p in problems
        ]


def evaluated(folder: Path | str, solver: Solver, *, asked: Problems = ASKED, samples: int = 1) -> list[Record]:
    """One life of an evaluation of ``asked`` in batches of 3."""
    place = ResultFolder(str(folder))
    place.refuse_other(SETTINGS)
    done = place.begin(SETTINGS, {})
    records = run_batches(asked, solver, done=done, record=place.append, samples=samples, rows=3, stop=lambda: False)
    assert records is not None
    summary = summarise(asked, records, SETTINGS)
    place.finish(summary, reports(summary, records))
    return records


def test_a_killed_evaluation_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        evaluated(tmp_path / "cut", Solver(6, dies_after=2))
    with (tmp_path / "cut" / PROBLEMS).open("a", encoding="utf-8") as file:
        file.write('{"id": "9", "question": "9 +')  # the line that a kill cut off
    second = Solver(6)
    records = evaluated(tmp_path / "cut", second)
    assert second.calls == 2, "6 of 10 problems were done"
    assert records == evaluated(tmp_path / "whole", Solver(6))
    assert len((tmp_path / "cut" / PROBLEMS).read_text(encoding="utf-8").splitlines()) == 10
    assert read_results(str(tmp_path / "cut")).summary == read_results(str(tmp_path / "whole")).summary


def test_in_a_bucket_it_goes_on_behind_the_last_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native_here: None
) -> None:
    with gcs() as service:
        url = f"{service.url}/{tmp_path.parent.name}/results"
        with pytest.raises(Killed):
            evaluated(url, Solver(6, dies_after=1))  # too short a life for a copy
        monkeypatch.setattr(results, "PUBLISH_SECONDS", 0.0)
        with pytest.raises(Killed):
            evaluated(url, Solver(6, dies_after=3))
        last = Solver(6)
        records = evaluated(url, last)
        assert last.calls == 1, "the second life did 9 of 10 problems, and each batch was copied"
        found = read_results(url)
        assert sorted(found.records, key=lambda record: record.problem.id) == records and found.summary is not None


def test_a_finished_evaluation_asks_nothing_again(tmp_path: Path) -> None:
    first = evaluated(tmp_path, Solver(4))
    assert evaluated(tmp_path, Solver(0, dies_after=0)) == first


def test_a_folder_with_another_evaluation_is_refused_with_both_values(tmp_path: Path) -> None:
    evaluated(tmp_path, Solver(4))
    with pytest.raises(ConfigError, match="max_new_tokens 9, this command has 10") as fault:
        ResultFolder(str(tmp_path)).refuse_other({**SETTINGS, "max_new_tokens": 10, "model": "other"})
    assert len(fault.value.problems) == 2


def test_asked_to_stop_it_ends_before_the_next_batch(tmp_path: Path) -> None:
    words = iter([False, True])
    solver = Solver(4)
    assert run_batches(ASKED, solver, samples=1, rows=3, stop=lambda: next(words)) is None
    assert solver.calls == 1


def test_all_attempts_at_a_problem_are_made_together_and_counted_by_problem(tmp_path: Path) -> None:
    asked_at_once: list[list[str]] = []

    def solve(problems: Sequence[Problem]) -> list[Attempt]:
        asked_at_once.append([problem.id for problem in problems])
        return [Attempt(f"#### {'1' if place % 2 else '0'}", 3, "answered") for place in range(len(problems))]

    records = run_batches(ASKED, solve, samples=2, rows=4, stop=lambda: False)
    assert records is not None
    assert asked_at_once[0] == ["0", "0", "1", "1"]
    found = figures(records, "gsm8k")
    assert (found.accuracy, found.attempts, found.pass_at) == (0.05, 2, {"2": 0.1})
    assert "normal" in found.interval


@pytest.mark.parametrize(
    ("text", "style", "right"),
    [
        ("I say #### 72.\nOr 73", "gsm8k", {"gsm8k": True, "gsm8k-flexible": False}),
        ("I say 72", "gsm8k", {"gsm8k": False, "gsm8k-flexible": True}),
        (r"\boxed{\frac{144}{2}}", "boxed", {"boxed": True}),
    ],
)
def test_strict_and_flexible_verdicts_stand_side_by_side(text: str, style: Style, right: dict[str, bool]) -> None:
    record = grade(Problem("0", "?", "72", "#### 72"), [Attempt(text, 1, "answered")], measured_styles(style))
    assert record.graded[0].right == right
    assert Record.from_mapping(json.loads(json.dumps(record.to_mapping()))) == record


def test_the_figures_say_how_sure_they_are_and_how_good_a_guess_is() -> None:
    gold = Problem("0", "?", "2", "#### 2")
    texts = ["#### 2", "#### 2", "#### 3", "I do not know"]
    records = [grade(gold, [Attempt(text, 1, "answered")], measured_styles("gsm8k")) for text in texts]
    found = figures(records, "gsm8k")
    assert (found.problems, found.accuracy, found.without_answer, found.majority) == (4, 0.5, 1, 1.0)
    assert found.lower < 0.5 < found.upper


def test_what_a_model_writes_is_text_on_the_page(tmp_path: Path) -> None:
    asked = Problems("sums", "gsm8k", [Problem("0", "Is <b> bold?", "1", "#### 1")], 0)

    def solve(problems: Sequence[Problem]) -> list[Attempt]:
        return [Attempt("<script>alert(1)</script> #### 2", 5, "length") for _ in problems]

    records = run_batches(asked, solve, samples=1, rows=1, stop=lambda: False)
    assert records is not None
    page = reports(summarise(asked, records, SETTINGS), records)["report.html"]
    assert "&lt;script&gt;alert(1)" in page and "<script>" not in page
    assert "Is &lt;b&gt; bold?" in page and "Failed: 1" in page
    assert 'src="http' not in page and "<link" not in page


def test_the_histogram_counts_every_attempt_and_the_cut_ones() -> None:
    graded = [
        grade(PROBLEMS_ASKED[0], [Attempt("", tokens, stopped)], ("gsm8k",))
        for tokens, stopped in ((1, "answered"), (39, "length"), (40, "length"))
    ]
    bars = length_bars(graded)
    assert (sum(bar["count"] for bar in bars), sum(bar["cut"] for bar in bars)) == (3, 2)
    assert bars[0]["count"] == 1 and bars[13]["count"] == 2


# --- two of them ------------------------------------------------------------------------------------------------------


def compared(tmp_path: Path, first: int, second: int, **options: int) -> Comparison:
    for name, right in (("first", first), ("second", second)):
        evaluated(tmp_path / name, Solver(right), **options)  # type: ignore[arg-type]
    return compare(read_results(str(tmp_path / "first")), read_results(str(tmp_path / "second")))


def test_a_comparison_counts_pairs_and_names_what_changed(tmp_path: Path) -> None:
    found = compared(tmp_path, 2, 7)
    assert vars(found.counts) == {"both": 2, "only_first": 0, "only_second": 5, "neither": 3}
    assert found.difference == pytest.approx(0.5) and found.lower < 0.5 < found.upper
    assert found.p == pytest.approx(2 / 2**5)
    assert [pair.first.problem.id for pair in found.gained] == ["2", "3", "4", "5", "6"] and found.lost == []
    assert found.to_mapping()["gained"] == ["2", "3", "4", "5", "6"]
    assert "only the second 5" in found.line
    assert "Better in the second: 5" in html_comparison(found) and "3 + 1 = ?" in markdown_comparison(found)


def test_with_several_attempts_shares_are_compared(tmp_path: Path) -> None:
    found = compared(tmp_path, 2, 7, samples=2)
    assert found.counts is None and found.p is None
    assert found.lower <= 0.5 <= found.upper and "bootstrap" in found.line


def test_other_problems_and_unfinished_evaluations_are_not_compared(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", Solver(3))
    evaluated(tmp_path / "b", Solver(3), asked=Problems("sums", "gsm8k", PROBLEMS_ASKED[:5], 0))
    a, b = read_results(str(tmp_path / "a")), read_results(str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="not on the same problems"):
        compare(a, b)
    with pytest.raises(Killed):
        evaluated(tmp_path / "c", Solver(3, dies_after=1))
    with pytest.raises(ConfigError, match="is not finished"):
        compare(a, read_results(str(tmp_path / "c")))
    with pytest.raises(ConfigError, match="holds no evaluation"):
        read_results(str(tmp_path / "nothing"))
