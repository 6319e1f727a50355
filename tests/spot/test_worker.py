"""What runs on the workers, as real processes on this computer."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.spot import worker as worker_module

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(str(worker_module.__file__), folder / "worker.py")
    yield folder
    ask_in(folder)("clean")


def ask_in(home: Path) -> Ask:
    environment = {**os.environ, "NUMINA_SPOT_BEAT": "0.1", "NUMINA_SPOT_TPU_LOCK": str(home / "tpu-lock")}

    def ask(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, str(home / "worker.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        answer: dict[str, Any] = json.loads(done.stdout.removeprefix("NUMINA "))
        return answer

    return ask


@pytest.fixture
def ask(home: Path) -> Ask:
    return ask_in(home)


def job(home: Path, name: str, script: str, **more: Any) -> None:
    spec = {"argv": ["bash", "-c", script], "environment": {}, "secrets": None, **more}
    (home / f"{name}.json").write_text(json.dumps(spec))


def wait(ask: Ask, name: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(200):
        status = ask("status", name, "-", "")
        if until(status):
            return status
        time.sleep(0.05)
    raise AssertionError(status)


def test_a_job_outlives_the_call_that_started_it_and_leaves_its_exit_code(home: Path, ask: Ask) -> None:
    job(home, "train-1", "echo 'step 3/10  loss 1.25  lr'; sleep 0.5; exit 42")
    started = ask("start", "train-1")
    assert started["alive"]
    running = wait(ask, "train-1", lambda status: status["step"] == 3)
    assert (running["total_steps"], running["loss"]) == (10, 1.25)
    ended = wait(ask, "train-1", lambda status: status["exit_code"] is not None)
    assert (ended["exit_code"], ended["alive"]) == (42, False)


def test_starting_twice_starts_once(home: Path, ask: Ask) -> None:
    job(home, "train-1", "echo x >> count; sleep 30")
    ask("start", "train-1")
    time.sleep(0.2)
    ask("start", "train-1")
    time.sleep(0.2)
    assert (home / "count").read_text() == "x\n"


def test_the_log_comes_in_pieces_and_again_where_it_was_not_acknowledged(home: Path, ask: Ask) -> None:
    job(home, "train-1", "echo one; sleep 0.6; echo two")
    ask("start", "train-1")
    wait(ask, "train-1", lambda _: "one" in (home / "jobs/train-1/log").read_text())

    def read(acknowledged: str, token: str) -> tuple[int, str]:
        answer = ask("status", "train-1", acknowledged, token)
        return answer["offset"], base64.b64decode(answer["log"]).decode()

    assert read("-", "a") == (0, "one\n")
    assert read("-", "b") == (0, "one\n"), "the answer to a was lost"
    wait(ask, "train-1", lambda status: status["exit_code"] == 0)
    assert read("b", "c") == (4, "two\n")
    assert read("c", "d") == (8, "")


def test_the_request_to_stop_reaches_the_training_once(home: Path, ask: Ask) -> None:
    script = "trap 'echo asked >> asked; sleep 0.4; exit 130' INT; touch ready; while true; do sleep 0.05; done"
    job(home, "train-1", script)
    ask("start", "train-1")
    wait(ask, "train-1", lambda _: (home / "ready").exists())
    ask("stop", "train-1", "INT")
    ask("stop", "train-1", "INT")
    assert wait(ask, "train-1", lambda status: status["exit_code"] is not None)["exit_code"] == 130
    assert (home / "asked").read_text() == "asked\n"


def test_leftovers_of_an_earlier_life_are_ended_and_the_lock_file_goes_with_them(home: Path, ask: Ask) -> None:
    (home / "tpu-lock").write_text("")
    job(home, "train-1", "trap '' TERM; (trap '' TERM; sleep 60) & touch ready; sleep 60; sleep 60")
    ask("start", "train-1")
    wait(ask, "train-1", lambda _: (home / "ready").exists())
    other = subprocess.Popen(["sleep", "60"])
    cleaned = ask("clean")
    assert cleaned["left"] == 0 and cleaned["ended"] >= 2 and cleaned["lock_file_removed"]
    assert other.poll() is None, "what is not of this run is left alone"
    other.kill()
    other.wait()


def test_a_killed_job_tells_the_signal_and_a_lost_watcher_does_not_hide_the_end(home: Path, ask: Ask) -> None:
    job(home, "train-1", "sleep 60")
    ask("start", "train-1")
    os.kill(int((home / "jobs/train-1/pid").read_text()), signal.SIGKILL)
    assert wait(ask, "train-1", lambda status: status["exit_code"] is not None)["exit_code"] == 137
    assert ask("status", "train-9", "-", "x") == {"host": os.uname().nodename, "known": False}


def test_secrets_reach_the_job_from_a_private_file_and_nothing_else(home: Path, ask: Ask) -> None:
    (home / "secrets.env").write_text("HF_TOKEN=hf_secret=with=signs\n")
    (home / "secrets.env").chmod(0o644)
    job(home, "train-1", 'test "$HF_TOKEN" = "hf_secret=with=signs" && sleep 5', secrets="secrets.env")
    ask("start", "train-1")
    assert (home / "secrets.env").stat().st_mode & 0o777 == 0o600
    process = int((home / "jobs/train-1/pid").read_text())
    assert wait(ask, "train-1", lambda status: status["alive"])
    assert b"hf_secret" not in Path(f"/proc/{process}/cmdline").read_bytes()


def test_a_command_that_is_not_there_is_told_in_the_log(home: Path, ask: Ask) -> None:
    job(home, "setup-1", "", argv=["/no/such/program"])
    ask("start", "setup-1")
    assert wait(ask, "setup-1", lambda status: status["exit_code"] is not None)["exit_code"] == 127
    assert "cannot start /no/such/program" in (home / "jobs/setup-1/log").read_text()


def test_answers_of_an_evaluation_are_as_good_a_sign_of_life_as_steps(home: Path, ask: Ask) -> None:
    answers = "until [ -e asked ]; do sleep 0.05; done; echo '  32/256 problems, 12.5% of them right'; sleep 30"
    job(home, "train-1", f"echo 'step 3/10  loss 1.25  lr'; {answers}")
    ask("start", "train-1")
    wait(ask, "train-1", lambda status: status["step"] == 3)
    before = wait(ask, "train-1", lambda status: status["step_age"] > 0.5)["step_age"]
    (home / "asked").touch()
    wait(ask, "train-1", lambda status: status["step_age"] < before)  # by itself it only grows
