"""Which system calls sandboxed code may make, as a BPF program for seccomp.

All that is not listed is refused: sockets, new processes and programs, new namespaces, mounts, tracing, other
processes' memory, keyrings, BPF, io_uring, shared memory, modules and what kernels to come will add. Refused calls fail
with EPERM, so that code sees a PermissionError; calls newer than ``syscalls.NEW`` with ENOSYS, so that libraries fall
back on older ones. Threads are allowed, processes are not: limits of memory and processor time hold for each process.

Source: linux/seccomp.h, linux/filter.h, linux/audit.h.
"""

from __future__ import annotations

import errno
import platform
import struct

from .syscalls import NEW, numbers

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH = 0, 4
"""Offsets in the kernel's ``seccomp_data``; argument n is at 16 + 8 n, its low half first."""
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_THREAD = 0x00010000
_NAMESPACES = 0x7E020080
"""Every ``CLONE_NEW…`` flag."""
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
"""Flags and locks; not F_SETOWN and F_SETSIG, which have the kernel send signals to any process, nor larger pipes."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Questions about terminals and waiting bytes, and flags of descriptors."""
_CHANGES_FILES = frozenset(
    ("chmod", "fchmod", "fchmodat", "utime", "utimes", "utimensat", "futimesat", "truncate", "flock")
)
_PRCTL = (15, 16)
"""A thread's name."""

_Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


def program(own: int, *, namespaces: bool, machine: str | None = None) -> bytes:
    """The filter for one process.

    Args:
        own: its id, as it sees it itself: it may send signals to that one only.
        namespaces: whether the process has its own. Without them it may start no threads, because the kernel would
            count them together with all others of the user, and not change files by name: Landlock leaves modes and
            times of the user's own files open.
        machine: the architecture; None = this one.

    Raises:
        OSError: the architecture is unknown.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURE:
        raise OSError(f"seccomp filters for {machine} are not known here: x86_64 and aarch64 are")
    free, checked, _ = numbers(machine)
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for name, allowed in free.items():
        if namespaces or name not in _CHANGES_FILES:
            code += _if_equal(allowed, [(_RETURN, 0, 0, _ALLOW)])
    for name, values, argument in (
        ("kill", (own,), 0),
        ("tgkill", (own,), 0),
        ("prlimit64", (0, own), 0),
        ("prctl", _PRCTL, 0),
        ("ioctl", _IOCTL, 1),
        ("fcntl", _FCNTL, 1),
    ):
        code += _if_equal(checked[name], _one_of(argument, values))
    if namespaces:
        code += _if_equal(checked["clone"], _thread())
    code += [(_AT_LEAST, 0, 1, NEW), _refuse(errno.ENOSYS), _refuse(errno.EPERM)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _if_equal(number: int, then: list[_Instruction]) -> list[_Instruction]:
    """``then``, which returns, where the loaded value is ``number``."""
    return [(_EQUAL, 0, len(then), number), *then]


def _one_of(argument: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allow the call if an argument is one of the values; the kernel reads the low half of these arguments only."""
    code: list[_Instruction] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        code += _if_equal(value, [(_RETURN, 0, 0, _ALLOW)])
    return [*code, _refuse(errno.EPERM)]


def _thread() -> list[_Instruction]:
    """Allow ``clone`` to start a thread of this process in its own namespaces."""
    return [
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 2, 0, _NAMESPACES),
        (_ANY_BIT, 0, 1, _THREAD),
        (_RETURN, 0, 0, _ALLOW),
        _refuse(errno.EPERM),
    ]


def _refuse(code: int) -> _Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)
