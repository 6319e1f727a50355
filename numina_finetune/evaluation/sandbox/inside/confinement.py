"""The layers between sandboxed code and the machine, each tried out before it is relied on.

``namespaces``: processes, mounts, network, users, System V objects of one's own, and a file tree of libraries only.
``seccomp``: a list of the system calls that may be made. ``landlock``: a list of the files that may be touched.
Limits of resources and the loss of all privileges are there always.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

from . import kernel, landlock, seccomp, tree

NAMESPACES, SECCOMP, LANDLOCK = "namespaces", "seccomp", "landlock"
_OTHERS = 3
"""Threads that are counted with the code's: the warden, the first process, and the interpreter itself."""
NOBODY = 65534
"""User and group that sandboxed code runs as, and, where root starts it, the machine's own of that number."""

_SHARED = (
    kernel.NEW_USER | kernel.NEW_MOUNT | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS | kernel.NEW_CGROUP
)  # with the other sandboxes: there is nothing in them, and seccomp refuses their use
_OWN = kernel.NEW_USER | kernel.NEW_MOUNT | kernel.NEW_IPC | kernel.NEW_PID


def probe(wanted: frozenset[str]) -> dict[str, str | None]:
    """Which of the layers this machine has: None for those, what it refused for the others.

    Raises:
        OSError: sandboxes could not read Python's own files.
    """
    attempts: dict[str, Callable[[], None]] = {
        NAMESPACES: _try_namespaces,
        SECCOMP: _try_seccomp,
        LANDLOCK: _try_landlock,
    }
    found = {name: _attempt(attempt) if name in wanted else "switched off" for name, attempt in attempts.items()}
    if found[NAMESPACES] is not None and (fault := _attempt(_try_reading)):
        raise OSError(fault)
    return found


def confine_keeper(*, namespaces: bool) -> None:
    """What all sandboxes share: nobody's rights and, with namespaces, a tree of libraries and no network."""
    _first_to_be_killed()
    if not namespaces:
        _become_nobody()
        os.chdir("/")
        return
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if os.geteuid() == 0:  # mount while root can: what it binds may be in folders closed to others
        kernel.unshare(kernel.NEW_MOUNT)
        tree.build()
        _become_nobody()
        _unshare_users(_SHARED, proc)
    else:
        _unshare_users(_SHARED, proc)
        tree.build()
    os.dup2(proc, PROC, inheritable=False)
    os.close(proc)


PROC = 200
"""The descriptor that wardens find the old /proc at; there is none in the tree."""


def confine_warden(limits: Mapping[str, int], *, namespaces: bool) -> None:
    """What one sandbox has for itself: with namespaces, processes and a folder of its own."""
    if namespaces:
        _unshare_users(_OWN, PROC)
        os.close(PROC)
        tree.add_home(limits["disk"], limits["files"])
    kernel.drop_privileges()


def confine_interpreter(limits: Mapping[str, int], layers: frozenset[str]) -> None:
    """The rest, in the process that runs the code."""
    namespaces = NAMESPACES in layers
    # Without namespaces a user's processes are counted over the whole machine, so that only a filter can limit them.
    threads = limits["threads"] + _OTHERS if namespaces else None
    ceilings: dict[int, int | None] = {
        resource.RLIMIT_AS: limits["mapped"] + limits["memory"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["disk"] if namespaces else 0,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: threads if SECCOMP in layers else _processes_of_this_user() + limits["threads"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_STACK: 8 << 20,
    }
    for what, ceiling in ceilings.items():
        if ceiling is not None:
            resource.setrlimit(what, (ceiling, ceiling))
    kernel.set_dumpable(False)  # no core dump, not even to a program of the machine's that takes them
    if LANDLOCK in layers:
        readable = ["/"] if namespaces else [*tree.libraries(), *tree.DEVICES]
        landlock.restrict(readable=readable, writable=[tree.HOME, "/dev/null"] if namespaces else ["/dev/null"])
    if SECCOMP in layers:
        kernel.set_filter(seccomp.program(os.getpid(), namespaces=namespaces))


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()


def _attempt(attempt: Callable[[], None]) -> str | None:
    """None if ``attempt`` works in a process of its own, else its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os.write(writing, b".")
        except OSError as error:
            os.write(writing, f"!{error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        answer = file.read().decode(errors="replace")
    os.waitpid(child, 0)
    return None if answer == "." else answer[1:] or "the process that tried it died"


def _try_namespaces() -> None:
    confine_keeper(namespaces=True)
    confine_warden({"disk": 1 << 20, "files": 16}, namespaces=True)
    _check_reading()


def _try_reading() -> None:
    _become_nobody()
    _check_reading()


def _check_reading() -> None:
    library = Path(os.__file__).parent
    if not os.access(library, os.R_OK | os.X_OK):
        raise OSError(
            f"{library} cannot be read by user {os.getuid()}: use a Python in an open folder, or do not be root"
        )


def _try_seccomp() -> None:
    kernel.drop_privileges()
    kernel.set_filter(seccomp.program(os.getpid(), namespaces=True))


def _try_landlock() -> None:
    kernel.drop_privileges()
    landlock.restrict(readable=["/"], writable=[])


def _unshare_users(namespaces: int, proc: int) -> None:
    """Leave ``namespaces``, those of users among them, and be nobody in the new one."""
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(namespaces)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def _become_nobody() -> None:
    """Give up root, if this is root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.set_dumpable(True)  # else its files under /proc stay root's


def _first_to_be_killed() -> None:
    """Should the machine run out of memory, the kernel takes sandboxes before anything else."""
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _processes_of_this_user() -> int:
    """Threads of all this user's processes, over the whole machine."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == os.getuid():
                count += len(list((process / "task").iterdir()))
        except OSError:  # ended in the meantime
            continue
    return count
