"""What sandboxed code may use, what must protect the machine from it, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Minimum(StrEnum):
    """The protections without which no code is run; whatever else the machine has is used as well."""

    ISOLATED = "isolated"
    """Namespaces and seccomp: processes, network and files of its own."""
    FILTERED = "filtered"
    """Seccomp and Landlock, where the machine has no namespaces for it, as in most containers: the code shares the
    machine's processes and network, but has no system call to reach them, and writes no files."""
    NONE = "none"
    """Limits of resources alone will do: the code can read, and send away, what user nobody (or the user who runs
    this) can."""


class Outcome(StrEnum):
    """How a round ended."""

    OK = "ok"
    ERROR = "error"
    """An exception that the code did not catch."""
    TIMEOUT = "timeout"
    KILLED = "killed"
    """The interpreter died, or had to be ended: by exit, crash, processor time, output without end."""


@dataclass(frozen=True)
class Limits:
    """What one interpreter may use.

    Raises:
        ValueError: a limit is not positive.
    """

    wall_seconds: float = 10.0
    """Of a round."""
    cpu_seconds: int = 120
    """Of processor time, of all rounds."""
    memory: int = 1 << 30
    """Bytes of address space, beyond what the interpreter itself has."""
    disk: int = 16 << 20
    """Bytes in the private folder, and of one file."""
    files: int = 1024
    """Files and folders in it."""
    open_files: int = 64
    threads: int = 32
    output_bytes: int = 1 << 20
    """Printed in a round; more ends the interpreter."""
    output_chars: int | None = 200
    """Of the result that are kept; None = all. NuminaMath's own inference keeps 200."""
    minimum: Minimum = Minimum.ISOLATED

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{name} is {value}, needs more than 0")


@dataclass(frozen=True)
class Execution:
    """One round."""

    outcome: Outcome
    output: str
    """What the code printed, its last expression's value and its traceback; why the interpreter was lost, if it was."""
    seconds: float
    """Of wall time."""


TRUNCATED = " ... (output truncated)"


def truncated(text: str, limit: int | None, *, keep_end: bool = False) -> str:
    """The first ``limit`` characters of a result, marked as NuminaMath's inference marks it.

    Args:
        keep_end: append the last line, which names the error at the end of a traceback.
    """
    if limit is None or len(text) <= limit:
        return text
    start = text[:limit] + TRUNCATED
    last = text.rstrip("\n").rpartition("\n")[2]
    return f"{start}\n{last[:limit]}" if keep_end else start
