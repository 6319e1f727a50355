"""The workers of one machine, all slices together: copy to them, start, ask, stop."""

from __future__ import annotations

import base64
import json
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numina_finetune.spot.cloud import Cloud, Machine, Node, Transient
from numina_finetune.spot.job import Job, slice_environment, write_payload
from numina_finetune.storage import Store

LOGS = "spot/logs"
_MARK = "NUMINA "

_ATTEMPTS = 4
"""At reaching every worker; a connection that fails once often works the next time."""

Place = tuple[int, int]
"""Slice and worker."""
Answers = dict[int, dict[str, Any]]
"""By worker."""


@dataclass(frozen=True)
class Status:
    """How a job stands on one worker; ages in seconds, by the worker's own clock."""

    known: bool
    alive: bool = False
    exit_code: int | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    beat_age: float = 0.0
    step_age: float = 0.0
    first_step: float | None = None
    """Seconds from the start to the first logged step."""
    more_log: bool = False

    @property
    def ended(self) -> bool:
        """Also true of a job that the worker knows nothing of, or whose end nobody noted."""
        return self.exit_code is not None or not self.alive


class Workers:
    """Acts on all workers of a machine.

    Args:
        home: folder of the run in the workers' home folder.
        store: the run's place; logs go there.
        between: called before each call to the cloud, any of which may take minutes.
    """

    def __init__(self, cloud: Cloud, home: str, store: Store, between: Callable[[], None]) -> None:
        self._cloud, self._home, self._store, self._between = cloud, home, store, between
        self._acknowledged: dict[str, str] = {}
        self._polls = 0

    def ship(self, machine: Machine, nodes: Sequence[Node], job: Job, *, setup: str, train: str) -> None:
        """Clear what an earlier life left, copy, and start the set-up.

        Raises:
            Transient: not every worker has everything; repeat it with another name for the set-up.
        """
        coordinator = nodes[0].addresses[0] if nodes[0].addresses else ""
        for index, node in enumerate(nodes):
            with tempfile.TemporaryDirectory(prefix="numina-spot-") as folder:
                environment = slice_environment(index, machine.slices, coordinator)
                files = write_payload(job, Path(folder), setup=setup, train=train, environment=environment)
                self._insist(node, machine.zone, folder_command(self._home))
                self._copy(node, machine.zone, files)
            cleaned = self._insist(node, machine.zone, worker_command(self._home, "clean"))
            if any(answer["left"] for answer in cleaned.values()):
                raise Transient(f"processes of this run on {node.name} cannot be ended")
        self.start(machine, nodes, setup)

    def start(self, machine: Machine, nodes: Sequence[Node], name: str) -> None:
        """Start a shipped job on every worker; on those where it was started already, nothing happens.

        Raises:
            Transient: some worker could not be reached.
        """
        for node in nodes:
            self._insist(node, machine.zone, worker_command(self._home, "start", name))

    def interrupt(self, machine: Machine, nodes: Sequence[Node], name: str) -> None:
        """Ask the job to save and end; once, however often this is called."""
        for node in nodes:
            self._insist(node, machine.zone, worker_command(self._home, "stop", name, "INT"))

    def statuses(self, machine: Machine, nodes: Sequence[Node], name: str) -> Mapping[Place, Status | None]:
        """How the job stands on every worker, None where one cannot be reached; their new log lines are stored."""
        self._polls += 1
        found: dict[Place, Status | None] = {}
        for index, node in enumerate(nodes):
            key = f"{machine.name}/{node.name}/{name}"
            token = f"{self._polls}-{id(self):x}"
            try:
                answers = self._run(
                    node,
                    machine.zone,
                    worker_command(self._home, "status", name, self._acknowledged.get(key, "-"), token),
                )
            except Transient:
                answers = {}
            for worker in range(max(len(node.addresses), 1)):
                answer = answers.get(worker)
                found[(index, worker)] = None if answer is None else self._status(name, (index, worker), answer)
            # Only when all are stored: who was not heard gives the same again.
            self._acknowledged[key] = token
        return found

    def _status(self, name: str, place: Place, answer: Mapping[str, Any]) -> Status:
        if not answer["known"]:
            return Status(known=False)
        log = base64.b64decode(answer["log"])
        if log:
            self._store.write(f"{LOGS}/{name}/{place[0]}-{place[1]}/{answer['offset']:012d}.log", log)
        return Status(
            known=True,
            alive=answer["alive"],
            exit_code=answer["exit_code"],
            step=answer["step"],
            total_steps=answer["total_steps"],
            loss=answer["loss"],
            beat_age=answer["beat_age"],
            step_age=answer["step_age"],
            first_step=answer["seconds_to_first_step"],
            more_log=bool(log),
        )

    def _run(self, node: Node, zone: str, command: str) -> Answers:
        self._between()
        return _answers(self._cloud.run(node.name, zone, command))

    def _insist(self, node: Node, zone: str, command: str) -> Answers:
        """Run a command that may be run more than once until every worker of the node has answered."""
        answers: Answers = {}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answers |= self._run(node, zone, command)
            except Transient:
                if attempt == _ATTEMPTS and not answers:
                    raise
            missing = [str(worker) for worker in range(max(len(node.addresses), 1)) if worker not in answers]
            if not missing:
                return answers
        raise Transient(f"{node.name}: worker {', '.join(missing)} did not answer")

    def _copy(self, node: Node, zone: str, files: Sequence[Path]) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            self._between()
            try:
                return self._cloud.copy(node.name, zone, files, self._home)
            except Transient:
                if attempt == _ATTEMPTS:
                    raise
        return None


def folder_command(home: str) -> str:
    """Makes the run's folder on a worker: nobody else may look into it, whatever modes the copies get."""
    quoted = shlex.quote(home)
    return f"umask 077 && mkdir -p {quoted} && chmod 700 {quoted} && echo {_MARK}{{}}"


def worker_command(home: str, *arguments: str) -> str:
    """A call of `numina_finetune.spot.worker` on a worker."""
    return shlex.join(["python3", f"{home}/worker.py", *arguments])


def log_tail(store: Store, name: str, lines: int = 20) -> str:
    """The last lines of a job's log on the first worker that has one."""
    for entry in reversed(store.list(f"{LOGS}/{name}/0-0/")):
        text = store.read(entry.name).decode("utf-8", "replace")
        if text.strip():
            return "\n".join(text.rstrip().splitlines()[-lines:])
    return ""


def _answers(outputs: Mapping[int, str]) -> Answers:
    """What each worker's line says; a worker without one counts as not reached."""
    found = {}
    for worker, text in outputs.items():
        lines = [line for line in text.splitlines() if line.startswith(_MARK)]
        if lines:
            found[worker] = json.loads(lines[-1].removeprefix(_MARK))
    return found
