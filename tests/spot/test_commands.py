"""The commands, as a user gives them; the cloud is the fake one, the run's place a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.spot import commands
from numina_finetune.spot.cloud import Machine, PermissionDenied
from numina_finetune.spot.fake import FakeClock, FakeCloud, Fault
from numina_finetune.spot.fake_hosts import Script, SimulatedHost, SimulatedMachine, Simulation
from numina_finetune.spot.job import slice_environment
from numina_finetune.spot.options import SpotOptions, check_options, check_place, check_prices, job_of, targets
from numina_finetune.spot.policy import machine_prefix
from numina_finetune.spot.prices import load_prices
from numina_finetune.spot.record import Records
from numina_finetune.spot.shapes import same_place, shape_of
from numina_finetune.spot.workers import LOGS
from numina_finetune.storage import open_store
from tests.conftest import ROOT, environment

TRAINING = ("--model-name", "tiny-qwen3", "--dataset-name", "synthetic-gsm8k")


@pytest.fixture
def options(tmp_path: Path) -> SpotOptions:
    for name in ("own.whl", "constraints.txt"):
        (tmp_path / name).write_text("")
    return SpotOptions(
        output_dir=str(tmp_path / "runs"),
        run_id="my-run",
        project="my-project",
        zones="us-east5-b",
        wheel=str(tmp_path / "own.whl"),
        constraints=str(tmp_path / "constraints.txt"),
    )


def changed(options: SpotOptions, **changes: object) -> SpotOptions:
    return SpotOptions.from_mapping({**vars(options), **changes})


class Cloud(FakeCloud):
    """A simulated cloud and training, for one run."""

    def __init__(self, options: SpotOptions, *faults: Fault) -> None:
        self.clock = FakeClock(time.time())
        simulation = Simulation(self.clock, open_store(options.run_url), Script(total_steps=60))
        machines: dict[str, SimulatedMachine] = {}

        def host(machine: Machine, node: int, worker: int) -> SimulatedHost:
            return machines.setdefault(machine.name, SimulatedMachine(simulation)).host(leader=(node, worker) == (0, 0))

        super().__init__(self.clock, host, faults=faults)


def test_a_run_and_what_the_other_commands_say_of_it(
    options: SpotOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cloud = Cloud(options, Fault("preempt", 900))
    assert commands.run(options, TRAINING, cloud=cloud, clock=cloud.clock) == ExitCode.DONE
    assert "done: all steps made" in capsys.readouterr().out
    Path(options.run_url, "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": 1.5, "tokens": 4000, "tokens_per_second": 200.0, "life": 1}) + "\n"
            for step in range(1, 61)
        )
    )
    said: list[str] = []
    commands.status(options.run_url, said.append)
    text = "\n".join(said)
    assert "state    ENDED" in text and "done" in text
    assert "step     60, loss 1.5000, life 2" in text
    assert "1 preemptions" in text and "next     nothing" in text
    newer = b"step 58/60  loss 1.2600  lr 1e-5\nstep 59/60  loss 1.2500  lr 1e-5\n"
    open_store(options.run_url).write(f"{LOGS}/train-2/0-0/000000000007.log", newer)
    commands.status(options.run_url, said.append)
    assert "step     59 of 60, loss 1.2500, life 2" in said
    open_store(options.run_url).delete(f"{LOGS}/train-2/0-0/000000000007.log")
    said.clear()
    commands.logs(options.run_url, follow=True, say=said.append)
    assert said == [f"{job} 0-0 | begins" for job in ("setup-1", "train-1", "setup-2", "train-2")]
    commands.logs(options.run_url, say=said.append)
    assert said == 2 * said[:4]
    said.clear()
    commands.report(options.run_url, say=said.append)
    assert "2 lives, 60 steps, 240000 tokens; goodput" in said[0]
    assert "for a million trained tokens" in said[0] and "SkyPilot" in said[0]
    assert (tmp_path / "my-run-goodput.png").read_bytes().startswith(b"\x89PNG")


def test_stop_without_a_supervisor_stops_the_machine_itself(options: SpotOptions) -> None:
    cloud = Cloud(options)

    class Killed(BaseException):
        pass

    sleep = cloud.clock.sleep

    def dying(seconds: float) -> None:
        sleep(seconds)
        if Path(options.run_url, "checkpoints").exists():
            cloud.clock.sleep = sleep  # type: ignore[method-assign]
            raise Killed

    cloud.clock.sleep = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        commands.run(options, TRAINING, cloud=cloud, clock=cloud.clock)
    assert cloud.machines()
    assert commands.stop(options.run_url, cloud=cloud, clock=cloud.clock) == ExitCode.DONE
    assert cloud.machines() == []
    assert commands.run(options, TRAINING, cloud=cloud, clock=cloud.clock) == ExitCode.DONE


def test_clean_deletes_what_carries_the_runs_prefix_and_nothing_else(options: SpotOptions) -> None:
    cloud = Cloud(options)
    commands._keep(open_store(options.run_url), options)
    ours = Machine(f"{machine_prefix(options.run_url)}-7", "us-east5-b", "v6e-8")
    other = Machine("nf-my-run-2-00000000-1", "us-east5-b", "v6e-8")
    cloud.create(ours)
    cloud.create(other)
    commands.clean(options.run_url, cloud=cloud, clock=cloud.clock)
    assert cloud.machines() == [other.name]


def test_everything_wrong_is_said_at_once() -> None:
    wrong = SpotOptions(tpu="v9-8", zones="here", docker_image="image:latest", env=("HF_TOKEN=x", "y"), max_hours=0)
    with pytest.raises(ConfigError) as told:
        check_options(wrong, ["--output_dir", "x"], ["and this"])
    text = str(told.value)
    for part in (
        "--output-dir is missing",
        "--project",
        "v9-8",
        "'here'",
        "digest",
        "--secret-env HF_TOKEN",
        "y: write",
        "and this",
    ):
        assert part in text
    assert "--max-hours 0" in text and "stands among the training's options" in text


def test_machines_carry_the_name_of_their_run_and_of_no_other() -> None:
    assert machine_prefix("gs://b/a") != machine_prefix("gs://b/a-1").rsplit("-", 1)[0]
    assert len(machine_prefix(f"gs://b/{'long' * 40}")) < 50


def test_zones_far_from_the_bucket_are_refused_unless_allowed(options: SpotOptions) -> None:
    far = changed(options, output_dir="gs://bucket/runs", zones="us-east5-b,europe-west4-a")
    cloud = Cloud(options)
    with pytest.raises(ConfigError, match="europe-west4-a lie outside US"):
        check_place(far, cloud)
    check_place(changed(far, allow_cross_region=True), cloud)
    cloud.bucket_location = lambda bucket: (_ for _ in ()).throw(PermissionDenied("no"))  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="its location cannot be seen"):
        check_place(far, cloud)


@pytest.mark.parametrize(
    ("zone", "location", "near"),
    [
        ("us-east5-b", "US-EAST5", True),
        ("us-east5-b", "us-east1", False),
        ("us-east5-b", "US", True),
        ("europe-west4-a", "EUR4", True),
        ("us-central1-a", "NAM4", True),
        ("us-east5-b", "NAM4", False),
        ("asia-east1-c", "EU", False),
    ],
)
def test_what_is_near_a_bucket(zone: str, location: str, near: bool) -> None:
    assert same_place(zone, location) is near


@pytest.mark.parametrize(
    ("accelerator", "chips", "hosts", "image"),
    [
        ("v6e-8", 8, 1, "v2-alpha-tpuv6e"),
        ("v6e-16", 16, 4, "v2-alpha-tpuv6e"),
        ("v5litepod-8", 8, 1, "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", 16, 4, "v2-alpha-tpuv5-lite"),
        ("v5p-8", 4, 1, "v2-alpha-tpuv5"),
        ("v5p-128", 64, 16, "v2-alpha-tpuv5"),
        ("v4-16", 8, 2, "tpu-ubuntu2204-base"),
    ],
)
def test_shapes(accelerator: str, chips: int, hosts: int, image: str) -> None:
    shape = shape_of(accelerator)
    assert (shape.chips, shape.hosts, shape.image) == (chips, hosts, image)


def test_prices_can_be_ones_own_and_an_unknown_one_is_no_number(options: SpotOptions, tmp_path: Path) -> None:
    own = tmp_path / "prices.yaml"
    own.write_text("date: 2026-11-01\nprices: {v6e: {us-east5: 0.5}}\n")
    prices = load_prices(own)
    assert prices.of("v6e-8", "us-east5-b") == 0.5
    assert prices.of("v5p-8", "us-east5-a") is None
    with pytest.raises(ConfigError, match="no price is known of v5p-8 in us-east5-b"):
        check_prices(changed(options, tpu="v6e-8,v5p-8", max_cost=10.0), prices)
    own.write_text("prices: 3")
    with pytest.raises(ConfigError, match="needs `date"):
        load_prices(own)


def test_a_run_keeps_the_prices_that_it_was_given(
    options: SpotOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "prices.yaml"
    own.write_text("date: 2026-11-01\nprices: {v6e: {us-east5: 0.5}}\n")
    cloud = Cloud(options)
    assert commands.run(changed(options, prices=str(own)), TRAINING, cloud=cloud, clock=cloud.clock) == ExitCode.DONE
    own.unlink()
    said: list[str] = []
    commands.status(options.run_url, said.append)
    commands.report(options.run_url, say=said.append)
    hours = Records(open_store(options.run_url)).load().bill.chip_seconds / 3600  # type: ignore[union-attr]
    assert f"cost     ${hours * 0.5:.2f}, {hours:.2f} chip-hours" in said
    assert f"prices: {own}, 2026-11-01" in "\n".join(said)


def test_the_preferred_type_is_tried_everywhere_first(options: SpotOptions) -> None:
    several = changed(options, tpu="v6e-8,v5litepod-8", zones="us-east5-b,us-east5-a")
    assert [(target.accelerator, target.zone) for target in targets(several)] == [
        ("v6e-8", "us-east5-b"),
        ("v6e-8", "us-east5-a"),
        ("v5litepod-8", "us-east5-b"),
        ("v5litepod-8", "us-east5-a"),
    ]


def test_the_job_resumes_its_run_and_keeps_secrets_out_of_its_command(options: SpotOptions) -> None:
    job = job_of(options, TRAINING, {"HF_TOKEN": "hf_x", "OTHER": "y"})
    assert job.train[-4:] == ("--output-dir", options.output_dir, "--run-id", "my-run")
    assert (job.secrets, "hf_x" in repr(job)) == ({"HF_TOKEN": "hf_x"}, False)
    assert job.files == (Path(options.wheel), Path(options.constraints))
    image = "europe-docker.pkg.dev/p/r/i@sha256:" + "0" * 64
    docker = job_of(changed(options, docker_image=image, wheel=""), TRAINING, {"HF_TOKEN": "hf_x"})
    assert "hf_x" not in " ".join((*docker.setup, *docker.train, *docker.scripts.values()))
    assert " --env-file secrets.env " in docker.train[-1]


def test_a_container_gets_what_only_its_worker_knows(options: SpotOptions, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 7\n")
    image = "europe-docker.pkg.dev/p/r/i@sha256:" + "0" * 64
    several = changed(options, docker_image=image, wheel="", num_slices=2)
    shell, dash_c, text = job_of(several, ("--config", str(recipe), "--system-prompt", "a b"), {}).train
    program = tmp_path / "sudo"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **slice_environment(1, 2, "10.0.0.2"),
    }
    done = subprocess.run([shell, dash_c, text], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:2] == ["docker", "run"]
    assert "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.2:8080" in words and "MEGASCALE_SLICE_ID=1" in words
    assert f"{tmp_path}/training.yaml:/work/training.yaml:ro" in words
    after = words[words.index(image) + 1 :]
    assert after[:4] == ["--config", "training.yaml", "--system-prompt", "a b"]


def test_the_set_up_script_is_shell(options: SpotOptions) -> None:
    script = job_of(options, TRAINING, {}).scripts["setup.sh"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_second_interrupt_leaves_the_machine_and_says_how_to_delete_it(tmp_path: Path) -> None:
    """A real process, real signals; its cloud never gets further than the queue."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.spot.test_commands import *\n"
        "import tests.spot.test_commands as t\n"
        "from numina_finetune.spot.clock import RealClock\n"
        "folder = Path(sys.argv[1]); (folder / 'w.whl').write_text(''); (folder / 'c.txt').write_text('')\n"
        "options = SpotOptions(output_dir=str(folder / 'runs'), run_id='r', project='p', zones='us-east5-b',\n"
        "    wheel=str(folder / 'w.whl'), constraints=str(folder / 'c.txt'), poll_seconds=0.1)\n"
        "cloud = FakeCloud(RealClock(), lambda *a: None)\n"
        "cloud.behaviour.delete_seconds = 600\n"
        "sys.exit(commands.run(options, t.TRAINING, cloud=cloud))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = ""
    while "REQUESTED" not in seen:
        seen = process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    while "STOPPED" not in seen:
        seen = process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED
    assert "left as it is" in out and "fake delete nf-r-" in out
    assert open_store(tmp_path / "runs" / "r").stat("spot/lease.json") is None, "the next one may begin at once"
