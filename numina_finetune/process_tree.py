"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal

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
