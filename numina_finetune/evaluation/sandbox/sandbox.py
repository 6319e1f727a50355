"""Python code of a model, run where it can harm nothing: the host's side.

One keeper process is started when the first sandbox needs it and serves all of them (``inside/``). Each sandbox is one
interpreter, whose names live from round to round.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from numina_finetune.errors import ConfigError
from numina_finetune.evaluation.sandbox.inside import wire
from numina_finetune.evaluation.sandbox.inside.confinement import LANDLOCK, NAMESPACES, SECCOMP
from numina_finetune.evaluation.sandbox.limits import Execution, Limits, Minimum, Outcome, truncated

LAYERS = frozenset({NAMESPACES, SECCOMP, LANDLOCK})
NEEDED = {
    Minimum.ISOLATED: (NAMESPACES, SECCOMP),
    Minimum.FILTERED: (SECCOMP, LANDLOCK),
    Minimum.NONE: (),
}
_FIXES = {
    NAMESPACES: "let users make namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, "
    "--security-opt seccomp=unconfined for Docker)",
    SECCOMP: "use Linux on x86-64 or aarch64 with CONFIG_SECCOMP_FILTER",
    LANDLOCK: "use Linux 5.13 or newer with landlock among its security modules",
}
START_SECONDS = 120.0
"""In which the keeper must have imported its packages, and a sandbox must have started."""
GRACE_SECONDS = 30.0
"""After a round's limit, in which the warden must have answered."""
RESTARTED = "The interpreter was restarted: names and imports of earlier calls are gone."

_FOLDER = Path(__file__).parent
_RUN = (
    "import sys; sys.path.insert(0, sys.argv[1]); from inside.keeper import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])"
)
_ENVIRONMENT = {
    "PATH": "/nonexistent",
    "HOME": "/sandbox",
    "TMPDIR": "/sandbox",
    "PYTHONHASHSEED": "0",  # sets print in the same order each time
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "MPLCONFIGDIR": "/sandbox",
}


class Keeper:
    """The process that sandboxes are forked from.

    Args:
        layers: the protections to try; what the machine lacks is left out, and found in ``faults``.

    Raises:
        ConfigError: it could not be started.
    """

    def __init__(self, layers: frozenset[str] = LAYERS) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-s", "-B", "-X", "utf8", "-c", _RUN, str(_FOLDER)),
                    *(str(theirs.fileno()), str(os.getpid()), *sorted(layers)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # Ctrl-C is the host's to handle
            )
        self._control.settimeout(START_SECONDS)
        self.faults = self._found()
        """Why a protection is off, by its name; None where it is on."""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def sandbox(self, limits: Limits) -> socket.socket:
        """A new interpreter's connection.

        Raises:
            OSError: the keeper has gone.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            socket.send_fds(self._control, [json.dumps(asdict(limits)).encode()], [theirs.fileno()])
        return ours

    def close(self) -> None:
        """End it, and with it all its sandboxes."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()

    def _found(self) -> dict[str, str | None]:
        try:
            answer = self._control.recv(1 << 16)
        except OSError:
            answer = b""
        if not answer:
            self._process.kill()
            errors = self._process.communicate()[1].decode(errors="replace").strip()
            raise ConfigError(f"the sandbox for python code could not be started: {errors.rpartition(chr(10))[2]}")
        found: dict[str, str | None] = json.loads(answer)
        return found


_keepers: dict[tuple[int, frozenset[str]], Keeper] = {}
"""By process, for a fork inherits its parent's, and layers."""
_keepers_lock = threading.Lock()


def _keeper(layers: frozenset[str]) -> Keeper:
    """The one that serves this process; started anew if it has died."""
    with _keepers_lock:
        key = os.getpid(), layers
        keeper = _keepers.get(key)
        if keeper is None or not keeper.alive:
            if keeper is not None:
                keeper.close()
            keeper = _keepers[key] = Keeper(layers)
        return keeper


@atexit.register
def _close_keepers() -> None:
    for (process, _), keeper in _keepers.items():
        if process == os.getpid():
            keeper.close()


def protections(layers: frozenset[str] = LAYERS) -> dict[str, str | None]:
    """Each protection of this machine, by its name: None where it is on, else why it is off."""
    return dict(_keeper(layers).faults)


def require(minimum: Minimum, layers: frozenset[str] = LAYERS) -> None:
    """Check that the protections are there.

    Raises:
        ConfigError: one is missing; says which, why, and what can be done.
    """
    faults = protections(layers)
    missing = [name for name in NEEDED[minimum] if faults[name] is not None]
    if missing:
        lacks = ", ".join(f"{name} ({faults[name]})" for name in missing)
        fixes = "; ".join(_FIXES[name] for name in missing)
        raise ConfigError(
            f"the sandbox for python code lacks {lacks}, and runs nothing with less than --sandbox-minimum {minimum}: "
            f"{fixes}; or lower the minimum ({', '.join(Minimum)}) if you trust the model's code"
        )


class Sandbox:
    """One problem's interpreter, to be used as a context manager.

    Args:
        limits: of each interpreter; a lost one is replaced by a new one, with the same limits.
        layers: the protections to use, where the machine has them.

    Raises:
        ConfigError: the machine protects less than ``limits.minimum``.
    """

    def __init__(self, limits: Limits | None = None, *, layers: frozenset[str] = LAYERS) -> None:
        self._limits = limits or Limits()
        self._layers = layers
        self._connection: socket.socket | None = None
        require(self._limits.minimum, layers)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, code: str) -> Execution:
        """Run the next round, after the ones before it.

        A round that loses the interpreter says so in its output, and the next one begins in a new interpreter.
        """
        try:
            if self._connection is None:
                self._connection = self._started()
            self._connection.settimeout(self._limits.wall_seconds + GRACE_SECONDS)
            wire.send(self._connection, code)
            answer = wire.receive(self._connection)
        except (OSError, wire.WireError) as error:
            answer = {"outcome": Outcome.KILLED, "lost": str(error)}
        if answer is None:
            answer = {"outcome": Outcome.KILLED, "lost": "the sandbox has gone"}
        if "lost" in answer:
            self.close()
        return _execution(answer, self._limits.output_chars)

    def close(self) -> None:
        """End the interpreter, and wait until nothing of it is left."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with connection, suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(GRACE_SECONDS)
            while connection.recv(1 << 16):
                pass

    def _started(self) -> socket.socket:
        """A new interpreter's connection, once it is ready.

        Raises:
            OSError: it did not start.
        """
        connection = _keeper(self._layers).sandbox(self._limits)
        connection.settimeout(START_SECONDS)
        try:
            answer = wire.receive(connection)
        except (OSError, wire.WireError):
            connection.close()
            raise
        if answer is None or "lost" in answer:
            connection.close()
            told = answer or {"lost": "it ended at once", "output": ""}
            raise OSError(f"the interpreter could not be started: {told['lost']} {told['output']}".rstrip())
        return connection


def run_all(work: Sequence[tuple[Sandbox, Sequence[str]]], workers: int | None = None) -> list[list[Execution]]:
    """Run code in many sandboxes side by side.

    Args:
        work: sandboxes, each at most once, and the rounds that each is to run, one after the other.
        workers: sandboxes that run at a time; None = one for each processor, so that none waits while its time runs.
    """
    if not work:
        return []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda one: [one[0].run(code) for code in one[1]], work))


def _execution(answer: dict[str, Any], limit: int | None) -> Execution:
    outcome = Outcome(answer["outcome"])
    text = truncated(answer.get("output", ""), limit, keep_end=outcome is Outcome.ERROR)
    if "lost" in answer:
        name = "TimeoutError" if outcome is Outcome.TIMEOUT else "Killed"
        before = text if not text or text.endswith("\n") else f"{text}\n"
        text = f"{before}{name}: {answer['lost']}. {RESTARTED}"
    return Execution(outcome, text, float(answer.get("seconds", 0.0)))
