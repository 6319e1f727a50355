"""The workers of the fake cloud: a model of a training, or real processes in a folder of this computer."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numina_finetune.spot.clock import Clock
from numina_finetune.storage import Store

_MARK = "NUMINA_FAKE_HOST"


class LocalHost:
    """A folder as home folder; commands are real, and so are signals.

    Args:
        home: made anew, as a new machine's disk is.
        environment: variables that the machine has from the start.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        home.mkdir(parents=True)
        self._home = home
        self._environment = {**environment, "HOME": str(home), _MARK: str(home)}

    def execute(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._home,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout

    def put(self, files: Sequence[Path], folder: str) -> None:
        for file in files:
            shutil.copy(file, self._home / folder)

    def terminate(self, when: float) -> None:
        self._signal(signal.SIGTERM)

    def kill(self, when: float) -> None:
        self._signal(signal.SIGKILL)

    def processes(self) -> list[int]:
        """Of this machine."""
        mark = f"{_MARK}={self._home}".encode()
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _has(entry, mark)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue


def _has(entry: Path, mark: bytes) -> bool:
    try:
        return mark in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


@dataclass
class Script:
    """How the simulated training behaves; times in seconds.

    Attributes:
        crash_at: crash when this step is reached, as many times as it is named.
        stall_at: the same, but hang.
        refuse: end with a configuration error at once.
        silent_exit: leave the loop and exit 0 on the notice, as careless trainings do.
        failing_set_ups: so many set-ups fail.
    """

    total_steps: int = 200
    step_seconds: float = 20.0
    start_seconds: float = 90.0
    save_every: int = 20
    save_seconds: float = 10.0
    setup_seconds: float = 60.0
    crash_at: list[int] = field(default_factory=list)
    stall_at: list[int] = field(default_factory=list)
    refuse: bool = False
    silent_exit: bool = False
    failing_set_ups: int = 0


class Simulation:
    """One run's trainings, on whatever machines; what they would leave in the run's place, they leave there."""

    def __init__(self, clock: Clock, store: Store, script: Script) -> None:
        self.clock, self.store, self.script = clock, store, script
        self.saved = 0
        self.lives = 0
        self.steps_made = 0

    def save(self, step: int) -> None:
        """Commit a checkpoint."""
        self.saved = step
        self.store.write(f"checkpoints/step-{step:08d}/attempt-{self.lives}/COMMITTED", b"{}")

    def outcome(self, kind: str, step: int, reason: str) -> None:
        body = {"kind": kind, "step": step, "reason": reason, "host": "simulated"}
        self.store.write(f"attempts/{self.lives}/outcome.json", json.dumps(body).encode())


class SimulatedMachine:
    """All workers of one machine, which live and die together but for their answers."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.jobs: dict[str, _Job] = {}
        self.dead_at: float | None = None

    def host(self, leader: bool) -> SimulatedHost:
        return SimulatedHost(self, leader)


@dataclass
class _Job:
    began: float
    first: int = 0
    until: float | None = None
    """When something ends it, if that comes before its own end."""
    code: int | None = None
    stalled: bool = False
    step: int = 0
    stepped: float = 0.0


class SimulatedHost:
    """Understands the commands of `numina_finetune.spot.worker`."""

    def __init__(self, machine: SimulatedMachine, leader: bool) -> None:
        self._machine, self._leader = machine, leader

    def execute(self, command: str) -> str:
        if "worker.py" not in command:
            return "NUMINA {}"
        words = command.split()  # nothing in these commands needs quotes
        verb, rest = words[2], words[3:]
        acts: dict[str, Callable[..., dict[str, Any]]] = {
            "start": self._start,
            "status": self._status,
            "stop": self._stop,
            "clean": self._clean,
        }
        return "noise\nNUMINA " + json.dumps(acts[verb](*rest))

    def put(self, files: Sequence[Path], folder: str) -> None:
        assert all(file.is_file() for file in files)

    def terminate(self, when: float) -> None:
        if not self._leader:
            return
        for name, job in self._machine.jobs.items():
            self._advance(name, job, when)
            if job.code is None:
                self._notice(name, job, when)

    def kill(self, when: float) -> None:
        for name, job in self._machine.jobs.items():
            self._advance(name, job, when)
            if job.code is None:
                job.code = 137
        self._machine.dead_at = when

    def _start(self, name: str) -> dict[str, Any]:
        world, now = self._machine.simulation, self._machine.simulation.clock.now()
        if name not in self._machine.jobs:
            job = self._machine.jobs[name] = _Job(now, stepped=now)
            if name.startswith("train"):
                world.lives += 1
                job.first = job.step = world.saved
                world.store.write(f"attempts/{world.lives}/started.json", b"{}")
        return self._status(name)

    def _clean(self) -> dict[str, Any]:
        for job in self._machine.jobs.values():
            job.code = 137 if job.code is None else job.code
        return {"left": 0}

    def _stop(self, name: str, kind: str) -> dict[str, Any]:
        job, now = self._machine.jobs[name], self._machine.simulation.clock.now()
        self._advance(name, job, now)
        if job.code is None and job.until is None:
            job.until = now + self._machine.simulation.script.save_seconds
        return self._status(name)

    def _status(self, name: str, acknowledged: str = "", token: str = "") -> dict[str, Any]:
        job, now = self._machine.jobs.get(name), self._machine.simulation.clock.now()
        if job is None:
            return {"known": False}
        self._advance(name, job, now)
        return {
            "known": True,
            "exit_code": job.code,
            "alive": job.code is None,
            "step": job.step if self._leader and name.startswith("train") else None,
            "total_steps": self._machine.simulation.script.total_steps,
            "loss": 1.0,
            "beat_age": 1.0,
            "step_age": now - job.stepped,
            "seconds_to_first_step": self._machine.simulation.script.start_seconds,
            "offset": 0,
            "log": base64.b64encode(b"" if acknowledged != "-" else b"begins\n").decode(),
        }

    def _notice(self, name: str, job: _Job, when: float) -> None:
        """SIGTERM: save if training is under way; the end of the notice may come first."""
        world = self._machine.simulation
        if not name.startswith("train"):
            job.code = 143
        elif world.script.silent_exit:
            job.code = 0
        elif when - job.began < world.script.start_seconds:
            job.code = 143
        else:
            world.save(job.step)
            world.outcome("preempted", job.step, "SIGTERM")
            job.code = 42

    def _advance(self, name: str, job: _Job, now: float) -> None:
        """Let the job make what it makes by ``now``."""
        script = self._machine.simulation.script
        if job.code is not None:
            return
        if not name.startswith("train"):
            if now >= job.began + script.setup_seconds:
                job.code = 1 if script.failing_set_ups > 0 else 0
                script.failing_set_ups -= 1
            return
        if script.refuse:
            self._machine.simulation.outcome("configuration", 0, "--mesh is wrong")
            job.code = 2
            return
        end = now if job.until is None else min(now, job.until)
        self._make_steps(job, end)
        if job.code is None and job.until is not None and now >= job.until:
            world = self._machine.simulation
            world.save(job.step)
            world.outcome("stopped", job.step, "SIGINT")
            job.code = 130

    def _make_steps(self, job: _Job, now: float) -> None:
        world, script = self._machine.simulation, self._machine.simulation.script
        while not job.stalled and job.code is None:
            if job.step >= script.total_steps:
                world.outcome("done", job.step, "all steps made")
                job.code = 0
                return
            saves = (job.step - job.first) // script.save_every
            made = job.step - job.first + 1
            due = job.began + script.start_seconds + made * script.step_seconds + saves * script.save_seconds
            if due > now:
                return
            job.step, job.stepped = job.step + 1, due
            world.steps_made += 1
            if job.step in script.crash_at:
                script.crash_at.remove(job.step)
                world.outcome("crashed", job.step, "ValueError: simulated")
                job.code = 1
            elif job.step in script.stall_at:
                script.stall_at.remove(job.step)
                job.stalled = True
            elif job.step >= script.total_steps or job.step % script.save_every == 0:
                world.save(job.step)
