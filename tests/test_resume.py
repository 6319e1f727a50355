"""A run that is killed ends in the same weights, bit for bit, as one that never was."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Run, environment, options_of, train
from tests.programs import Program

STEPS = 24
RUN = ("--max-steps", str(STEPS), "--save-steps", "3", "--logging-steps", "1", "--gradient-accumulation-steps", "2")
LONG_RUN = ("--max-steps", "600", "--save-steps", "7", "--logging-steps", "1", "--gradient-accumulation-steps", "2")
FOUR = environment(devices=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    run = train(folder / "undisturbed", *RUN, env=FOUR)
    assert run.code == 0, run.output
    return run


def steps_logged(folder: Path) -> int:
    files = list(folder.glob("*/metrics.jsonl"))
    return len(files[0].read_text(encoding="utf-8").splitlines()) if files else 0


def lives_until_done(
    folder: Path, notices: Sequence[tuple[signal.Signals, float | int]], options: Sequence[str] = RUN
) -> tuple[Run, list[int]]:
    """Run to the end, sending each life its notice; the codes of the lives.

    A notice is a signal and its moment: after so many steps more (int), or so many seconds after the start, compiling
    included (float).
    """
    codes = []
    for number, moment in notices:
        process = Program("numina_finetune", *options_of(folder, *options), env=FOUR)
        if isinstance(moment, float):
            time.sleep(moment)
        else:
            wanted = steps_logged(folder) + moment
            while process.poll() is None and steps_logged(folder) < wanted:
                time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=300)
        codes.append(process.returncode)
    return train(folder, *options, env=FOUR), codes


def preempt_halfway(folder: Path) -> None:
    """Begin the run on four devices and send SIGTERM after half its steps."""
    process = Program("numina_finetune", *options_of(folder, *RUN), env=FOUR)
    while process.poll() is None and steps_logged(folder) < STEPS // 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 42


def test_sigterm_saves_at_the_next_step_and_the_same_command_resumes_to_identical_weights(
    folder: Path, undisturbed: Run
) -> None:
    run, codes = lives_until_done(folder / "preempted", [(signal.SIGTERM, 10)])
    assert codes == [42]
    assert run.code == 0, run.output
    first, second = run.outcome(1), run.outcome(2)
    assert (first["kind"], second["kind"]) == ("preempted", "done")
    assert f"resumed from the checkpoint of step {first['step']}/{STEPS}" in run.output
    assert run.state == undisturbed.state
    assert run.losses == undisturbed.losses


def test_sigkill_loses_only_the_steps_since_the_last_checkpoint_and_nothing_of_the_result(
    folder: Path, undisturbed: Run
) -> None:
    run, codes = lives_until_done(folder / "killed", [(signal.SIGKILL, 10)])
    assert codes == [-signal.SIGKILL]
    assert not (run.run / "attempts" / "1" / "outcome.json").exists()
    assert run.outcome(2)["kind"] == "done"
    assert run.state == undisturbed.state
    assert run.losses == undisturbed.losses


@pytest.fixture(scope="module")
def long_undisturbed(folder: Path) -> Run:
    run = train(folder / "long-undisturbed", *LONG_RUN, env=FOUR)
    assert run.code == 0, run.output
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_ten_kills_in_one_run_leave_identical_weights(
    folder: Path, long_undisturbed: Run, number: signal.Signals
) -> None:
    rng = random.Random(f"{number.name}-{os.environ.get('NUMINA_KILL_SEED', '0')}")
    # A SIGTERM comes at a random step; a SIGKILL at any moment, each second one while steps are being made.
    anywhere = [number == signal.SIGKILL and turn % 2 == 0 for turn in range(10)]
    notices = [(number, rng.uniform(0, 25) if early else rng.randint(1, 20)) for early in anywhere]
    run, codes = lives_until_done(folder / f"ten-{number.name}", notices, LONG_RUN)
    assert run.code == 0, run.output
    assert codes == [42 if number == signal.SIGTERM else -signal.SIGKILL] * 10
    assert run.state == long_undisturbed.state
    assert run.losses == long_undisturbed.losses


def test_a_run_moves_to_half_the_devices_with_the_same_global_batch_and_losses(folder: Path, undisturbed: Run) -> None:
    lives_folder = folder / "moved"
    preempt_halfway(lives_folder)
    run = train(lives_folder, *RUN, env=environment(devices=2))
    assert run.code == 0, run.output
    assert "accumulation is 4 here, to keep the run's 8 rows a step" in run.output
    assert run.losses == pytest.approx(undisturbed.losses, rel=1e-3)


def test_a_mesh_that_cannot_keep_the_global_batch_is_refused_with_the_numbers(undisturbed: Run) -> None:
    run = train(undisturbed.folder, *RUN, env=environment(devices=3))
    assert run.code == 2
    assert "8 rows" in run.output
    assert "multiple of 3" in run.output


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder: Path, undisturbed: Run) -> None:
    run, _ = lives_until_done(folder / "damaged", [])
    newest = run.checkpoints[-1]
    shard = newest / "state" / "00000-00000.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = train(run.folder, *RUN, env=FOUR)
    assert again.code == 0, again.output
    assert f"checkpoint of step {STEPS} is damaged, falling back" in again.output
    assert f"resumed from the checkpoint of step {STEPS - 3}/{STEPS}" in again.output
    assert again.state == undisturbed.state


def test_only_the_newest_checkpoints_are_kept_and_no_uncommitted_one(undisturbed: Run) -> None:
    assert [path.parent.name for path in undisturbed.checkpoints] == ["step-00000018", "step-00000021", "step-00000024"]
    assert len(list(undisturbed.run.glob("checkpoints/*/*"))) == 3


@pytest.mark.slow
def test_a_resume_from_an_earlier_step_keeps_what_it_saves_and_ends_in_the_same_weights(
    folder: Path, undisturbed: Run
) -> None:
    run, _ = lives_until_done(folder / "earlier", [])
    again = train(run.folder, *RUN, "--resume-from-checkpoint", "18", "--save-total-limit", "1", env=FOUR)
    assert again.code == 0, again.output
    assert f"resumed from the checkpoint of step 18/{STEPS}" in again.output
    assert [path.parent.name for path in again.checkpoints] == [f"step-{STEPS:08d}"]
    assert again.checkpoints[0].name == "attempt-2"
    assert again.state == undisturbed.state


def test_a_life_that_left_no_checkpoint_binds_nothing(tmp_path: Path) -> None:
    """A first try with a mistake in it may be mended under the same name."""
    first = train(tmp_path / "out", "--run-id", "mine", "--max-steps", "1", "--save-steps", "0", env=environment())
    (first.checkpoints[0] / "COMMITTED").unlink()  # as if it had crashed before
    mended = ("--run-id", "mine", "--max-steps", "2", "--logging-steps", "1", "--learning-rate", "5e-4")
    second = train(tmp_path / "out", *mended, env=environment())
    assert second.code == 0, second.output
    assert max(record["learning_rate"] for record in second.metrics if "loss" in record) == 5e-4


def test_the_run_again_after_its_end_does_nothing_and_says_so(undisturbed: Run) -> None:
    before = undisturbed.state
    again = train(undisturbed.folder, *RUN, env=FOUR)
    assert again.code == 0
    assert "nothing to do" in again.output
    assert again.state == before


def test_a_checkpoint_of_one_backend_resumes_on_the_other(folder: Path, undisturbed: Run) -> None:
    """The shards lie under Hugging Face names, whole tensors' coordinates beside them."""
    lives_folder = folder / "crossed"
    preempt_halfway(lives_folder)
    run = train(lives_folder, *RUN, "--backend", "native", env=environment())
    assert run.code == 0, run.output
    assert run.losses == pytest.approx(undisturbed.losses, rel=1e-3)
