"""The process between one interpreter and the outside: it confines, feeds, reads with a bound, times and kills.

It runs none of the code. The interpreter's side of the pipes is not trusted: whatever comes out of turn ends it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from . import interpreter, kernel, wire
from .confinement import NAMESPACES, confine_interpreter, confine_warden

READ_SIZE = 1 << 16
START_SECONDS = 30.0
"""In which an interpreter must be ready; the machine may be busy."""
END_SECONDS = 5.0
"""In which an interpreter that has closed its pipes must have ended."""


class Pipes(NamedTuple):
    """The warden's ends."""

    commands: int
    output: int
    verdicts: int


class Lost(Exception):
    """The interpreter cannot go on, and why."""

    def __init__(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason
        super().__init__(reason)


def serve(connection: socket.socket, limits: Mapping[str, Any], layers: frozenset[str], keeper: int) -> None:
    """Run rounds for the host until it closes the connection or the interpreter is lost.

    Args:
        limits: those of ``Limits``, and ``mapped``, the bytes of address space that a sandbox begins with.
        connection: to the host: it sends code, and is answered with ``outcome``, ``output``, ``seconds`` and, where
            the interpreter is lost, ``lost``: why. The first message says that it is ready.
        keeper: this process's parent.
    """
    confine_warden(limits, namespaces=NAMESPACES in layers)
    kernel.die_with_parent(keeper)
    pipes, child = _start(limits, layers)
    watch = Watch(connection, pipes, limits["output_bytes"])
    try:
        watch.round(b"", START_SECONDS, expected=interpreter.READY)
        wire.send(connection, {"outcome": "ok"})
        while (code := wire.receive(connection)) is not None:
            begin = time.monotonic()
            answer: dict[str, Any] = {}
            try:
                verdict = watch.round(wire.pack(code.encode(errors="replace")), limits["wall_seconds"])
                answer["outcome"] = "ok" if verdict == interpreter.OK else "error"
            except Lost as loss:
                answer |= {"outcome": loss.outcome, "lost": loss.reason or _end_of(child)}
            answer |= {"output": watch.text(), "seconds": time.monotonic() - begin}
            wire.send(connection, answer)
            if "lost" in answer:
                return
    except Lost as loss:
        wire.send(connection, {"outcome": loss.outcome, "lost": loss.reason or _end_of(child), "output": watch.text()})
    finally:
        _kill(child)


class Watch:
    """Rounds over the pipes.

    Args:
        most: bytes that a round may print.
    """

    def __init__(self, connection: socket.socket, pipes: Pipes, most: int) -> None:
        self._connection, self._pipes, self._most = connection, pipes, most
        self._printed = bytearray()

    def text(self) -> str:
        """What the last round printed."""
        return self._printed.decode("utf-8", errors="replace")

    def round(self, command: bytes, seconds: float, expected: bytes = b"") -> bytes:
        """Send a command, and wait for its verdict.

        Args:
            expected: the only verdict there may be; empty = that of a round.

        Raises:
            Lost: the interpreter ran too long, printed too much, died, or did not keep to the protocol; or the host
                has gone.
        """
        self._drop_what_came_between()
        verdict = self._verdict(command, time.monotonic() + seconds, seconds)
        self._read_output()  # all of it was written before the verdict
        if verdict not in ((expected,) if expected else (interpreter.OK, interpreter.ERROR)):
            raise Lost("killed", "the code wrote to the sandbox's own pipes")
        return verdict

    def _verdict(self, command: bytes, deadline: float, seconds: float) -> bytes:
        poll = select.poll()
        poll.register(self._pipes.output, select.POLLIN)
        poll.register(self._pipes.verdicts, select.POLLIN)
        poll.register(self._connection, select.POLLRDHUP)
        while True:
            poll.register(self._pipes.commands, select.POLLOUT) if command else None
            left = deadline - time.monotonic()
            ready = dict(poll.poll(max(0, left) * 1000)) if left > 0 else {}
            if not ready:
                raise Lost("timeout", f"it ran longer than {seconds:g} s")
            if self._connection.fileno() in ready:
                raise Lost("killed", "nobody waits for the result")
            if self._pipes.output in ready and not self._read_output():
                poll.unregister(self._pipes.output)  # the code has closed it
            if self._pipes.verdicts in ready:
                if verdict := os.read(self._pipes.verdicts, 2):
                    return verdict
                self._read_output()
                raise Lost("killed", "")
            if self._pipes.commands in ready:
                command = command[self._write(command) :]
                if not command:
                    poll.unregister(self._pipes.commands)

    def _write(self, command: bytes) -> int:
        try:
            return os.write(self._pipes.commands, command)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise Lost("killed", "the code closed the sandbox's own pipes") from None

    def _read_output(self) -> bool:
        """All that is there; false if there can be no more.

        Raises:
            Lost: more was printed than may be.
        """
        while len(self._printed) <= self._most:
            try:
                part = os.read(self._pipes.output, READ_SIZE)
            except BlockingIOError:
                return True
            if not part:
                return False
            self._printed += part
        del self._printed[self._most :]
        raise Lost("killed", f"it printed more than {self._most} bytes")

    def _drop_what_came_between(self) -> None:
        """Threads of an earlier round may have printed on."""
        try:
            self._read_output()
        finally:
            self._printed.clear()


def _start(limits: Mapping[str, Any], layers: frozenset[str]) -> tuple[Pipes, int]:
    """The interpreter, its first process and pipes; with namespaces, that process is the first of its namespace.

    The first process has the interpreter as its child, so that signals act on the interpreter as they do anywhere;
    when it ends, the kernel kills all that is left in its namespace.
    """
    commands, output, verdicts = os.pipe(), os.pipe(), os.pipe()
    inner = {interpreter.COMMANDS: commands[0], interpreter.VERDICTS: verdicts[1]}
    inner |= {interpreter.OUTPUT: output[1], interpreter.ERRORS: output[1]}
    warden = os.getpid()
    child = os.fork()
    if child == 0:
        if NAMESPACES in layers:
            kernel.die_with_parent(0)
            _first_process(inner, limits, layers)
        kernel.die_with_parent(warden)
        _interpreter(inner, limits, layers)
    for descriptor in (commands[0], output[1], verdicts[1]):
        os.close(descriptor)
    pipes = Pipes(commands[1], output[0], verdicts[0])
    os.set_blocking(pipes.commands, False)
    os.set_blocking(pipes.output, False)
    return pipes, child


def _first_process(inner: Mapping[int, int], limits: Mapping[str, Any], layers: frozenset[str]) -> NoReturn:
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(1)
        _interpreter(inner, limits, layers)
    os.closerange(0, 1 << 10)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _interpreter(inner: Mapping[int, int], limits: Mapping[str, Any], layers: frozenset[str]) -> NoReturn:
    """Become the interpreter, with the descriptors ``inner`` and no others."""
    try:
        os.setsid()
        for place, descriptor in inner.items():
            os.dup2(descriptor, place + 100)
        for place in inner:
            os.dup2(place + 100, place)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, interpreter.INPUT)
        os.closerange(len(inner) + 1, 1 << 10)
        confine_interpreter(limits, layers)
        interpreter.serve()
    except BaseException as error:
        os.write(interpreter.ERRORS, f"the sandbox failed: {error!r}\n".encode())
    finally:
        os._exit(1)


def _end_of(child: int) -> str:
    """How the interpreter ended, which has closed its pipes and so is about to; or that it goes on without them."""
    watched = os.pidfd_open(child)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    ended = poll.poll(END_SECONDS * 1000)
    os.close(watched)
    if not ended:
        return "the code closed the sandbox's own pipes"
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = -(code - 128) if code > 128 else code
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"the interpreter was killed by {name}"
    return f"the interpreter ended with exit code {code}"


def _kill(child: int) -> None:
    """End the interpreter and all its processes, and wait until they have."""
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        return
