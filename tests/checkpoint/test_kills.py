"""Processes killed in every phase of a run in a bucket: the next life goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from numina_finetune.checkpoint.layout import CHECKPOINTS, COMMITTED, place_of
from numina_finetune.checkpoint.reading import committed
from numina_finetune.storage import open_store
from tests.conftest import environment, options_of, state_of, train
from tests.gcs import Gcs
from tests.programs import Program

Result = tuple[str, list[float]]
"""The sha256 of the last checkpoint's weights and moments, and all losses."""
STEPS = 40
RUN = (
    *("--run-id", "mine", "--max-steps", str(STEPS), "--save-steps", "2", "--save-total-limit", "2"),
    *("--logging-steps", "1"),
)
PHASES = ("start", "restore", "step", "copy", "upload", "commit", "prune")
REQUESTS = {
    "restore": r"^GET .*/state/.*alt=media",
    "upload": r"^POST .*/state/",
    "commit": rf"^POST .*/{COMMITTED} ",
    "prune": r"^DELETE ",
}
"""What the service hears in a phase."""


@dataclass
class Bucket:
    """A run in the service's bucket, and the machines' disk on which its lives follow one another."""

    service: Gcs
    machine: Path
    name: str
    env: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"{self.service.url}/{self.name}"

    @property
    def temporary(self) -> Path:
        return self.machine / self.name / "tmp"

    def life(self, *options: str) -> Program:
        self.temporary.mkdir(parents=True, exist_ok=True)
        own = ("--output-dir", self.url, *options)
        arguments = options_of(Path("placeholder"), *RUN, *own, cache=self.machine / "cache")
        env = {**self.env, **self.service.environment, "TMPDIR": str(self.temporary)}
        return Program("numina_finetune", *arguments, env=env)

    def lines(self) -> int:
        """Of the metrics that the present machine has written."""
        files = list(self.machine.glob("cache/numina-runs-*/mine/metrics.jsonl"))
        return sum(file.read_text(encoding="utf-8").count("\n") for file in files)

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in committed(open_store(f"{self.url}/mine"))]

    def state(self) -> str:
        return state_of(open_store(f"{self.url}/mine"))

    def losses(self) -> list[float]:
        lines = open_store(f"{self.url}/mine").read("metrics.jsonl").decode().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def strike(bucket: Bucket, phase: str, rng: random.Random) -> str:
    """Start a life and kill it in the phase; its output."""
    service = bucket.service
    before = bucket.steps()
    heard = len(service.requests)
    if phase in REQUESTS:
        service.fault("delay", REQUESTS[phase], times=1, seconds=1.0)
    lines = bucket.lines()
    process = bucket.life()
    until = time.monotonic() + 180

    def reached() -> bool:
        if phase == "step":
            return bucket.lines() >= lines + wanted
        if phase == "copy":
            return bucket.lines() > lines and any(bucket.temporary.glob("numina-state-*"))
        return any(re.search(REQUESTS[phase], request) for request in service.requests[heard:])

    if phase == "start":
        time.sleep(rng.uniform(0.1, 5.0))
    else:
        wanted = rng.randint(1, 5)
        while process.poll() is None and not reached():
            assert time.monotonic() < until
            time.sleep(0.0005 if phase == "copy" else 0.01)
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.3)]) if phase != "copy" else 0.0)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    time.sleep(1.1 if phase in REQUESTS else 0)  # a request that was under way may still be carried out
    service.clear()
    assert process.returncode == -signal.SIGKILL, output
    if found := re.search(r"resumed from the checkpoint of step (\d+)/", output):
        assert int(found[1]) in before, "only what was committed is ever loaded"
    return output


def finish(bucket: Bucket) -> str:
    process = bucket.life()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def nothing_left_over(bucket: Bucket) -> bool:
    """Whether all that lies below checkpoints/ belongs to the ones that stay."""
    store = open_store(f"{bucket.url}/mine")
    places = {place_of(name) for name in store.names(f"{CHECKPOINTS}/")}
    return places == {(checkpoint.step, checkpoint.attempt) for checkpoint in committed(store)} and len(places) == 2


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine")


@pytest.fixture(scope="module")
def reference(machine: Path) -> Callable[[int | None], Result]:
    """State and losses of the same run in a local folder, never stopped, by the number of virtual devices."""

    @cache
    def of(devices: int | None) -> Result:
        run = train(machine / f"undisturbed-{devices}", *RUN, env=environment(devices=devices))
        assert run.code == 0, run.output
        return run.state, run.losses

    return of


@pytest.fixture
def undisturbed(reference: Callable[[int | None], Result]) -> Result:
    """Of the native backend."""
    return reference(None)


def test_a_run_in_a_bucket_ends_as_one_in_a_folder(service: Gcs, machine: Path, undisturbed: Result) -> None:
    bucket = Bucket(service, machine, "whole", environment())
    output = finish(bucket)
    assert (bucket.state(), bucket.losses()) == undisturbed
    assert bucket.steps() == [STEPS, STEPS - 2]
    names = set(open_store(f"{bucket.url}/mine").names())
    assert {"run.yaml", "data_report.json", "attempts/1/outcome.json", "model/config.json"} <= names
    assert f"the model is in {bucket.url}/mine/model" in output
    assert not list(bucket.temporary.iterdir())
    assert "nothing to do" in finish(bucket)


@pytest.mark.slow
def test_six_kills_in_six_phases_change_nothing(service: Gcs, machine: Path, undisturbed: Result) -> None:
    bucket = Bucket(service, machine, "six", environment())
    rng = random.Random(6)
    for phase in ("commit", "restore", "step", "copy", "upload", "prune"):
        strike(bucket, phase, rng)
    finish(bucket)
    assert (bucket.state(), bucket.losses()) == undisturbed
    assert nothing_left_over(bucket)


def rounds(seed: str, kills: int) -> list[str]:
    """Phases in a random order, each about as often; a life must have committed before one can be restored."""
    rng = random.Random(seed)
    phases = [PHASES[number % len(PHASES)] for number in range(kills)]
    rng.shuffle(phases)
    first = next(number for number, phase in enumerate(phases) if phase in ("prune", "commit"))
    phases[0], phases[first] = phases[first], phases[0]
    return phases


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "number"), [*((None, number) for number in range(6)), (2, 6), (2, 7)])
def test_many_kills_in_all_phases_change_nothing(
    service: Gcs, machine: Path, reference: Callable[[int | None], Result], devices: int | None, number: int
) -> None:
    bucket = Bucket(service, machine, f"many-{number}", environment(devices=devices))
    rng = random.Random(f"{number}-{os.environ.get('NUMINA_KILL_SEED', '0')}")
    done: Counter[str] = Counter()
    for phase in rounds(f"{number}", 14):
        if STEPS in bucket.steps():  # too far to die in every phase
            break
        strike(bucket, phase, rng)
        done[phase] += 1
    finish(bucket)
    print(f"{devices or 'native'}: {sum(done.values())} kills: {dict(done)}")
    assert (bucket.state(), bucket.losses()) == reference(devices)
    assert nothing_left_over(bucket)


def test_a_machine_that_goes_while_storage_hangs_is_obeyed_and_nothing_half_is_committed(
    service: Gcs, machine: Path, undisturbed: Result
) -> None:
    bucket = Bucket(service, machine, "hung", environment())
    service.fault("delay", r"^POST .*step-0000000[4-9]/.*/state/", times=99, seconds=60)
    process = bucket.life("--preemption-grace", "4")
    while process.poll() is None and not service.count("step-00000004/.*/state/"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 42, output
    assert time.monotonic() - began < 45
    assert "checkpoint of step 4 was given up" in output
    store = open_store(f"{bucket.url}/mine")
    outcome = json.loads(store.read("attempts/1/outcome.json"))
    assert (outcome["kind"], outcome["saved_step"]) == ("preempted", 2)
    assert outcome["reason"].startswith("SIGTERM; not saved in the time left: the newest checkpoint is 2")
    assert bucket.steps() == [2]
    service.clear()
    finish(bucket)
    assert (bucket.state(), bucket.losses()) == undisturbed
