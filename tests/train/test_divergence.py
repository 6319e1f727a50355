"""Steps, weights and losses that are not finite: what is skipped, what is said, and what never reaches a disk."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from numina_finetune.cli.entry import run_command
from numina_finetune.errors import ExitCode
from tests.conftest import Run, environment, options_of
from tests.programs import run_module
from tests.train.broken import break_training

SHORT = ("--save-steps", "2", "--logging-steps", "5", "--eval-steps", "0")


def cli(*words: str) -> tuple[int, str]:
    """The exit code of a command in this process, and what it wrote."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = run_command(words)
    return code, written.getvalue()


@pytest.fixture
def broken(native_here: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Runs the default settings natively, with something that is not finite (see `tests.train.broken`)."""
    from numina_finetune.train import step, trainer
    from numina_finetune.train.loss import CausalLoss

    def run(what: str, folder: Path, *options: str, source: Sequence[str] = ()) -> Run:
        with monkeypatch.context() as patched:
            for owner, name in (
                (CausalLoss, "forward"),
                (trainer, "learning_rate_at"),
                (step, "guarded_update"),
            ):
                patched.setattr(owner, name, getattr(owner, name))  # put back afterwards
            break_training(what)
            given = options_of(folder, *options)
            code, output = cli(*[*given[:2], *given[6:], *source] if source else given)
        return Run(code, output, folder)

    return run


def write_rows(path: Path, poisoned: int) -> Path:
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(48)]
    rows[poisoned]["question"] += " zqzqzq"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_with_an_infinite_loss_is_skipped_told_and_named_and_the_run_goes_on(
    tmp_path: Path, broken: Callable[..., Run]
) -> None:
    source = ("--dataset-name", str(write_rows(tmp_path / "rows.jsonl", 7)), "--format", "gsm8k", "--no-packing")
    run = broken("row:zqzqzq", tmp_path / "out", "--global-batch-size", "8", "--logging-steps", "1", source=source)
    assert run.code == ExitCode.DONE, run.output
    (skipped,) = [record for record in run.metrics if record.get("applied") is False]
    step, (first, last) = skipped["step"], skipped["rows"]
    assert f"step {step} was skipped" in run.output and f"rows {first} to {last}" in run.output
    assert f"steps skipped as not finite: 1 ({step})" in run.output
    (named,) = [line for line in run.output.splitlines() if "whose own loss is not finite" in line]
    row = named.split("warning: row ")[1].split()[0]
    run_of = ("--model-name", "tiny-qwen3", "--max-seq-length", "128", *source)
    code, shown = cli("data", "preview", *run_of, "--run-rows", f"{row}-{row}")
    assert code == 0 and "zqzqzq" in shown, shown
    assert not any("applied" in record and math.isnan(record["weight_norm"]) for record in run.metrics)


def test_a_run_that_diverges_ends_for_good_and_leaves_the_checkpoint_before(
    tmp_path: Path, broken: Callable[..., Run]
) -> None:
    run = broken("loss:7", tmp_path / "out", *SHORT, "--max-steps", "40")
    assert run.code == ExitCode.DIVERGED, run.output
    assert "the 10 steps 7 to 16 were skipped" in run.output and "newest checkpoint is of step 6" in run.output
    assert "Traceback" not in run.output
    outcome = run.outcome()
    assert (outcome["kind"], outcome["saved_step"]) == ("diverged", 6)
    assert [path.parent.name for path in run.checkpoints] == ["step-00000002", "step-00000004", "step-00000006"]
    code, said = cli("checkpoints", "verify", str(run.run))
    assert code == 0, said
    code, said = cli("export", str(run.run), "--output", str(tmp_path / "model"))
    assert code == 0, said

    again = broken("loss:7", tmp_path / "out", *SHORT, "--max-steps", "40")
    assert again.code == ExitCode.DIVERGED and len(again.checkpoints) == 3, "a retry saves nothing either"


def test_a_streak_at_the_end_of_a_run_is_not_exported(tmp_path: Path, broken: Callable[..., Run]) -> None:
    run = broken("loss:7", tmp_path / "out", *SHORT, "--max-steps", "9")
    assert run.code == ExitCode.DIVERGED, run.output
    assert "last 3 steps" in run.output and not (run.run / "model").exists()


def test_an_update_that_makes_weights_not_finite_is_named_and_never_saved(
    tmp_path: Path, broken: Callable[..., Run]
) -> None:
    run = broken("update:5", tmp_path / "out", *SHORT, "--max-steps", "40")
    assert run.code == ExitCode.DIVERGED, run.output
    assert "the weights after step 5 are not finite: model." in run.output
    assert [path.parent.name for path in run.checkpoints] == ["step-00000002", "step-00000004"]
    assert cli("checkpoints", "verify", str(run.run))[0] == 0


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose one checkpoint has a weight that is no number, as versions without a guard made them."""
    from tests.train.poison import poison

    folder = tmp_path_factory.mktemp("poisoned") / "out"
    program = ("numina_finetune", *options_of(folder, "--max-steps", "2"))
    ended = run_module(*program, env=environment(), together=True)
    assert ended.returncode == 0, ended.stdout
    (run,) = [record.parent for record in folder.glob("*/run.yaml")]
    poison(run, "model.model.norm.weight")
    return run


def test_verify_names_weights_that_are_not_finite(poisoned: Path) -> None:
    code, said = cli("checkpoints", "verify", str(poisoned))
    assert code == ExitCode.FAULTS_FOUND and "model.model.norm.weight has values that are not finite" in said


def test_export_refuses_weights_that_are_not_finite(poisoned: Path, tmp_path: Path) -> None:
    code, said = cli("export", str(poisoned), "--output", str(tmp_path / "model"))
    assert code == ExitCode.CONFIGURATION and "model.norm.weight has values that are not finite" in said, said
    assert not (tmp_path / "model").exists() and "Traceback" not in said


def test_a_push_refuses_weights_that_are_not_finite(poisoned: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from numina_finetune.errors import CheckpointError
    from numina_finetune.models.push import push

    with safe_open(poisoned / "model" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not finite"):
        push(tmp_path, "user/name", private=False, again="")


@pytest.mark.parametrize("what", ["update:5", pytest.param("loss:3", marks=pytest.mark.slow)])
def test_divergence_on_a_mesh_is_final_too_and_names_the_layers_own_weights(what: str, tmp_path: Path) -> None:
    """Scanned layers are one parameter in memory; a message names the model's own."""
    out = tmp_path / "out"
    program = ("tests.train.broken", what, *options_of(out, *SHORT, "--max-steps", "14"))
    ended = run_module(*program, env=environment(devices=4), together=True)
    run = Run(ended.returncode, ended.stdout, out)
    assert run.code == ExitCode.DIVERGED, run.output
    said = "after step 5 are not finite: model." if what == "update:5" else "the 10 steps 3 to 12 were skipped"
    assert said in run.output and "[0::" not in run.output
    last = 4 if what == "update:5" else 2
    assert run.outcome()["saved_step"] == last and len(run.checkpoints) == last // 2
