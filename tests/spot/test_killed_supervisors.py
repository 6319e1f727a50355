"""The command as it is typed, as a process that is really killed: gcloud is a stand-in, the rest is what users run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from numina_finetune.errors import ExitCode
from numina_finetune.spot.machine import Action
from numina_finetune.spot.policy import machine_prefix
from numina_finetune.spot.record import Record, Records
from numina_finetune.storage import open_store
from tests.conftest import ROOT, TINY, environment
from tests.gcs import Gcs, gcs

pytestmark = pytest.mark.slow
STAND_IN = Path(__file__).with_name("gcloud_stand_in.py")


class Desk:
    """A place where spot commands are given, and the cloud that they reach."""

    def __init__(self, folder: Path, service: Gcs) -> None:
        self.folder, self.url = folder, f"{service.url}/{folder.name}/my-run"
        self.store = open_store(self.url)
        prefix = machine_prefix(self.url)
        self.machine = f"{prefix}-{{}}".format
        (folder / "machines").mkdir()
        (folder / "begin").write_text("ACTIVE")
        (folder / "node").write_text("READY")
        (folder / "own.whl").write_text("the code")
        (folder / "constraints.txt").write_text("the versions")
        self._make_image(folder / "image" / "numina-finetune" / prefix)
        program = folder / "bin" / "gcloud"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {STAND_IN} {folder} "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        fast = {"NUMINA_SPOT_BEAT": "0.1", "NUMINA_SPOT_TPU_LOCK": str(folder / "lock")}
        self._environment = environment(PATH=path, HF_TOKEN="hf_hidden", **service.environment, **fast)
        self._processes: list[subprocess.Popen[str]] = []

    def _make_image(self, home: Path) -> None:
        """A worker's disk on which an earlier life has installed just what is shipped."""
        (home / "venv" / "bin").mkdir(parents=True)
        wanted = hashlib.sha256(b"the codethe versions").hexdigest()
        (home / "venv" / "installed").write_text(f"{wanted}  -\n")
        command = home / "venv" / "bin" / "numina-finetune"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m numina_finetune "$@"\n')
        command.chmod(0o755)

    def run(self, *more: str) -> subprocess.Popen[str]:
        """``spot run``; the same command each time."""
        output_dir = self.url.rpartition("/")[0]
        words = [
            *("run", "--output-dir", output_dir, "--run-id", "my-run", "--project", "p", "--zones", "us-east5-b"),
            *("--wheel", str(self.folder / "own.whl"), "--constraints", str(self.folder / "constraints.txt")),
            *(*more, "--poll-seconds", "0.3", "--env", "PJRT_DEVICE=", "--", *TINY, "--backend", "native"),
            *("--max-steps", "60", "--save-steps", "3", "--logging-steps", "1", "--metadata-url", "none"),
            *("--gradient-accumulation-steps", "4"),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "numina_finetune", "spot", *words],
            env=self._environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    @property
    def record(self) -> Record | None:
        return Records(self.store).load()

    def wait(self, process: subprocess.Popen[str], until: Callable[[Record], bool]) -> Record:
        deadline = time.monotonic() + 600
        while True:
            record = self.record
            if record is not None and until(record):
                return record
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"{record}\n{process.communicate()[0]}")
            time.sleep(0.05)

    def kill_in(self, process: subprocess.Popen[str], state: str) -> subprocess.Popen[str]:
        """SIGKILL in a state; the next supervisor."""
        self.wait(process, lambda record: record.state == state)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return self.run()

    def set_state(self, machine: str, state: str) -> None:
        (self.folder / "machines" / machine / "state").write_text(state)

    def preempt(self, machine: str) -> None:
        """Take the machine away without notice."""
        self.set_state(machine, "SUSPENDED")
        for process in self._on(machine):
            os.kill(process, signal.SIGKILL)

    def remove(self, machine: str) -> None:
        """Let a slow deletion come to its end."""
        shutil.rmtree(self.folder / "machines" / machine)

    def _on(self, machine: str) -> Iterator[int]:
        mark = f"TMPDIR={self.folder / 'machines' / machine / 'home'}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)
            except OSError:
                continue

    def calls(self, verb: str) -> list[str]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [words[4] for words in map(json.loads, lines) if words[2:4] == ["queued-resources", verb]]

    def command_lines(self) -> set[str]:
        """All that gcloud was called with, as ``--dry-run`` shows it."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return {_as_planned(shlex.join(["gcloud", *json.loads(line)])) for line in lines}

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for machine in (self.folder / "machines").iterdir():
            self.preempt(machine.name)


def _as_planned(line: str) -> str:
    line = re.sub(r"--output-directory=\S+", "--output-directory=FOLDER", line)
    line = re.sub(r"(status \S+) \S+ [0-9a-f]+-[0-9a-f]+", r"\1 - TOKEN", line)
    return re.sub(r"\S*/numina-spot-[^/]+/", "", line)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with gcs() as service:
        made = Desk(tmp_path, service)
        yield made
        made.end()


def test_a_supervisor_that_is_killed_in_every_state_leaves_one_machine_and_one_run(desk: Desk) -> None:
    first, second = desk.machine(1), desk.machine(2)
    (desk.folder / "begin").write_text("WAITING_FOR_RESOURCES")
    (desk.folder / "slow-delete").touch()
    supervisor = desk.kill_in(desk.run(), "REQUESTED")
    desk.wait(supervisor, lambda record: record.pending == Action.NONE)
    desk.set_state(first, "PROVISIONING")
    supervisor = desk.kill_in(supervisor, "PROVISIONING")
    (desk.folder / "node").write_text("CREATING")
    desk.set_state(first, "ACTIVE")
    supervisor = desk.kill_in(supervisor, "ACTIVE")
    (desk.folder / "node").write_text("READY")
    for state in ("SETUP", "RUNNING"):
        supervisor = desk.kill_in(supervisor, state)
    desk.wait(supervisor, lambda record: (record.step or 0) > 0 or bool(desk.store.list("checkpoints/")))
    desk.preempt(first)
    supervisor = desk.kill_in(supervisor, "PREEMPTED")
    (desk.folder / "begin").write_text("ACTIVE")
    desk.wait(supervisor, lambda record: record.pending == Action.NONE)
    desk.remove(first)
    supervisor = desk.kill_in(supervisor, "DONE")
    desk.wait(supervisor, lambda record: record.pending == Action.NONE)
    desk.remove(second)
    output = supervisor.communicate(timeout=600)[0]
    assert supervisor.returncode == ExitCode.DONE, output
    assert set(desk.calls("create")) == {first, second} and set(desk.calls("delete")) == {first, second}
    assert not list((desk.folder / "machines").iterdir())
    record = desk.record
    assert record is not None and (record.life, record.spent.preemptions) == (2, 1)
    assert desk.store.stat("model/model.safetensors") is not None
    attempts = {name.split("/")[1] for name in desk.store.names("attempts/")}
    assert attempts == {"1", "2"}, "no life was started twice"


def test_of_two_that_are_started_at_once_one_works_and_the_other_names_it(desk: Desk) -> None:
    both = [desk.run(), desk.run()]
    deadline = time.monotonic() + 600
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    other, works = sorted(both, key=lambda process: process.poll() is None)
    said = other.communicate()[0]
    assert other.returncode == ExitCode.CRASHED
    assert f"is supervised by process {works.pid} on " in said or "was faster to take the lease" in said
    desk.wait(works, lambda record: bool(desk.store.list("checkpoints/")))
    works.send_signal(signal.SIGINT)
    output = works.communicate(timeout=600)[0]
    assert works.returncode == ExitCode.STOPPED, output
    assert desk.calls("create") == desk.calls("delete") == [desk.machine(1)]
    planned = desk.run("--dry-run").communicate()[0].splitlines()
    assert planned[-1].startswith("# on every worker: exec venv/bin/numina-finetune ")
    made = {line for line in desk.command_lines() if "worker.py stop " not in line}
    assert made == {*planned[:-1]}, "a run makes just the calls that the dry run shows"
    assert "hf_hidden" not in output + (desk.folder / "calls.jsonl").read_text()
    outcome = json.loads(desk.store.read("attempts/1/outcome.json"))
    assert outcome["kind"] == "stopped"
