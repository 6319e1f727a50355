"""The picture of the README: one run that is taken away three times, beside the same run left alone.

    python benchmarks/preempted_life.py docs/images/preempted_life.svg [--steps 300] [--keep FOLDER]

Trains the quickstart's tiny model twice on four virtual XLA devices, once straight through and once with a notice
(SIGTERM), a kill without one (SIGKILL) and another notice on the way; compares the two exported models byte by byte,
and draws the loss of each life and where its time went.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from numina_finetune.errors import ExitCode
from numina_finetune.quickstart import DEVICES, command_line, quickstart_config
from numina_finetune.train.metrics import Metrics, Record, parse_metrics, productive_seconds
from numina_finetune.train.plots import smooth

SAVES = 6
"""Checkpoints by count, evenly spaced, in either run."""
ENDS = ((0.27, signal.SIGTERM), (0.57, signal.SIGKILL), (0.77, signal.SIGTERM))
"""The share of all steps after which a life is ended, and how."""
NAMES = {signal.SIGTERM: "notice (SIGTERM)", signal.SIGKILL: "no notice (SIGKILL)"}
COLORS = ("#3b82c4", "#e09f3e", "#4a9d6e", "#8e5ea2")
LOST, STARTING, ENDING = "#d1495b", "#c9c9c9", "#7d7d7d"


@dataclass(frozen=True)
class Life:
    """What one process did; times are Unix times."""

    began: float
    ended: float
    made: Sequence[Record]
    """Its steps, also those that another life made again."""
    end: signal.Signals | None
    """What ended it; None = it came to its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="folder for the two runs; a temporary one if unset")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        straight, taken = folder / "straight", folder / "taken"
        _live(straight, arguments.steps, None)
        ends = [(round(share * arguments.steps), how) for share, how in ENDS]
        lives = [_live(taken, arguments.steps, end) for end in [*ends, None]]
        weights = [(run / "tiny-qwen3" / "model" / "model.safetensors").read_bytes() for run in (straight, taken)]
        same = weights[0] == weights[1]
        print(f"the two models are {'the same, byte for byte' if same else 'DIFFERENT'}")
        _draw(arguments.picture, lives, _metrics(straight), same=same)
    sys.exit(0 if same else 1)


def _live(folder: Path, steps: int, end: tuple[int, signal.Signals] | None) -> Life:
    """Run the training's command in ``folder`` once, ended by a signal after a step or by itself.

    Raises:
        RuntimeError: it ended otherwise than it should.
    """
    config = replace(
        quickstart_config(folder, steps), save_steps=steps // SAVES, cache_dir=str(folder.parent / "cache")
    )
    environment = {name: value for name, value in os.environ.items() if name != "USE_TORCH_XLA"}
    environment |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(DEVICES)}
    before = {record["step"]: record for record in _metrics(folder).steps}
    began = time.time()
    process = subprocess.Popen([sys.executable, "-m", "numina_finetune", *command_line(config)], env=environment)
    while end and process.poll() is None and len(_metrics(folder).steps) < end[0]:
        time.sleep(0.1)
    if end:
        process.send_signal(end[1])
    code, due = process.wait(), _due(end)
    if code != due:
        raise RuntimeError(f"a life ended with exit code {code}, not {due}")
    made = [record for record in _metrics(folder).steps if before.get(record["step"]) != record]
    return Life(began, time.time(), made, end[1] if end else None)


def _due(end: tuple[int, signal.Signals] | None) -> int:
    """The exit code of a life, as subprocess tells it."""
    if end is None:
        return ExitCode.DONE
    return ExitCode.PREEMPTED if end[1] == signal.SIGTERM else -int(end[1])


def _metrics(folder: Path) -> Metrics:
    path = folder / "tiny-qwen3" / "metrics.jsonl"
    return parse_metrics(path.read_text(encoding="utf-8")) if path.is_file() else Metrics()


def _draw(picture: Path, lives: Sequence[Life], straight: Metrics, *, same: bool) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text as outlines and a fixed salt: the same file wherever it is drawn.
    with rc_context({"svg.hashsalt": "numina", "font.size": 10}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[3, 2])
        _draw_loss(above, lives, straight, same=same)
        _draw_time(below, lives)
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, metadata={"Date": None})


def _draw_loss(axes: Any, lives: Sequence[Life], straight: Metrics, *, same: bool) -> None:
    """Each life's losses, the steps that were made again, and the course of the run that was left alone."""
    for number, (life, following) in enumerate(zip(lives, [*lives[1:], None], strict=True)):
        kept = following.made[0]["step"] if following else np.inf
        for records, color, width in (
            ([record for record in life.made if record["step"] < kept], COLORS[number], 1.2),
            # Wide, since the line of the life that makes them again runs along it.
            ([record for record in life.made if record["step"] >= kept], LOST, 5.0),
        ):
            axes.plot(_of(records, "step"), _of(records, "loss"), color=color, linewidth=width, alpha=0.6)
        if life.end:
            axes.axvline(life.made[-1]["step"], color="#555555", linestyle=":", linewidth=1)
            axes.annotate(
                NAMES[life.end],
                (life.made[-1]["step"], 0.97),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
            )
    label = "the same run, never stopped (smoothed)"
    axes.plot(_of(straight.steps, "step"), smooth(np.array(_of(straight.steps, "loss"))), "k", lw=1.4, label=label)
    axes.plot([], [], color=LOST, linewidth=5, alpha=0.6, label="lost with the machine, made again")
    verdict = "its model is the other's, byte for byte" if same else "its model is NOT the other's"
    axes.set(yscale="log", xlabel="optimizer step", ylabel="training loss (nats)")
    axes.set_title(f"One run in four lives: {verdict}", loc="left")
    axes.set_xlim(0, straight.steps[-1]["step"] + 1)
    axes.legend(loc="lower left", fontsize=9)


def _draw_time(axes: Any, lives: Sequence[Life]) -> None:
    """A bar a life: all that came before its steps, compilation included; its steps; saving or exporting at its end."""
    start = lives[0].began
    for number, life in enumerate(lives):
        last = life.made[-1]["time"]
        first = last - productive_seconds(_of(life.made, "seconds_per_step"))
        for begin, finish, color in (
            (life.began, first, STARTING),
            (first, last, COLORS[number]),
            (last, life.ended, ENDING),
        ):
            axes.barh(number, (finish - begin) / 60, left=(begin - start) / 60, color=color, height=0.7)
    axes.set_yticks(range(len(lives)), [f"life {number + 1}" for number in range(len(lives))])
    axes.invert_yaxis()
    axes.set_xlabel("minutes since the first start")
    for color, label in ((STARTING, "start, load, compile"), (ENDING, "last save, export")):
        axes.barh(0, 0, color=color, label=label)
    axes.legend(loc="lower left", fontsize=9, title="a life's colour: its steps", title_fontsize=9)


def _of(records: Sequence[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records]


if __name__ == "__main__":
    main()
