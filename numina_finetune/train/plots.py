"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numina_finetune.train.metrics import Record, life_of, parse_metrics

SMOOTHED_SHARE = 0.03
"""The smoothed curve averages over this share of the steps on either side."""


@dataclass(frozen=True)
class Life:
    """The steps that one process made between its start and its end."""

    number: int
    steps: list[int]
    losses: list[float]


def read_lives(metrics_path: Path) -> list[Life]:
    """The training loss by life, from ``metrics.jsonl``: one object a line, those with a ``loss`` being steps.

    A step that a later life made again counts for that life only. A last line cut off by a kill is left out.

    Raises:
        ValueError: the file holds no step.
    """
    made = parse_metrics(metrics_path.read_text(encoding="utf-8")).steps
    if not made:
        raise ValueError(f"{metrics_path} holds no training step")
    return lives_of(made)


def lives_of(records: Sequence[Record]) -> list[Life]:
    """The training loss by life, from the records of steps in their order."""
    lives = []
    for number, group in groupby(records, key=life_of):
        own = list(group)
        lives.append(Life(number, [int(record["step"]) for record in own], [float(record["loss"]) for record in own]))
    return lives


def plot_loss(metrics_path: Path, png_path: Path, *, title: str, marks: Sequence[int] = ()) -> None:
    """Draw the loss of every optimizer step, its smoothed course, and the steps of each life.

    Args:
        metrics_path: a run's ``metrics.jsonl``.
        marks: steps after which the run was preempted, drawn as vertical lines.

    Raises:
        ValueError: the file holds no step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lives = read_lives(metrics_path)
    steps = np.array([step for life in lives for step in life.steps])
    losses = np.array([loss for life in lives for loss in life.losses])
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, life in enumerate(lives):
        label = f"life {life.number}: steps {life.steps[0]} to {life.steps[-1]}"
        axes.plot(life.steps, life.losses, color=f"C{index % 10}", alpha=0.35, linewidth=0.8, label=label)
    axes.plot(steps, smooth(losses), color="black", linewidth=1.6, label="smoothed")
    for index, mark in enumerate(marks):
        axes.axvline(mark, color="crimson", linestyle="--", linewidth=1.2, label="preempted" if index == 0 else None)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per supervised token (nats)", yscale="log")
    axes.set_xlim(0, int(steps[-1]))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(loc="upper right")
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=120)
    pyplot.close(figure)


def smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean that skips non-finite values; the window narrows towards both ends. ``[steps] -> [steps]``."""
    count = len(losses)
    position = np.arange(count)
    widest = max(1, round(SMOOTHED_SHARE * count))
    half = np.clip(np.minimum(position, count - 1 - position), widest // 4, widest)
    finite = np.isfinite(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, losses, 0.0))])
    numbers = np.concatenate([[0], np.cumsum(finite)])
    low, high = np.maximum(position - half, 0), np.minimum(position + half + 1, count)
    present = numbers[high] - numbers[low]
    return np.where(present > 0, (sums[high] - sums[low]) / np.maximum(present, 1), np.nan)
