"""One command that shows the whole of it: train, be preempted, resume, export, and measure what was learned.

A tiny Qwen3 learns generated word problems on four virtual XLA devices of the CPU. In the middle of the run its
process gets the very signal a spot machine sends; the same command, run again, finishes. Accuracy is measured on
problems whose arithmetic training never showed (see :mod:`numina_finetune.data.synthetic`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data.sources import SYNTHETIC
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.evaluate_command import MakeBackend, evaluate, run_compare
from numina_finetune.evaluation.options import EvaluateOptions
from numina_finetune.evaluation.scoring import Figures as Accuracy
from numina_finetune.models.load import open_model
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.option_fields import words_of
from numina_finetune.train.plots import plot_loss, read_lives

STEPS = 600
TEST_PROBLEMS = 256
DEVICES = 4
REQUIRED_ACCURACY = 0.5
"""What the lower end of the 95% interval must exceed after training."""

EVALUATION_BATCH = 128
LONGEST_ANSWER = 96
"""Tokens after which an answer is cut; the longest gold answer has fewer."""
POLL_SECONDS = 0.2


class StageFailed(Exception):
    """A stage of the quickstart did not do what it shows; the message says which and how."""


@dataclass
class Figures:
    """What the quickstart measured, written to ``quickstart.json``."""

    before: Accuracy | None = None
    after: Accuracy | None = None
    parameters: int = 0
    steps: int = 0
    preempted_at: int | None = None
    """Optimizer step of the checkpoint that the preempted life left."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time of each stage."""


def run_quickstart(
    output_dir: Path, make_backend: MakeBackend, *, steps: int | None = None, test_problems: int = TEST_PROBLEMS
) -> int:
    """Run every stage and say what happened.

    Args:
        output_dir: gets the run's folder.
        make_backend: the native one, which evaluates.
        steps: optimizer steps in all; fewer than the default prove the plumbing, not the learning.
        test_problems: held-out problems of each evaluation.

    Returns:
        0, or 1 if a stage failed or the accuracy is not proven to be above one half.

    Raises:
        ConfigError: the folder already holds a quickstart.
    """
    config = quickstart_config(output_dir, STEPS if steps is None else steps)
    run = output_dir / config.resolved_run_id
    if run.exists():
        raise ConfigError(f"--output-dir {output_dir} already holds a quickstart ({run}): give another folder")
    figures = Figures(steps=config.max_steps)
    started = time.monotonic()
    try:
        _stages(config, run, make_backend, test_problems, figures)
    except StageFailed as failure:
        print(f"\nThe quickstart failed: {failure}", flush=True)
        return ExitCode.CRASHED
    finally:
        figures.seconds["total"] = round(time.monotonic() - started, 1)
        if run.is_dir():
            (run / "quickstart.json").write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
    return _verdict(figures, run)


def quickstart_config(output_dir: Path, steps: int) -> RunConfig:
    """The run that the quickstart makes; its command line is :func:`command_line`."""
    return RunConfig(
        model_name="tiny-qwen3",
        datasets=(SourceConfig("synthetic-gsm8k", format="gsm8k"),),
        gsm8k_style="annotated",
        precision="fp32",
        max_seq_length=256,
        per_device_train_batch_size=2,
        learning_rate=4e-3,
        warmup_ratio=0.05,
        lr_scheduler_type="linear",
        adam_beta2=0.98,
        max_steps=steps,
        remat="none",
        backend="xla",
        mesh=f"fsdp={DEVICES}",
        output_dir=str(output_dir),
        run_id="tiny-qwen3",
        save_steps=0,
    )


def command_line(config: RunConfig) -> list[str]:
    """The options that make ``numina-finetune`` run ``config``: those that differ from their defaults."""
    (source,) = config.datasets
    return [f"--dataset-name={source.name}", f"--format={source.format}", *words_of(config, without=["datasets"])]


def _stages(config: RunConfig, run: Path, make_backend: MakeBackend, test_problems: int, figures: Figures) -> None:
    model, _ = open_model(config, load_tokenizer(config))
    figures.parameters = sum(parameter.numel() for parameter in model.parameters())
    # Matrices this small gain nothing from more threads, which wait for one another wherever a core is busy.
    torch.set_num_threads(1)
    evaluations = run / "evaluations"

    _say(f"1. The untrained model on {test_problems} held-out problems, greedily:")
    with _Timed(figures, "evaluation before"):
        figures.before = _evaluate(config.model_name, test_problems, evaluations / "before", make_backend)

    half = config.max_steps // 2
    _say(f"2. Training on {DEVICES} virtual XLA devices, until SIGTERM arrives after about {half} steps:")
    with _Timed(figures, "first life"):
        _train_until_preempted(config, run, half)
    figures.preempted_at = _committed_step(run)
    print(f"   It saved step {figures.preempted_at} of {config.max_steps} and exited {ExitCode.PREEMPTED:d}.")

    _say("3. The same command again:")
    with _Timed(figures, "second life"):
        code = _start(config).wait()
    if code != ExitCode.DONE:
        raise StageFailed(f"the resumed training exited {code}, not {ExitCode.DONE:d}")
    _check_one_course(run, config.max_steps, figures.preempted_at)

    _say(f"4. The exported model on the same {test_problems} problems:")
    with _Timed(figures, "evaluation after"):
        figures.after = _evaluate(str(run / "model"), test_problems, evaluations / "after", make_backend)
    run_compare(str(evaluations / "before"), str(evaluations / "after"), str(evaluations))
    plot_loss(
        run / "metrics.jsonl",
        run / "loss.png",
        title=f"tiny-qwen3 ({figures.parameters / 1e6:.1f} M parameters) on generated GSM8K-style problems",
        marks=[figures.preempted_at],
    )


def _evaluate(model: str, test_problems: int, folder: Path, make_backend: MakeBackend) -> Accuracy | None:
    """What ``numina-finetune evaluate --task synthetic-gsm8k`` does."""
    options = EvaluateOptions(
        model=model,
        task=SYNTHETIC,
        max_problems=test_problems,
        max_new_tokens=LONGEST_ANSWER,
        batch_size=min(EVALUATION_BATCH, test_problems),
        backend="native",
        output_dir=str(folder),
    )
    return evaluate(options, make_backend)


def _start(config: RunConfig) -> subprocess.Popen[bytes]:
    """The training as a user would start it, its output on this terminal."""
    options = command_line(config)
    print("   $ numina-finetune " + " ".join(options), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "USE_TORCH_XLA"}
    environment |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(DEVICES)}
    return subprocess.Popen([sys.executable, "-m", "numina_finetune", *options], env=environment)


def _train_until_preempted(config: RunConfig, run: Path, step: int) -> None:
    """Start the training and send it SIGTERM once ``step`` steps are on record.

    Raises:
        StageFailed: it ended by itself, or not as a preempted run does.
    """
    process = _start(config)
    try:
        while _recorded_step(run) < step:
            if process.poll() is not None:
                raise StageFailed(f"the training exited {process.returncode} before it was preempted")
            time.sleep(POLL_SECONDS)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
    if code != ExitCode.PREEMPTED:
        raise StageFailed(f"the preempted training exited {code}, not {ExitCode.PREEMPTED:d}")


def _recorded_step(run: Path) -> int:
    """The last whole line's step in ``metrics.jsonl``; 0 before there is one."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _committed_step(run: Path) -> int:
    """The newest step with a committed checkpoint.

    Raises:
        StageFailed: there is none.
    """
    steps = [int(marker.parts[-3].removeprefix("step-")) for marker in run.glob("checkpoints/step-*/*/COMMITTED")]
    if not steps:
        raise StageFailed(f"the preempted training left no committed checkpoint in {run / 'checkpoints'}")
    return max(steps)


def _check_one_course(run: Path, steps: int, preempted_at: int) -> None:
    """The first life made the steps up to its checkpoint and the second one the others, each once.

    Raises:
        StageFailed: they did not.
    """
    lives = [life.steps for life in read_lives(run / "metrics.jsonl")]
    if lives != [list(range(1, preempted_at + 1)), list(range(preempted_at + 1, steps + 1))]:
        told = ", ".join(f"{len(life)} steps from {life[0]} to {life[-1]}" for life in lives)
        raise StageFailed(f"the lives before and after step {preempted_at} do not make {steps} steps ({told})")


def _verdict(figures: Figures, run: Path) -> int:
    before, after = figures.before, figures.after
    if before is None or after is None:
        raise AssertionError("a verdict needs both evaluations")
    passed = after.lower > REQUIRED_ACCURACY
    rows = [
        ("held-out problems", f"{after.problems}"),
        ("always the commonest answer", f"{after.majority:.1%}"),
        (
            "exact match before training",
            f"{before.accuracy:.1%}  (95% interval {before.lower:.1%} to {before.upper:.1%})",
        ),
        ("exact match after training", f"{after.accuracy:.1%}  (95% interval {after.lower:.1%} to {after.upper:.1%})"),
        ("preempted and resumed at step", f"{figures.preempted_at} of {figures.steps}"),
        ("seconds", f"{figures.seconds['total']:.0f}"),
        ("loss curve", f"{run / 'loss.png'}"),
        ("model", f"{run / 'model'}"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<30} {value}")
    if not passed:
        print(f"\nThe quickstart failed: the accuracy is not proven to be above {REQUIRED_ACCURACY:.0%}.")
    sys.stdout.flush()
    return ExitCode.DONE if passed else ExitCode.CRASHED


class _Timed:
    """Adds the wall-clock seconds of its block to the figures."""

    def __init__(self, figures: Figures, stage: str) -> None:
        self._figures, self._stage = figures, stage

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._figures.seconds[self._stage] = round(time.monotonic() - self._started, 1)


def _say(line: str) -> None:
    print(f"\n{line}", flush=True)
