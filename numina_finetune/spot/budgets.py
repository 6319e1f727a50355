"""What an ended life was, and what it costs the run's budgets.

`outcome.json` and the state of the machine decide; exit codes come last, because launchers replace them, and because
the survivors of a preempted worker end with whatever error the broken connection gave them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from numina_finetune.errors import ExitCode

_KILLED = 128 + 9


class Ending(StrEnum):
    DONE = "done"
    PREEMPTED = "preempted"
    CRASHED = "crashed"
    CONFIGURATION = "configuration"
    DIVERGED = "diverged"
    STOPPED = "stopped"
    STALLED = "stalled"


@dataclass(frozen=True)
class Life:
    """What is left of a life.

    Attributes:
        outcomes: each process's ``outcome.json``.
        exit_codes: of each worker; None where it is not known.
        machine_sound: every node is READY and healthy.
        steps: the last step that a worker logged.
    """

    outcomes: Sequence[Mapping[str, Any]]
    exit_codes: Sequence[int | None]
    machine_sound: bool
    steps: int | None = None


@dataclass(frozen=True)
class Verdict:
    ending: Ending
    step: int | None
    reason: str


def judge(life: Life) -> Verdict:
    """What the life was; ask it only after the machine's state was given time to show."""
    kinds = {str(outcome.get("kind")): outcome for outcome in reversed(list(life.outcomes))}
    known = [int(outcome["step"]) for outcome in life.outcomes if outcome.get("step") is not None]
    step = max([*known, *([] if life.steps is None else [life.steps])], default=None)

    def told(kind: Ending, by: str) -> Verdict:
        outcome = kinds[by]
        return Verdict(kind, step, f"{outcome.get('reason', '')} ({outcome.get('host', 'a worker')})")

    for kind in (Ending.DONE, Ending.CONFIGURATION, Ending.DIVERGED, Ending.PREEMPTED, Ending.STOPPED):
        if kind in kinds:
            return told(kind, kind)
    if not life.machine_sound:
        return Verdict(Ending.PREEMPTED, step, "the machine, or one of its nodes, is gone")
    if Ending.CRASHED in kinds:
        return told(Ending.CRASHED, Ending.CRASHED)
    return _by_exit_codes(life, step)


def _by_exit_codes(life: Life, step: int | None) -> Verdict:
    codes = [code for code in life.exit_codes if code is not None]
    for code, kind in (
        (ExitCode.CONFIGURATION, Ending.CONFIGURATION),
        (ExitCode.DIVERGED, Ending.DIVERGED),
        (ExitCode.PREEMPTED, Ending.PREEMPTED),
        (ExitCode.STOPPED, Ending.STOPPED),
    ):
        if code in codes:
            return Verdict(kind, step, f"exit code {int(code)}, and no outcome.json")
    shown = ", ".join("none" if code is None else str(code) for code in life.exit_codes)
    if all(code == ExitCode.DONE for code in life.exit_codes):
        # A training that leaves its loop early and exits 0 is not done.
        return Verdict(Ending.CRASHED, step, "exit code 0, but no outcome.json says that the run is done")
    killed = " (137: killed, perhaps for memory)" if _KILLED in codes else ""
    return Verdict(Ending.CRASHED, step, f"exit codes {shown}{killed}, and no outcome.json")


@dataclass(frozen=True)
class Budgets:
    """Limits; the counts below are compared with them."""

    max_crashes: int = 3
    """Crashes without progress in between that end the run."""
    max_stalls: int = 3


@dataclass(frozen=True)
class Spent:
    """Counts over the whole run; those of crashes, stalls and fruitless lives since the last progress."""

    preemptions: int = 0
    crashes: int = 0
    stalls: int = 0
    refusals: int = 0
    """In a row."""
    fruitless: int = 0
    """Lives in a row that saved nothing new."""
    crash_step: int | None = None
    saved_step: int = 0
    """Of the newest committed checkpoint."""
    restarts: int = 0
    """Crashes and stalls over the whole run."""


def charge(spent: Spent, verdict: Verdict, saved_step: int, budgets: Budgets) -> tuple[Spent, str]:
    """The counts after a life, and why there shall be no other one; "" if there may be.

    Args:
        saved_step: of the newest committed checkpoint; progress is a greater one than after the life before.
    """
    spent = replace(spent, refusals=0, fruitless=spent.fruitless + 1)
    if saved_step > spent.saved_step:
        spent = replace(spent, saved_step=saved_step, crashes=0, stalls=0, fruitless=0, crash_step=None)
    if verdict.ending == Ending.PREEMPTED:
        return replace(spent, preemptions=spent.preemptions + 1), ""
    if verdict.ending == Ending.CONFIGURATION:
        return spent, f"a configuration or data error, which no retry can mend: {verdict.reason}"
    if verdict.ending == Ending.DIVERGED:
        return spent, f"the training diverged, which no retry can mend: {verdict.reason}"
    if verdict.ending == Ending.STALLED:
        spent = replace(spent, stalls=spent.stalls + 1, restarts=spent.restarts + 1)
        over = spent.stalls >= budgets.max_stalls
        return spent, f"{spent.stalls} stalls in a row without progress: {verdict.reason}" if over else ""
    if verdict.ending != Ending.CRASHED:
        return spent, ""
    # Step 0 is also told by a life that failed before its training began, for which there are other reasons.
    same = bool(verdict.step) and verdict.step == spent.crash_step
    spent = replace(spent, crashes=spent.crashes + 1, restarts=spent.restarts + 1, crash_step=verdict.step)
    if same:
        return spent, f"step {verdict.step} crashed twice: {verdict.reason}"
    over = spent.crashes >= budgets.max_crashes
    return spent, f"{spent.crashes} crashes in a row without progress: {verdict.reason}" if over else ""
