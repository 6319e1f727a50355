"""A run stops as one: all of its processes before the same step, saved, and saying why."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from numina_finetune.checkpoint.preemption import StopNotice, Told
from numina_finetune.errors import ExitCode
from tests.conftest import ROOT, Run, environment, options_of
from tests.metadata_server import MetadataServer, metadata_server
from tests.programs import Program


@pytest.fixture
def machine() -> Iterator[MetadataServer]:
    with metadata_server() as server:
        yield server


@pytest.fixture
def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


MEMBER = """
import sys, time
import torch.distributed as dist
from numina_finetune.checkpoint.preemption import StopNotice
from numina_finetune.processes import ProcessGroup

rank, port, url = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
processes, step = ProcessGroup(), 0
with StopNotice(25.0) as notice:
    if rank == 1:
        notice.watch_metadata(url, can_migrate=False)
    print("ready", flush=True)
    while not processes.any(notice.wanted):
        time.sleep(0.002 * (rank + 1))
        step += 1
    notice.follow(processes.gather(notice.told))
    print(step, notice.reason, notice.signal and notice.signal.name, notice.remaining(), sep=";", flush=True)
"""
"""One of two processes that make steps of different lengths; the second one listens to the metadata."""


@pytest.mark.parametrize("notice", ["preempted (metadata)", "SIGTERM", "SIGINT"])
def test_all_processes_stop_at_one_step_when_one_of_them_is_told(
    machine: MetadataServer, free_port: int, notice: str
) -> None:
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), str(free_port), machine.url],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for member in members:
            assert member.stdout is not None
            assert "ready\n" in member.stdout  # gloo has something to say before
        time.sleep(0.5)
        if notice.startswith("SIG"):
            members[1].send_signal(signal.Signals[notice])
        else:
            machine.set("preempted", "TRUE")
        told = [member.communicate(timeout=60)[0].strip().split(";") for member in members]
    finally:
        for member in members:
            member.kill()
    (step, *first), (other_step, *second) = told
    assert int(step) == int(other_step) > 0
    assert second[:2] == [notice, notice if notice.startswith("SIG") else "None"]
    # The first process gives the other's reason, and ends as it does: 130 where the user stopped it, else 42.
    assert first[:2] == [f"{notice} (process 1)", "SIGINT" if notice == "SIGINT" else "None"]
    if notice == "SIGINT":
        assert first[2] == second[2] == "None"
    else:
        assert abs(float(first[2]) - float(second[2])) < 1, "one deadline for all"


def test_the_earliest_deadline_of_all_processes_is_everyones() -> None:
    with StopNotice(25.0) as notice:
        notice.follow([None, Told("SIGTERM", False, 20.0), Told("SIGINT", True, None), Told("SIGTERM", False, 8.0)])
        assert (notice.reason, notice.signal) == ("SIGTERM (process 1)", None)
        assert 7 < (notice.remaining() or 0) <= 8


def test_a_preempted_machine_saves_exits_42_and_the_outcome_says_why(machine: MetadataServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = options_of(
        folder,
        *("--backend", "native", "--metadata-url", machine.url, "--max-steps", "100000"),
        *("--save-steps", "0", "--logging-steps", "1"),
    )
    training = Program("numina_finetune", *options, env={**environment(), "ACCELERATE_USE_CPU": "1"})
    try:
        end = time.monotonic() + 120
        while not any(path.stat().st_size for path in folder.glob("*/metrics.jsonl")):
            assert training.poll() is None and time.monotonic() < end, training.communicate()[0]
            time.sleep(0.05)
        machine.set("preempted", "TRUE")
        output, _ = training.communicate(timeout=60)
    finally:
        training.kill()
    run = Run(training.returncode, output, folder)
    assert run.code == ExitCode.PREEMPTED, output
    outcome = run.outcome()
    assert (outcome["kind"], outcome["reason"]) == ("preempted", "preempted (metadata)")
    assert outcome["step"] >= 1
    (checkpoint,) = run.checkpoints
    assert checkpoint.parent.name == f"step-{outcome['step']:08d}"
