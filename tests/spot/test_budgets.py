"""What an ended life is taken for, and what it costs."""

from __future__ import annotations

import pytest

from numina_finetune.spot.budgets import Budgets, Ending, Life, Spent, Verdict, charge, judge


def outcome(kind: str, step: int | None = 50) -> dict[str, object]:
    return {"kind": kind, "step": step, "reason": "why", "host": "w-0"}


@pytest.mark.parametrize(
    ("outcomes", "codes", "sound", "ending"),
    [
        (["done"], [0, 0], True, Ending.DONE),
        (["done"], [0, 137], False, Ending.DONE),
        (["preempted"], [1, 1], True, Ending.PREEMPTED),  # a launcher turned 42 into 1
        (["crashed", "preempted"], [1, 42], True, Ending.PREEMPTED),  # the sibling's connection broke
        (["crashed"], [1, 1], False, Ending.PREEMPTED),  # its worker is gone
        (["crashed"], [1, 1], True, Ending.CRASHED),
        (["configuration"], [2], True, Ending.CONFIGURATION),
        (["diverged"], [4], True, Ending.DIVERGED),
        (["diverged"], [1, 1], True, Ending.DIVERGED),  # a launcher turned 4 into 1
        (["stopped"], [130], True, Ending.STOPPED),
        ([], [1, 42], True, Ending.PREEMPTED),
        ([], [2], True, Ending.CONFIGURATION),
        ([], [4], True, Ending.DIVERGED),
        ([], [130], True, Ending.STOPPED),
        ([], [0], True, Ending.CRASHED),  # nothing says that it is done
        ([], [137], True, Ending.CRASHED),
        ([], [137], False, Ending.PREEMPTED),
        ([], [None], True, Ending.CRASHED),
        ([], [], False, Ending.PREEMPTED),
    ],
)
def test_outcomes_and_the_machine_decide_before_exit_codes(
    outcomes: list[str], codes: list[int | None], sound: bool, ending: Ending
) -> None:
    assert judge(Life([outcome(kind) for kind in outcomes], codes, sound)).ending == ending


def test_preemptions_cost_nothing_however_many() -> None:
    spent = Spent()
    for _ in range(1000):
        spent, over = charge(spent, Verdict(Ending.PREEMPTED, 10, ""), 0, Budgets())
        assert not over
    assert (spent.preemptions, spent.crashes) == (1000, 0)


def test_a_training_that_diverged_is_over_however_much_it_saved() -> None:
    spent, over = charge(Spent(saved_step=10), Verdict(Ending.DIVERGED, 22, "weights"), 20, Budgets())
    assert "diverged" in over and "weights" in over
    assert (spent.crashes, spent.saved_step) == (0, 20)


def test_progress_forgives_crashes_and_a_step_that_only_looks_further_does_not() -> None:
    budgets, spent = Budgets(max_crashes=3), Spent()
    for step, saved in ((57, 50), (67, 60), (77, 70), (87, 80)):
        spent, over = charge(spent, Verdict(Ending.CRASHED, step, ""), saved, budgets)
        assert not over
    for step in (88, 89):
        spent, over = charge(spent, Verdict(Ending.CRASHED, step, "bad"), 80, budgets)
    assert "3 crashes in a row without progress: bad" in over


def test_the_same_step_twice_ends_it_but_a_failure_before_the_first_step_is_counted() -> None:
    spent, over = charge(Spent(), Verdict(Ending.CRASHED, 7, ""), 0, Budgets())
    assert not over
    assert "step 7 crashed twice" in charge(spent, Verdict(Ending.CRASHED, 7, ""), 0, Budgets())[1]
    spent, over = charge(Spent(), Verdict(Ending.CRASHED, 0, "hub"), 0, Budgets())
    assert not charge(spent, Verdict(Ending.CRASHED, 0, "hub"), 0, Budgets())[1]


def test_stalls_have_a_budget_of_their_own() -> None:
    spent = Spent()
    for _ in range(3):
        spent, over = charge(spent, Verdict(Ending.STALLED, 5, "no step"), 0, Budgets(max_stalls=3))
    assert "3 stalls" in over and spent.crashes == 0
