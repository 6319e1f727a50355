"""The fake cloud with real processes: what is started, signalled, killed and resumed here is real."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numina_finetune.errors import ExitCode
from numina_finetune.spot.clock import RealClock
from numina_finetune.spot.fake import Fault
from numina_finetune.spot.job import Job
from numina_finetune.spot.workers import LOGS
from tests.spot.bench import Bench

STEPS = 200
RUN = "runs/my-run"
STAND_IN = Path(__file__).with_name("stand_in.py")
SECRET = "hf_never_to_be_seen"


def bench_of(folder: Path, faults: Sequence[Fault | None] = (), *, set_up: str = "sleep 0.3", **more: Any) -> Bench:
    return Bench(folder, stand_in(folder, set_up), f"{folder}/{RUN}", faults, **more)


def stand_in(folder: Path, set_up: str) -> Job:
    command = f'exec {sys.executable} {STAND_IN} {folder}/{RUN} {STEPS} "$RANK_HERE"'
    return Job(
        ("bash", "setup.sh"), ("bash", "-c", command), scripts={"setup.sh": set_up}, secrets={"HF_TOKEN": SECRET}
    )


def digest_of(steps: int) -> str:
    digest = ""
    for step in range(1, steps + 1):
        digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
    return digest


def test_a_run_that_is_preempted_eight_times_in_every_way_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    faults = [
        Fault("preempt", 1.6),
        Fault("kill", 0.2),  # during the set-up
        Fault("kill", 1.9),
        Fault("one", 1.7),
        Fault("refuse"),
        Fault("preempt", 0.3),
        Fault("vanish", 1.8),
        Fault("fail", 0.1),
        Fault("suspend", 0.02),
    ]
    bench = bench_of(tmp_path, faults, accelerator="v4-16")
    assert bench.supervisor().run() == ExitCode.DONE
    assert (tmp_path / RUN / "model" / "digest").read_text() == digest_of(STEPS)
    assert bench.cloud.trace == bench.expected_trace(10, refused=5), (
        "one after the other, and the refused one never was"
    )
    assert (bench.cloud.machines(), bench.cloud.most_at_once, bench.processes()) == ([], 1, [])


def test_the_logs_of_every_worker_are_in_the_runs_place_and_hold_no_secret(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, accelerator="v4-16")
    assert bench.supervisor().run() == ExitCode.DONE
    for worker in (0, 1):
        text = b"".join(bench.store.read(entry.name) for entry in bench.store.list(f"{LOGS}/train-1/0-{worker}/"))
        lines = text.decode().splitlines()
        assert lines[0].startswith("begins after step")
        assert [line for line in lines if "200/200" in line], "to the last line"
    found = [entry.name for entry in bench.store.list() if SECRET.encode() in bench.store.read(entry.name)]
    assert found == []
    kept = [path for path in (tmp_path / "hosts").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert {path.name for path in kept} == {"secrets.env"}
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}


def test_a_stop_lets_the_training_save_and_leaves_nothing(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    supervisor = bench.supervisor()
    clock = RealClock()
    sleep = clock.sleep

    def stopping(seconds: float) -> None:
        sleep(seconds)
        if list((tmp_path / RUN).glob("checkpoints/*/*/COMMITTED")):
            supervisor.ask_to_stop()

    supervisor._clock.sleep = stopping  # type: ignore[method-assign]
    assert supervisor.run() == ExitCode.STOPPED
    outcome = (tmp_path / RUN / "attempts/1/outcome.json").read_text()
    assert '"stopped"' in outcome
    assert (bench.cloud.machines(), bench.processes()) == ([], [])
    assert bench.supervisor().run() == ExitCode.DONE
    assert (tmp_path / RUN / "model" / "digest").read_text() == digest_of(STEPS)


def test_a_set_up_that_fails_tells_its_last_lines(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, set_up="echo no matching distribution; exit 1")
    assert bench.supervisor().run() == ExitCode.CRASHED
    assert "no matching distribution" in bench.record.reason
    assert bench.cloud.machines() == []
