"""FSDP2 over two processes trains as one process does, and a run that was split goes on anywhere."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, Run, command, environment, train
from tests.programs import run_in_processes, told, torchrun
from tests.torch_native import live

Found = dict[str, dict[str, Any]]
RUN = ("--max-steps", "10", "--logging-steps", "1", "--save-steps", "3", "--save-total-limit", "5")
RUN = (*RUN, "--global-batch-size", "8", "--per-device-train-batch-size", "2")
NATIVE = ("--backend", "native", "--mesh", "fsdp=2")


def accelerate_launch(processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, "--multi_gpu", "--num_processes", str(processes), "-m"]


def live_steps(folder: Path, mesh: str, processes: int) -> list[Found]:
    """What each process of a mesh finds."""
    run_in_processes(processes, "tests.torch_native.live", str(folder), mesh, env=environment())
    return told(folder, processes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """One process, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    live.store_model(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of a mesh have
    found = {case: live.steps(None, case, folder) for case in live.CASES}
    torch.set_num_threads(threads)
    return folder, found


@pytest.fixture(
    scope="module", params=[("fsdp=2", 2), pytest.param(("data=2,fsdp=2", 4), marks=pytest.mark.slow)], ids=str
)
def split(
    request: pytest.FixtureRequest, one: tuple[Path, Found], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Found]]:
    """A mesh of several processes, and their folder."""
    folder = tmp_path_factory.mktemp("split")
    shutil.copytree(one[0] / "model", folder / "model")
    mesh, processes = request.param
    return folder, live_steps(folder, mesh, processes)


def distance(first: Path, second: Path) -> float:
    """Relative L2 of all weights."""
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    return float((apart / sum(float(t.double().square().sum()) for t in theirs.values())) ** 0.5)


def test_split_weights_train_as_whole_ones(one: tuple[Path, Found], split: tuple[Path, list[Found]]) -> None:
    expected = one[1]["stored"]
    for found in split[1]:
        assert found["stored"]["losses"] == pytest.approx(expected["losses"], abs=5e-6)
        assert found["stored"]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["stored"]["tokens"] == expected["tokens"]
        assert found["stored"]["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
    assert distance(live.weights_file("stored", split[0]), live.weights_file("stored", one[0])) < 1e-5


@pytest.mark.parametrize("case", ["gpt-oss", "adapters"])
def test_split_weights_compute_in_bf16_with_masters_in_fp32(
    case: str, one: tuple[Path, Found], split: tuple[Path, list[Found]]
) -> None:
    for found in split[1]:
        # bf16 gradients are rounded before they are added up over processes, so that steps drift apart.
        assert found[case]["losses"] == pytest.approx(one[1][case]["losses"], rel=1e-3)
    weights = load_file(live.weights_file(case, split[0]))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert set(weights) == set(load_file(live.weights_file(case, one[0])))


def test_each_process_holds_its_part_only(one: tuple[Path, Found], split: tuple[Path, list[Found]]) -> None:
    for case, expected in one[1].items():
        for found in split[1]:
            assert found[case]["held"] < 0.51 * expected["held"]


def test_a_restored_state_goes_on_bit_for_bit(split: tuple[Path, list[Found]]) -> None:
    for found in split[1]:
        for case in found.values():
            assert case["digests"][0] == case["digests"][1]


def test_all_processes_decode_the_same_tokens_as_one(one: tuple[Path, Found], split: tuple[Path, list[Found]]) -> None:
    """Each has another number of prompts and of tokens to go, and every forward pass gathers weights from all."""
    expected = one[1]["stored"]["generated"]
    assert all(found["stored"]["generated"] == expected for found in split[1])
    assert len({len(row) for row in expected}) > 1


# --- whole runs -------------------------------------------------------------------------------------------------------


def start(folder: Path, launcher: Sequence[str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, *command(folder, *RUN, *NATIVE, *options)[2:]],
        env=environment(ACCELERATE_USE_CPU="1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, launcher: Sequence[str], *options: str) -> Run:
    process = start(folder, launcher, *options)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return Run(process.returncode, output, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    return finish(folder / "undisturbed", torchrun(2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_run_ends_in_identical_weights(folder: Path, undisturbed: Run, number: signal.Signals) -> None:
    place = folder / number.name
    process = start(place, torchrun(2), "--run-id", "killed")
    while process.poll() is None and not list(place.glob("killed/checkpoints/*/*/COMMITTED")):
        time.sleep(0.02)
    trainers = psutil.Process(process.pid).children(recursive=True)
    for one in trainers if number == signal.SIGKILL else [psutil.Process(process.pid)]:
        os.kill(one.pid, number)
    process.communicate(timeout=300)
    assert process.returncode != 0
    run = finish(place, torchrun(2), "--run-id", "killed")
    assert "resumed from the checkpoint of step" in run.output
    assert run.state == undisturbed.state
    assert run.losses == undisturbed.losses


@pytest.mark.slow
def test_a_run_moves_from_a_mesh_of_xla_to_split_processes_and_back(folder: Path) -> None:
    four = environment(devices=4)
    run_id = ("--run-id", "moved")
    whole = train(folder / "xla", *RUN, *run_id, env=four)
    assert whole.code == 0, whole.output
    place = folder / "moved"
    shutil.copytree(whole.folder, place)
    cut_back(place, 3)
    natively = finish(place, torchrun(2), *run_id)
    assert "resumed from the checkpoint of step 3/10" in natively.output
    assert natively.losses == pytest.approx(whole.losses, rel=1e-3)
    cut_back(place, 6)
    back = train(place, *RUN, *run_id, env=four)
    assert "resumed from the checkpoint of step 6/10" in back.output
    assert back.losses == pytest.approx(whole.losses, rel=1e-3)


def cut_back(place: Path, step: int) -> None:
    """Let the run in ``place`` be one that was stopped after its checkpoint of ``step``."""
    for checkpoint in place.glob("moved/checkpoints/step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(place / "moved" / "model")


@pytest.mark.slow
def test_accelerate_launch_starts_it_as_torchrun_does(folder: Path, undisturbed: Run) -> None:
    run = finish(folder / "accelerate", accelerate_launch(2))
    assert "FSDP2 on the mesh fsdp=2" in run.output
    assert run.state == undisturbed.state


@pytest.mark.slow
def test_compiled_layers_train_as_eager_ones(folder: Path, undisturbed: Run) -> None:
    run = finish(folder / "compiled", torchrun(2), "--torch-compile")
    assert run.losses == pytest.approx(undisturbed.losses, rel=1e-4)
    assert (
        load_file(run.run / "model" / "model.safetensors").keys()
        == load_file(undisturbed.run / "model" / "model.safetensors").keys()
    )
