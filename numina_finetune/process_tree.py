"""Processes that must not outlive the one that started them, and this package's own commands as such."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from numina_finetune.errors import ExitCode

_PR_SET_PDEATHSIG = 1
"""``prctl`` option: the signal a process gets when its parent dies (linux/prctl.h)."""


def die_with_parent(death: signal.Signals, parent: int) -> None:
    """Ask the kernel for the signal ``death`` when this process's parent dies.

    Args:
        parent: its process id; if another process is the parent by now, it has died before the kernel was asked.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, death)
    if os.getppid() != parent:
        os.kill(os.getpid(), death)


class Children:
    """Commands of this package in processes of their own, which are told of every notice that this one gets.

    Each has a session of its own, so that a Ctrl-C reaches this process alone, which passes it on once. If this process
    is killed, none is left behind: the kernel sends them SIGTERM, on which trainings save.
    """

    def __init__(self, lock: int | None = None) -> None:
        """``lock``: a descriptor that the children hold too, until the last of them has ended."""
        self._kept = () if lock is None else (lock,)
        self._started: list[subprocess.Popen[bytes]] = []
        self.signal: int | None = None
        """The first notice."""

    def start(
        self, words: Sequence[str], output: IO[bytes] | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start ``numina-finetune`` with these words.

        Args:
            output: takes all that it prints; None: where this process's own goes.
            environment: its variables; None: this process's.
        """
        if output is None:
            sys.stdout.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "numina_finetune", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env=environment,
            start_new_session=True,
            pass_fds=self._kept,
            preexec_fn=functools.partial(die_with_parent, signal.SIGTERM, os.getpid()),
        )
        self._started = [*(each for each in self._started if each.poll() is None), process]
        if self.signal is not None:  # it came while the process was being made
            process.send_signal(self.signal)
        return process

    def pass_on(self, number: int, _: FrameType | None = None) -> None:
        """Send the signal to all that are running, and begin nothing any more."""
        self.signal = self.signal or number
        for process in self._started:
            if process.poll() is None:
                process.send_signal(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Passes SIGTERM and SIGINT on meanwhile."""
        before = {number: signal.signal(number, self.pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def noticed(self) -> ExitCode | None:
        """What this process says by its end after a notice; None where there was none."""
        if self.signal is None:
            return None
        return ExitCode.STOPPED if self.signal == signal.SIGINT else ExitCode.PREEMPTED


def exit_code_of(returncode: int) -> ExitCode:
    """What the end of a process of this package means; no launcher stands between, so that its exit code is its own."""
    return {
        ExitCode.DONE: ExitCode.DONE,
        ExitCode.CONFIGURATION: ExitCode.CONFIGURATION,
        ExitCode.DIVERGED: ExitCode.DIVERGED,
        ExitCode.STOPPED: ExitCode.STOPPED,
        -signal.SIGINT: ExitCode.STOPPED,  # before it had its own handlers
        ExitCode.PREEMPTED: ExitCode.PREEMPTED,
        -signal.SIGTERM: ExitCode.PREEMPTED,
    }.get(returncode, ExitCode.CRASHED)
