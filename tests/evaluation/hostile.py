"""Programs that try to get out of the sandbox, to do harm from inside, or to stay behind.

They stand in ``hostile_programs.txt``, each under its name; ``(harmless)`` marks what may be run with no protection but
limits of resources. Each prints ``ESCAPED`` (put together at run time) where it got what it wanted. Names in capitals
are given to it by the test: the host's process id, ports, paths and a file that must stay as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Program(NamedTuple):
    """One attempt."""

    code: str
    harmless: bool

    @property
    def makes_raw_calls(self) -> bool:
        """Whether it holds system call numbers or machine code of x86-64."""
        return "raw(" in self.code or "0xcd" in self.code


PREAMBLE = """
import os, sys
def escaped(): print("ESC" + "APED")
def attempt(call):
    try: result = call()
    except (Exception, SystemExit) as error: print(type(error).__name__, error); return
    escaped()
def raw(number, *arguments):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0: raise OSError(ctypes.get_errno(), "raw call")
    return result
"""


def _programs(text: str) -> dict[str, Program]:
    parts = re.split(r"^### (.*?)( \(harmless\))?$", text, flags=re.MULTILINE)[1:]
    return {
        name: Program(code, bool(mark)) for name, mark, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


PROGRAMS = _programs(Path(__file__).with_name("hostile_programs.txt").read_text(encoding="utf-8"))
