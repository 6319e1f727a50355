"""Errors that reach the user, and the exit codes that machines read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What a process says by ending; the contract that supervisors build on."""

    DONE = 0
    CRASHED = 1
    """A crash, or a network or server fault that a retry may mend."""
    CONFIGURATION = 2
    """A configuration or data error that no retry can mend."""
    FAULTS_FOUND = 3
    """``plan`` does not fit, or ``verify`` found faults."""
    DIVERGED = 4
    """The training's loss, gradients or weights are no longer finite; no retry can mend it."""
    PREEMPTED = 42
    """Asked to stop by the machine; everything that could be saved is saved."""
    STOPPED = 130
    """Stopped by the user."""


class UserError(Exception):
    """A fault the user can mend, as one message that lists every problem.

    Attributes:
        problems: one sentence each: the value, where it stands, and the fix.
    """

    exit_code = ExitCode.CONFIGURATION

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:"] + [f"  - {problem}" for problem in self.problems])


class ConfigError(UserError):
    """The command line or the run's YAML cannot work."""


class DataError(UserError):
    """Rows, conversations or token ids that cannot be trained on."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or belongs to another run."""


class PushFailed(UserError):
    """The hub could not be given a model that is whole here; the same command may do it later."""

    exit_code = ExitCode.CRASHED


class TrainingDiverged(UserError):
    """Loss and gradients are not finite in too many optimizer steps in a row, or the weights are not."""

    exit_code = ExitCode.DIVERGED


def all_found(needed: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each of several searches finds, by its name.

    Raises:
        ConfigError: what is wrong in any of them, all at once.
    """
    found: dict[str, Any] = {}
    faults: list[str] = []
    for name, find in needed.items():
        try:
            found[name] = find()
        except UserError as error:
            faults += error.problems
    if faults:
        raise ConfigError(faults)
    return found
