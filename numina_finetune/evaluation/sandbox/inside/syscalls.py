"""Numbers of the system calls that sandboxed code may use, and of the few that set the sandbox up.

Source: Linux's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import platform

_ARCHITECTURES = {"x86_64": 0, "aarch64": 1}

_MEMORY = """
brk 12 214, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, mincore 27 232, msync 26
227, membarrier 324 283
"""
_FILES = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
open 2 -, creat 85 -, openat 257 56, openat2 437 437, close 3 57, close_range 436 436, lseek 8 62, stat 4 -, fstat
5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89
-, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -,
mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86
-, linkat 265 37, symlink 88 -, symlinkat 266 36, truncate 76 45, ftruncate 77 46, fallocate 285 47, fsync 74 82,
fdatasync 75 83, flock 73 32, utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -, chmod 90 -, fchmod 91
52, fchmodat 268 53, umask 95 166, statfs 137 43, fstatfs 138 44, sendfile 40 71, copy_file_range 326 285,
fadvise64 221 223
"""
_DESCRIPTORS = """
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441
441, eventfd2 290 19
"""
_SIGNALS = """
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133,
rt_sigtimedwait 128 137, sigaltstack 131 132, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -,
restart_syscall 219 128
"""
_TIME = """
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time
201 -, times 100 153
"""
_PROCESS = """
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgrp 111 -, getpgid 121 155, getsid 124 156, setsid
112 157, getrusage 98 165, getrlimit 97 163, setrlimit 160 164, sched_getaffinity 204 123, sched_yield 24 124,
sysinfo 99 179, uname 63 160, getrandom 318 278, getcpu 309 168, futex 202 98, set_robust_list 273 99,
get_robust_list 274 100, rseq 334 293, set_tid_address 218 96, exit 60 93, exit_group 231 94, wait4 61 260, waitid
247 95
"""
_CHECKED = """
kill 62 129, tgkill 234 131, clone 56 220, prctl 157 167, ioctl 16 29, fcntl 72 25, prlimit64 302 261
"""
_SETUP = """
pivot_root 155 41, seccomp 317 277, mount_setattr 442 442, landlock_create_ruleset 444 444, landlock_add_rule 445
445, landlock_restrict_self 446 446
"""

NEW = 424
"""From this number on, calls have one number on all architectures; libraries try newer ones and do without."""


def _table(text: str, architecture: int) -> dict[str, int]:
    """``name x86-64 aarch64`` triples, ``-`` where an architecture has no such call."""
    triples = (entry.split() for entry in text.replace("\n", " ").split(","))
    return {name: int(numbers[architecture]) for name, *numbers in triples if numbers[architecture] != "-"}


def numbers(machine: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Of one architecture: the calls that are free to use, those whose arguments are checked, and the sandbox's own.

    Raises:
        KeyError: the architecture is neither x86_64 nor aarch64.
    """
    architecture = _ARCHITECTURES[machine]
    free = "".join([_MEMORY, ",", _FILES, ",", _DESCRIPTORS, ",", _SIGNALS, ",", _TIME, ",", _PROCESS])
    return _table(free, architecture), _table(_CHECKED, architecture), _table(_SETUP, architecture)


def number(name: str) -> int:
    """This machine's number of one of the calls that set the sandbox up.

    Raises:
        OSError: the architecture is unknown.
    """
    try:
        return numbers(platform.machine())[2][name]
    except KeyError:
        raise OSError(f"system calls of {platform.machine()} are not known here: x86_64 and aarch64 are") from None
