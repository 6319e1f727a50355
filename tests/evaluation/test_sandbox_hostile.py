"""What hostile programs get: nothing. Looked at from outside, after each of them."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from numina_finetune.evaluation.sandbox import Limits, Minimum, Sandbox
from tests.conftest import ROOT, environment
from tests.evaluation.hostile import PREAMBLE, PROGRAMS
from tests.evaluation.tiers import TIERS, ordinary_user, usable

LIMITS = Limits(
    wall_seconds=1.5,
    cpu_seconds=5,
    memory=256 << 20,
    disk=4 << 20,
    files=500,
    threads=20,
    output_bytes=1 << 16,
    output_chars=None,
)
CASES = [
    pytest.param(tier, name, id=f"{name} ({tier})")
    for tier in TIERS
    for name, program in PROGRAMS.items()
    if tier is not Minimum.NONE or program.harmless
]


@dataclass(frozen=True)
class Host:
    """What hostile programs are after."""

    names: str
    """Python that names the targets."""
    secret: str
    canary: Path
    state: tuple[object, ...]
    listeners: list[socket.socket]
    signals: list[int]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("NUMINA_TEST_SECRET", secret)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    canary = home / "canary"
    canary.write_text(secret)
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    with ExitStack() as stack:
        listeners = []
        for family, address in [
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, str(tmp_path / "socket")),
            (socket.AF_UNIX, f"\0{secret}"),
        ]:
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            listeners.append(listener)
        port = listeners[0].getsockname()[1]
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", port))
        datagrams.setblocking(False)
        listeners.append(datagrams)
        with suppress(OSError):  # machines without IPv6
            listeners.append(stack.enter_context(socket.create_server(("::1", port), family=socket.AF_INET6)))
            listeners[-1].setblocking(False)
        names = (
            f"HOST, PORT, HOME, CANARY = {os.getpid()}, {port}, {str(home)!r}, {str(canary)!r}\n"
            f"UNIX, ABSTRACT = {str(tmp_path / 'socket')!r}, {secret!r}\n"
        )
        yield Host(names, secret, canary, state_of(canary), listeners, signals)
    signal.signal(signal.SIGUSR1, before)


def state_of(canary: Path) -> tuple[object, ...]:
    """Everything that a program could change about a file and the folder that it is in."""
    about = canary.stat()
    return (
        (canary.read_text(), about.st_mode, about.st_uid, about.st_nlink, about.st_size, about.st_mtime_ns),
        sorted(path.name for path in canary.parent.iterdir()),
        canary.parent.stat().st_mode,
    )


def visited(listener: socket.socket) -> bool:
    """Whether anybody connected, or sent something."""
    try:
        if listener.type == socket.SOCK_DGRAM:
            listener.recv(1)
        else:
            listener.accept()
    except BlockingIOError:
        return False
    return True


def parents() -> dict[int, int]:
    """Of each process of the machine."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (process / "stat").read_text()
            state, parent = status.rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(process.name)] = int(parent)
    return found


def descendants(ancestor: int) -> set[int]:
    table = parents()
    found: set[int] = set()
    while more := {pid for pid, parent in table.items() if parent in found | {ancestor}} - found:
        found |= more
    return found


def left(processes: set[int]) -> set[int]:
    """Those that are still there after a while; what has been killed takes a moment to go."""
    deadline = time.monotonic() + 30
    while processes & set(parents()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes & set(parents())


@pytest.mark.parametrize(("tier", "name"), CASES)
def test_hostile_program_gets_nothing_and_leaves_nothing(tier: Minimum, name: str, host: Host) -> None:
    program = PROGRAMS[name]
    if program.makes_raw_calls and platform.machine() != "x86_64":
        pytest.skip("its system calls are those of x86-64")
    layers = usable(tier)
    before = descendants(os.getpid())
    with Sandbox(Limits(**vars(LIMITS) | {"minimum": tier}), layers=layers) as sandbox:
        sandbox.run("kept = 1")
        execution = sandbox.run(PREAMBLE + host.names + program.code)
        answers = [sandbox.run("print(1 + 1)").output for _ in range(3)]
    assert "ESCAPED" not in execution.output and host.secret not in execution.output
    assert "the sandbox failed" not in execution.output
    assert any("2" in answer.splitlines() for answer in answers), answers
    assert state_of(host.canary) == host.state
    assert [visited(listener) for listener in host.listeners] == [False] * len(host.listeners)
    assert host.signals == []
    assert left(descendants(os.getpid()) - before) == set()


def test_there_are_more_than_forty_hostile_programs() -> None:
    assert len(PROGRAMS) > 40


SURVIVOR = """
import sys, threading
from numina_finetune.evaluation.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(wall_seconds=600))
sandbox.run("1")
print("ready", flush=True)
sandbox.run("while True: pass")
"""


def test_everything_ends_when_the_host_is_killed() -> None:
    usable(Minimum.ISOLATED)
    process = subprocess.Popen([sys.executable, "-c", SURVIVOR], env=environment(), cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    started = descendants(process.pid)
    assert len(started) == 4, "the keeper, and a sandbox's warden, first process and interpreter"
    process.kill()
    process.wait()
    assert left(started) == set()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests have run as an ordinary user already")
def test_the_same_holds_for_an_ordinary_user() -> None:
    usable(Minimum.ISOLATED)
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    result = subprocess.run(
        ordinary_user(command), env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
