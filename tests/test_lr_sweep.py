"""A sweep over learning rates: its plan, its verdicts, its order; and real ones, killed and given again."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numina_finetune import cli
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.errors import ConfigError
from numina_finetune.sweep.divergence import MARGIN, NONFINITE_STEPS, WINDOW, Criteria, divergence
from numina_finetune.sweep.report import advice_of, table_of
from numina_finetune.sweep.standing import Standing, ranking
from numina_finetune.sweep.trials import parse_rates, trials_of
from tests.conftest import ROOT, TINY, environment

PASSED = [*TINY, "--backend", "native", "--metadata-url", "none", "--output-dir", "sweep"]


# --- rates and trials -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("3e-5, 1e-5,1e-5", (1e-5, 3e-5)),
        ("1e-6:1e-4:5", (1e-6, 3.16e-6, 1e-5, 3.16e-5, 1e-4)),
        ("1e-6:1e-5:2,5e-5", (1e-6, 1e-5, 5e-5)),
    ],
)
def test_rates_are_listed_or_spread_evenly_in_log(text: str, rates: tuple[float, ...]) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1", "nan", "inf", "1e-5:1e-6:3", "1e-6:1e-5:1", "1e-6:1e-5", "1:2:3:4"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no learning rate above 0"):
        parse_rates(text)


def test_trials_differ_in_the_rate_only_and_share_data_and_group() -> None:
    base = RunConfig("tiny-qwen3", datasets=(SourceConfig("a"),), output_dir="sweeps/first", report_to="wandb")
    trials = trials_of(base, ["--model-name", "tiny-qwen3"], [1e-5, 2e-5])
    assert [trial.words for trial in trials] == [
        (
            *("--model-name", "tiny-qwen3", "--learning-rate", rate, "--run-id", f"lr-{rate}"),
            *("--cache-dir", "sweeps/first/cache", "--tracker-group", "sweep-first"),
        )
        for rate in ("1e-05", "2e-05")
    ]
    first, second = (trial.config for trial in trials)
    assert replace(second, learning_rate=1e-5, run_id="lr-1e-05") == first
    assert trials[0].settings != trials[1].settings


def test_everything_wrong_with_a_sweep_is_told_at_once_before_anything_runs(
    capsys: pytest.CaptureFixture[str], native_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = ["--learning-rate", "1", "--run-id", "x", "--max_steps", "0", "--resume-from-checkpoint", "none"]
    assert cli.run_command(["sweep", "--lrs", "1e-5,x", "--parallel", "0", *PASSED, *wrong]) == 2
    told = capsys.readouterr().err
    for part in ("6 problems", "give the rates to --lrs", "'x' is no", "--parallel 0", "--max-steps 0", "a name of its",
                 "resumes its interrupted trials"):  # fmt: skip
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_train_does_not_know_is_refused(capsys: pytest.CaptureFixture[str], native_here: None) -> None:
    assert cli.run_command(["sweep", "--lrs", "1e-5", *PASSED, "--sweeps", "3"]) == 2
    assert "--sweeps" in capsys.readouterr().err


def test_trials_side_by_side_are_refused_where_one_process_has_all_chips(
    capsys: pytest.CaptureFixture[str], native_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    words = [word if word != "native" else "xla" for word in PASSED]
    assert cli.run_command(["sweep", "--lrs", "1e-5", "--parallel", "2", *words]) == 2
    assert "one process drives all of a host's TPU chips" in capsys.readouterr().err


# --- divergence -------------------------------------------------------------------------------------------------------


def steps(*losses: float, applied: bool = True) -> list[dict[str, Any]]:
    return [{"step": n, "loss": loss, "applied": applied} for n, loss in enumerate(losses, 1)]


def test_a_loss_that_stays_far_above_its_best_is_diverging() -> None:
    falling = [6 - 0.1 * n for n in range(40)]
    found = divergence(steps(*falling, *[12.0] * 60), Criteria(2.0, 20))
    assert found is not None and 40 + 20 <= found.step <= 40 + 20 + WINDOW
    assert "2 times its best" in found.reason
    assert divergence(steps(*falling, *[12.0] * 60), Criteria(0, 20)) is None
    assert divergence(steps(*falling, *[12.0] * 60), Criteria(5.0, 20)) is None


def test_a_loss_that_leaps_at_once_is_measured_by_where_it_began() -> None:
    found = divergence(steps(6.0, *[40.0] * 30), Criteria(2.0, 20))
    assert found is not None and found.step == 21


def test_a_spike_is_not_diverging_nor_is_a_small_loss_that_doubles() -> None:
    assert divergence(steps(*[3.0] * 40, *[20.0] * 10, *[3.0] * 40), Criteria(2.0, 20)) is None
    assert divergence(steps(*[0.1] * 40, *[0.1 + 0.9 * MARGIN] * 60), Criteria(2.0, 20)) is None


def test_steps_skipped_in_a_row_are_diverging() -> None:
    nan = float("nan")
    assert divergence(steps(3.0, nan, 3.0, nan, 3.0), Criteria()) is None
    found = divergence(steps(3.0, *[nan] * NONFINITE_STEPS), Criteria(0))
    assert found is not None and found.step == 1 + NONFINITE_STEPS
    assert divergence(steps(*[3.0] * NONFINITE_STEPS, applied=False), Criteria()) is not None
    assert divergence([], Criteria()) is None


# --- the order --------------------------------------------------------------------------------------------------------


def standing(rate: float, outcome: str = "done", **figures: float | None) -> Standing:
    known = {"loss": 1.0, "eval_loss": None, "eval_accuracy": None, **figures}
    return Standing(rate, f"lr-{rate}", "here", outcome, None, 10, seconds=1.0, **known)


def test_accuracy_ranks_before_evaluation_loss_before_training_loss() -> None:
    figures = ((1.0, 2.0, 0.5), (2.0, 1.0, 0.7), (3.0, 1.5, 0.7))
    full = [standing(n, loss=a, eval_loss=b, eval_accuracy=c) for n, (a, b, c) in enumerate(figures, 1)]
    assert [each.rate for each in ranking(full).order] == [2, 3, 1], "equal accuracy: the lower loss"
    partly = [replace(full[0], eval_accuracy=None), *full[1:]]
    assert (ranking(partly).by, [each.rate for each in ranking(partly).order]) == ("eval_loss", [2, 3, 1])
    bare = [replace(each, eval_accuracy=None, eval_loss=None) for each in full]
    assert (ranking(bare).by, [each.rate for each in ranking(bare).order]) == ("loss", [1, 2, 3])
    assert "ranked by mean training loss over the last 10% of the steps" in table_of(bare)


def test_only_trials_that_are_done_are_ranked_and_the_others_are_shown() -> None:
    all_of_them = [standing(1), standing(2, "diverged", loss=0.1), standing(3, "unfinished"), standing(4, loss=None)]
    assert [each.rate for each in ranking(all_of_them).order] == [1, 4]
    assert {"diverged", "unfinished"} <= set(table_of(all_of_them).split())


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, "the best rate, 3, is the largest tried: try higher ones"),
        ({1: 1.0, 2: 2.0, 3: 3.0}, "the best rate, 1, is the smallest tried: try lower ones"),
        ({1: 2.0, 2: 1.0, 3: 3.0}, "the best rate, 2, lies between others that were tried"),
        ({1: 2.0, 2: 1.0, 3: math.inf}, "the best rate, 2, lies between others that were tried"),
        ({1: math.inf, 2: math.inf}, "every rate diverged: try lower ones"),
    ],
)
def test_the_best_rate_at_the_edge_is_said(losses: dict[float, float], advice: str) -> None:
    seen = [standing(rate, "done" if loss < math.inf else "diverged", loss=loss) for rate, loss in losses.items()]
    assert advice_of(seen, ranking(seen)) == advice


# --- real ones --------------------------------------------------------------------------------------------------------

RATES = (1e-3, 3e-3, 1.0)


class Bench:
    """A sweep's command, started and waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = [
            *("--lrs", ",".join(map(str, RATES))),
            *PASSED,
            *("--output-dir", str(folder), "--max-steps", "45", "--logging-steps", "1", "--save-steps", "10"),
            *("--save-total-limit", "1"),
        ]

    def start(self) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "scripts/lr_sweep.py", *self.words]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)

    def run(self) -> tuple[int, str]:
        sweep = self.start()
        output, _ = sweep.communicate(timeout=900)
        return sweep.returncode, output

    def lives(self, rate: float) -> list[dict[str, Any] | None]:
        """Their outcomes; None of one that left none."""
        folders = sorted((self.folder / f"lr-{rate!r}" / "attempts").glob("*"))
        outcomes = [folder / "outcome.json" for folder in folders]
        return [json.loads(path.read_text("utf-8")) if path.is_file() else None for path in outcomes]

    @property
    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.folder / "sweep.json").read_text("utf-8"))
        return results


def wait_until(happened: Callable[[], bool], sweep: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if happened():
            return
        assert sweep.poll() is None, sweep.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("it did not happen")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, str]:
    """Killed with its trial in the middle of the second one, and given again; with what the second one printed."""
    bench = Bench(tmp_path_factory.mktemp("sweep") / "out")
    first = bench.start()
    second_trial = bench.folder / "lr-0.003"
    wait_until(lambda: any(second_trial.glob("checkpoints/*/*/COMMITTED")), first)
    (child,) = (Path(f"/proc/{first.pid}/task/{first.pid}/children")).read_text("utf-8").split()
    first.kill()
    os.kill(int(child), signal.SIGKILL)
    first.communicate()
    code, output = bench.run()
    assert code == 0, output
    return bench, output


def test_a_finished_trial_is_not_run_again_and_an_interrupted_one_goes_on(swept: tuple[Bench, str]) -> None:
    bench, output = swept
    assert "lr-0.001: done before, not run again" in output
    assert [life and life["kind"] for life in bench.lives(1e-3)] == ["done"]
    assert [life and life["kind"] for life in bench.lives(3e-3)] == [None, "done"]
    assert "resumed from the checkpoint of step" in (bench.folder / "lr-0.003.log").read_text("utf-8")


def test_a_diverging_trial_is_stopped_early_and_recorded(swept: tuple[Bench, str]) -> None:
    bench, _ = swept
    (trial,) = [trial for trial in bench.results["trials"] if trial["rate"] == 1.0]
    assert trial["outcome"] == "diverged" and 20 <= trial["step"] < 45
    (life,) = bench.lives(1.0)
    assert life is not None and life["kind"] != "done"


def test_the_results_rank_the_trials_and_name_the_winners_command(swept: tuple[Bench, str]) -> None:
    bench, output = swept
    results = bench.results
    ended = {trial["rate"]: trial["loss"] for trial in results["trials"] if trial["outcome"] == "done"}
    assert results["ranking"] == sorted(ended, key=lambda rate: ended[rate])
    winner = results["winner"]
    assert winner["rate"] == results["ranking"][0] and winner["command"] in output
    words = shlex.split(winner["command"])
    assert words[words.index("--learning-rate") + 1] == repr(winner["rate"])
    assert (bench.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((bench.folder / "cache").glob("*"))) > 0, "the trials share one cache"
    assert (Path(winner["run"]) / "model" / "config.json").is_file()


def test_a_sweep_that_is_done_runs_nothing_when_given_again(
    swept: tuple[Bench, str], native_here: None, caplog: pytest.LogCaptureFixture
) -> None:
    bench, _ = swept
    before = {rate: len(bench.lives(rate)) for rate in RATES}
    with caplog.at_level("INFO"):
        assert cli.run_command(["sweep", *bench.words]) == 0
    assert caplog.text.count("not run again") == 3
    assert {rate: len(bench.lives(rate)) for rate in RATES} == before


def test_other_settings_in_the_same_folder_are_refused(
    swept: tuple[Bench, str], native_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, _ = swept
    assert cli.run_command(["sweep", *bench.words, "--max-steps", "46"]) == 2
    assert "holds a sweep with --max-steps 45, this one has 46" in capsys.readouterr().err


@pytest.mark.slow
def test_a_notice_reaches_trials_side_by_side_which_save_and_the_sweep_says_preempted(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "out")
    bench.words += ["--parallel", "2", "--max-steps", "4000"]
    sweep = bench.start()
    metrics = [bench.folder / f"lr-{rate!r}" / "metrics.jsonl" for rate in RATES[:2]]
    wait_until(lambda: all(path.is_file() and '"loss"' in path.read_text("utf-8") for path in metrics), sweep)
    sweep.terminate()
    output, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 42, output
    for rate in RATES[:2]:
        (life,) = bench.lives(rate)
        assert life is not None and life["kind"] == "preempted" and life["saved_step"] == life["step"] > 0
    assert [trial["outcome"] for trial in bench.results["trials"]] == ["unfinished", "unfinished", "not run"]
