"""Real trainings in the bucket, on machines that are taken away: the result is that of a run left alone."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from numina_finetune.errors import ExitCode
from numina_finetune.spot.fake import Fault
from numina_finetune.spot.job import Job
from numina_finetune.spot.report import account
from tests.conftest import TINY, state_of
from tests.gcs import Gcs, gcs
from tests.spot.bench import Bench, Strike

SEED = os.environ.get("NUMINA_SPOT_SEED", "20261101")


@dataclass(frozen=True)
class Shape:
    """How the training runs: the machine's type, what each of its workers has in its environment, and options."""

    accelerator: str
    fits: Sequence[dict[str, str]]
    options: Sequence[str]
    losses: Sequence[str]
    """Kinds of unannounced losses."""


_TWO = [{"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "1"} for rank in ("0", "1")]
SPMD = Shape("v6e-8", [{"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}], (), ("kill", "vanish"))
_NATIVE = ("--backend", "native", "--gradient-accumulation-steps", "4")
ONE_WORKER = Shape("v6e-8", [{"ACCELERATE_USE_CPU": "1"}], _NATIVE, ())
TWO_WORKERS = Shape("v4-16", _TWO, _NATIVE, ("kill", "one"))


@pytest.fixture(scope="module")
def service() -> Iterator[Gcs]:
    with gcs() as running:
        yield running


@dataclass
class Runs:
    """Runs of one shape, which differ in what befalls them."""

    service: Gcs
    folder: Path
    shape: Shape
    steps: int

    def run(self, name: str, strikes: dict[int, Strike], *, refused: int = 0) -> Bench:
        """A run to its end."""
        place = f"{self.service.url}/{self.folder.name}/{name}"
        options = (
            *(*TINY, "--run-id", "my-run", "--output-dir", place, *self.shape.options),
            *("--max-steps", str(self.steps), "--save-steps", "4", "--logging-steps", "1", "--metadata-url", "none"),
        )
        bench = Bench(
            self.folder / name,
            Job(("sleep", "1"), (sys.executable, "-m", "numina_finetune", *options)),
            f"{place}/my-run",
            [*([None] * (refused - 1)), Fault("refuse")] if refused else [],
            strikes,
            self.shape.accelerator,
            zones=("us-east5-b", "us-east5-a"),
            notice_seconds=20.0,
            poll_seconds=0.3,
            grace_seconds=6.0,
            fits=[{**self.service.environment, **fit} for fit in self.shape.fits],
            service=self.service,
        )
        assert bench.supervisor().run() == ExitCode.DONE, "\n".join(bench.told)
        return bench


def losses(bench: Bench) -> list[float]:
    lines = bench.store.read("metrics.jsonl").decode().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def check(runs: Runs, strikes: dict[int, Strike], *, refused: int) -> None:
    """Compare the run that is struck with one that is left alone."""
    undisturbed = runs.run("alone", {})
    assert undisturbed.cloud.trace == undisturbed.expected_trace(1)
    bench = runs.run("struck", strikes, refused=refused)
    assert state_of(bench.store) == state_of(undisturbed.store)
    assert losses(bench) == losses(undisturbed)
    assert bench.cloud.trace == bench.expected_trace(len(strikes) + 2, refused=refused)
    assert (bench.cloud.machines(), bench.cloud.most_at_once, bench.processes()) == ([], 1, [])
    spent = bench.record.spent
    assert (spent.preemptions, spent.restarts) == (len(strikes), 0), "\n".join(bench.told)
    result = account(bench.store)
    assert result.steps == runs.steps and result.tokens == account(undisturbed.store).tokens
    assert result.seconds["save"] > 0 and result.seconds["restore"] > 0


@pytest.mark.slow  # two minutes on two idle cores
def test_a_run_that_loses_three_machines_ends_in_the_weights_of_an_undisturbed_run(
    service: Gcs, tmp_path: Path
) -> None:
    strikes = {1: Strike("vanish", 5), 2: Strike("kill", "save"), 4: Strike("preempt", 3)}
    check(Runs(service, tmp_path, ONE_WORKER, 30), strikes, refused=3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SPMD, TWO_WORKERS], ids=["spmd", "two-workers"])
def test_a_run_of_200_steps_that_loses_eight_machines_ends_in_the_weights_of_an_undisturbed_run(
    service: Gcs, tmp_path: Path, shape: Shape
) -> None:
    rng = random.Random(f"{SEED}-{shape.accelerator}")
    wanted = [
        Strike("preempt", rng.randint(2, 14)),
        Strike("preempt", rng.randint(2, 14)),
        Strike("kill", rng.randint(2, 14)),
        Strike("kill", "set-up"),
        Strike("kill", "save"),
        *(Strike(kind, rng.randint(2, 14)) for kind in shape.losses),
        Strike(rng.choice(["preempt", *shape.losses]), rng.choice(["set-up", "save", 5])),
    ]
    rng.shuffle(wanted)
    refused = rng.randint(2, 8)
    numbers = [number for number in range(1, len(wanted) + 2) if number != refused]
    strikes = dict(zip(numbers, wanted, strict=True))
    print(f"NUMINA_SPOT_SEED={SEED}: {strikes}, machine {refused} refused")
    check(Runs(service, tmp_path, shape, 200), strikes, refused=refused)
