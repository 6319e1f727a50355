"""The same run on other devices has the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run, environment, options_of, train
from tests.programs import run_in_processes

EXACT = ("--precision", "fp32", "--learning-rate", "1e-3")
"""Of runs that are to agree closer than bf16 rounds, in steps large enough that one which went wrong would show."""
RUN = ("--max-steps", "10", "--logging-steps", "1", "--save-steps", "0", "--global-batch-size", "8", *EXACT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def native(folder: Path) -> Run:
    run = train(folder / "native", *RUN, "--per-device-train-batch-size", "4", env=environment())
    assert run.code == 0, run.output
    return run


@pytest.mark.parametrize("mesh", ["fsdp=4", pytest.param("data=2,tensor=2", marks=pytest.mark.slow)])
def test_a_mesh_of_four_devices_follows_the_native_backend(folder: Path, native: Run, mesh: str) -> None:
    run = train(folder / mesh, *RUN, "--mesh", mesh, env=environment(devices=4))
    assert run.code == 0, run.output
    assert run.losses == pytest.approx(native.losses, rel=1e-3)
    assert "training-graph compilations: 1; host reads between log lines: 0" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=1", "fsdp=2,expert=2"])
def test_gpt_oss_follows_the_native_backend_with_one_compilation_and_no_host_read(folder: Path, mesh: str) -> None:
    options = ("--model-name", "tiny-gpt-oss", "--global-batch-size", "4", "--logging-steps", "1", "--save-steps", "0")
    options = (*options, "--max-steps", "6", "--per-device-train-batch-size", "1", *EXACT)
    devices = 1 if mesh == "fsdp=1" else 4
    run = train(folder / f"gpt-oss-{devices}", *options, "--mesh", mesh, env=environment(devices=devices))
    assert run.code == 0, run.output
    assert "training-graph compilations: 1; host reads between log lines: 0; operators outside XLA: 0" in run.output
    native = train(folder / f"gpt-oss-native-{devices}", *options, env=environment())
    assert run.losses == pytest.approx(native.losses, rel=1e-3)
    assert native.losses[-1] < native.losses[0] - 0.5


def test_two_gloo_processes_equal_one(folder: Path, native: Run) -> None:
    training = options_of(folder / "gloo", *RUN, "--backend", "native", "--per-device-train-batch-size", "2")
    output = run_in_processes(2, "numina_finetune", *training, env=environment())
    assert "2 process(es)" in output
    assert Run(0, output, folder / "gloo").losses == pytest.approx(native.losses, rel=1e-4)


def test_gradient_checkpointing_changes_no_loss(folder: Path, native: Run) -> None:
    run = train(
        folder / "kept", *RUN, "--per-device-train-batch-size", "4", "--no-gradient-checkpointing", env=environment()
    )
    assert run.losses == pytest.approx(native.losses, rel=1e-6)


def test_the_loss_falls(native: Run) -> None:
    assert native.losses[-1] < native.losses[0] - 0.5
