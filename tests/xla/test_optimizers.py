"""Adafactor, the rounding of bf16 weights, and what is measured of the gradients, on a mesh as natively."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment, train
from tests.programs import run_module
from tests.train.live import _backend
from tests.xla.optimizers import adafactor, measured, place, save, saved, steps


@pytest.fixture(scope="module", params=["tiny-qwen3", pytest.param("tiny-gpt-oss", marks=pytest.mark.slow)])
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Natively, and from the native run's second step on, on four devices (``fsdp=2,tensor=2``)."""
    folder, config = tmp_path_factory.mktemp("optimizers"), adafactor(request.param)
    backend = _backend(config, "native")
    place(backend, config)
    steps(backend, range(2))
    save(backend, folder / "native")
    native = {"losses": [metric.loss for metric in steps(backend, range(2, 4))]}
    save(backend, folder / "end")
    found = run_module("tests.xla.optimizers", request.param, str(folder), env=environment(devices=4))
    assert found.returncode == 0, found.stderr[-3000:]
    xla = json.loads(found.stdout.splitlines()[-1])
    native |= {"measured": measured("native"), "state": saved(folder / "end")}
    return native, xla | {"state": saved(folder / "xla")}


def test_adafactor_goes_on_from_a_native_checkpoint_with_the_same_numbers(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    native, xla = runs
    assert xla["losses"] == pytest.approx(native["losses"], rel=5e-6)
    assert xla["state"].tensors == native["state"].tensors, "whole tensors under the layers' own names"
    differences = {}
    for name in native["state"].tensors:
        ours, theirs = xla["state"].read(name).double(), native["state"].read(name).double()
        differences[name] = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
    assert max(differences.values()) < 1e-4, max(differences.items(), key=lambda item: item[1])


def test_adafactor_keeps_a_row_and_a_column_of_every_matrix_and_no_more(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    tensors = {name: shape for name, (shape, _) in runs[1]["state"].tensors.items()}
    for name, shape in tensors.items():
        if name.startswith("model."):
            own = name.replace("model.", "optim.", 1) + "."
            kept = {key.removeprefix(own): it for key, it in tensors.items() if key.startswith(own)}
            if len(shape) > 1 and not name.endswith("bias"):
                moments = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
            else:
                moments = {"exp_avg_sq": shape}
            assert kept == {"step": (), **moments}, name


def test_adafactor_resumes_bit_for_bit_in_one_program_and_skips_what_is_not_finite(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    _, xla = runs
    assert xla["resumed"] and xla["skipped"]
    assert "training-graph compilations: 1; host reads between log lines: 0; operators outside XLA: 0" in xla["summary"]


def test_without_clipping_the_optimizer_gets_the_gradient_whose_norm_is_reported(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for run in runs:
        found = run["measured"]
        assert found["norms"][0] > 1.0, "there is something that could have been clipped"
        assert found["moment"] == pytest.approx(0.1 * found["norms"][0], rel=1e-4)


def test_gradient_noise_is_measured_in_the_same_program_with_the_same_numbers(
    runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    native, xla = runs
    first, *parts = xla["measured"]["parts"]
    assert first == [None, None], "one gradient says nothing of their noise"
    for ours, theirs in zip(parts, native["measured"]["parts"][1:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    assert "training-graph compilations: 1; host reads between log lines: 0" in xla["measured"]["summary"]


def test_bf16_weights_are_rounded_to_the_same_bits_on_any_mesh_as_natively() -> None:
    found = run_module("tests.xla.rounding", env=environment(devices=4))
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(found.stdout.splitlines()[-1]) == {"same": [True] * 3, "outside": []}


@pytest.mark.slow
def test_pure_bf16_trains_in_one_program_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = ("--precision", "pure-bf16", "--logging-steps", "2", "--save-steps", "4")
    whole = train(tmp_path / "whole", *options, "--max-steps", "8")
    assert whole.code == 0, whole.output
    assert "training-graph compilations: 1; host reads between log lines: 0; operators outside XLA: 0" in whole.output
    started = ("--resume-from-checkpoint", str(whole.checkpoints[0]))
    rest = train(tmp_path / "rest", *options, "--max-steps", "8", *started)
    assert rest.code == 0, rest.output
    assert rest.state == whole.state
    assert rest.losses == whole.losses[4:]
