"""The interpreter that runs the code: its rounds share one set of names, as the cells of a notebook do.

Code and runner share one process, so nothing here is safe from the code; what a verdict says is believed by nobody but
the warden, and of this one problem.
"""

from __future__ import annotations

import ast
import builtins
import io
import linecache
import os
import random
import struct
import sys
import traceback
import types
from typing import Any, NoReturn

INPUT, OUTPUT, ERRORS, COMMANDS, VERDICTS = range(5)
"""Descriptors: nothing to read, what is printed (twice the same), the rounds' code, and one byte for each round."""
READY, OK, ERROR = b"r", b"k", b"e"
INNERMOST = 3
"""Frames of the code itself that a traceback shows at most, apart from the outermost."""


def serve() -> NoReturn:
    """Run code from ``COMMANDS``, round after round, until there is no more."""
    read, write = os.read, os.write  # code may replace them
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    names = module.__dict__ | {"__builtins__": builtins}
    module.__dict__.update(names)
    sys.stdin = open(INPUT, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _text(OUTPUT)
    sys.stderr = _text(ERRORS)
    _repeatable()
    write(VERDICTS, READY)
    number = 0
    while (code := _command(read)) is not None:
        number += 1
        verdict = run(code, f"<cell {number}>", module.__dict__)
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        write(VERDICTS, verdict)
    os._exit(0)


def run(code: str, name: str, names: dict[str, Any]) -> bytes:
    """Run one round, print the value of its last expression, and give the verdict."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if value is not None:
                names["_"] = value
                print(repr(value))
    except SystemExit as request:  # the round ends, the interpreter stays, as in a notebook
        if request.code is None or request.code == 0:
            return OK
        print(f"SystemExit: {request.code}", file=sys.stderr)
        return ERROR
    except BaseException as error:  # also KeyboardInterrupt and what code derives from BaseException
        _tell(error)
        return ERROR
    return OK


def _tell(error: BaseException) -> None:
    """Print the traceback: the frames of the code itself, then the error."""
    try:
        told = traceback.TracebackException(type(error), error, error.__traceback__)
        frames = [frame for frame in told.stack if frame.filename.startswith("<cell ")]
        shown = frames if len(frames) <= INNERMOST + 1 else [frames[0], *frames[-INNERMOST:]]
        places = traceback.StackSummary.from_list([(at.filename, at.lineno or 0, at.name, at.line) for at in shown])
        lines = ["Traceback (most recent call last):\n", *places.format()]
        text = "".join([*(lines if shown else []), *told.format_exception_only()])
        _flush(sys.stdout)
        print(text, end="", file=sys.stderr)
    except BaseException:  # out of memory or stack, or the error's own methods fail
        os.write(ERRORS, f"{type(error).__name__}\n".encode())


def _text(descriptor: int) -> io.TextIOWrapper:
    raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", line_buffering=True)


def _flush(stream: Any) -> None:
    """Code may have closed the stream, or put anything in its place."""
    try:
        stream.flush()
    except BaseException:
        return


def _command(read: Any) -> str | None:
    """The next round's code: four bytes that give the length of its UTF-8, which follows."""
    head = _exactly(read, 4)
    text = _exactly(read, struct.unpack("!I", head)[0]) if head else None
    return None if text is None else text.decode()


def _exactly(read: Any, count: int) -> bytes | None:
    parts = []
    while count:
        part = read(COMMANDS, min(count, 1 << 16))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _repeatable() -> None:
    """Random numbers are the same in every sandbox, so that an evaluation can be repeated."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
