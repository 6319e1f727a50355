"""The kernel's calls that Python has no function for, through ctypes.

Sources: the manual pages of the calls, and linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct

from .syscalls import number

NEW_USER, NEW_PID, NEW_MOUNT, NEW_NET = 0x10000000, 0x20000000, 0x00020000, 0x40000000
NEW_IPC, NEW_UTS, NEW_CGROUP = 0x08000000, 0x04000000, 0x02000000
"""``CLONE_NEW…``: the namespaces that :func:`unshare` leaves."""

READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
"""Both ``MS_…`` and ``MOUNT_ATTR_…``."""
_BIND, _RECURSIVE_MOUNT, _PRIVATE = 4096, 16384, 1 << 18
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_DETACH = 2
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _DROP_BOUNDING, _NO_NEW_PRIVILEGES = 1, 4, 24, 38
_AMBIENT, _AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """The result of a call of libc's.

    Raises:
        OSError: it failed.
    """
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call that libc has no function for.

    Raises:
        OSError: it failed.
    """
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(_libc.syscall(ctypes.c_long(number(name)), *passed), name)


def unshare(namespaces: int) -> None:
    """Leave the namespaces; a new process namespace is for the children."""
    check(_libc.unshare(namespaces), "unshare")


def mount_tmpfs(folder: str, options: str) -> None:
    flags = ctypes.c_ulong(NO_SUID | NO_DEVICES | NO_EXEC)
    check(_libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options.encode()), f"mount tmpfs at {folder}")


def bind(source: str, target: str) -> None:
    """Show ``source``, with all that is mounted in it, at ``target`` too."""
    flags = ctypes.c_ulong(_BIND | _RECURSIVE_MOUNT)
    check(_libc.mount(source.encode(), target.encode(), None, flags, None), f"bind {target}")


def make_mounts_private() -> None:
    """What is mounted from here on is seen in this mount namespace only."""
    check(_libc.mount(None, b"/", None, ctypes.c_ulong(_PRIVATE | _RECURSIVE_MOUNT), None), "make mounts private")


def restrict_mount(folder: str, attributes: int, *, recursive: bool) -> None:
    """Add attributes (``READ_ONLY``, …) to a mount, and to those in it."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    call("mount_setattr", _AT_FDCWD, folder.encode() + b"\0", flags, wanted, len(wanted))


def change_root(folder: str) -> None:
    """Make ``folder`` the root of this mount namespace, and forget the old one."""
    os.chdir(folder)
    call("pivot_root", b".\0", b".\0")
    check(_libc.umount2(b".", _DETACH), "umount the old root")
    os.chdir("/")


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; the kernel forgets this when user or capabilities change.

    Args:
        parent: its process id as seen from here.
    """
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def set_dumpable(dumpable: bool) -> None:
    """Whether this process may be traced and dumped by its own user, and owns its files under /proc."""
    _prctl(_SET_DUMPABLE, int(dumpable))


def drop_privileges() -> None:
    """Give up all capabilities for good, and gain none by running anything."""
    _prctl(_NO_NEW_PRIVILEGES, 1)
    _libc.prctl(_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    capability = 0
    while _libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0) == 0:  # fails without privilege, and behind the last one
        capability += 1
    header, none = struct.pack("Ii", _CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6)
    check(_libc.capset(header, none), "capset")


def set_filter(program: bytes) -> None:
    """Have the kernel judge every further system call of this process by a BPF program, for good."""
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    call("seccomp", 1, 0, described)  # SECCOMP_SET_MODE_FILTER


def _prctl(option: int, value: int) -> None:
    check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")
