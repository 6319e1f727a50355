"""What a person and a program see of a run: progress on a terminal or log lines, ``metrics.jsonl``, trackers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from numina_finetune import storage
from numina_finetune.checkpoint.manager import Saved
from numina_finetune.train.backend import StepMetrics
from numina_finetune.train.curves import PREVIEW, Curves, skipped_line
from numina_finetune.train.display import OPTIONAL_FIGURES, Display, clock
from numina_finetune.train.metrics import Record, life_of, parse_metrics, productive_seconds
from numina_finetune.train.place import METRICS
from numina_finetune.train.speed import Chips, Seconds, TokenFlops, utilisation

logger = logging.getLogger(__name__)


EVALUATION_KEY = "eval_key"
"""Of an evaluation's record: what was measured."""


class Report:
    """Process 0's account of the run; silent elsewhere."""

    def __init__(
        self,
        run: Path,
        accelerator: Accelerator,
        *,
        life: int,
        step: int,
        total_steps: int,
        active: bool,
        began: float,
        committed: Callable[[], int | None],
        first_step: Callable[[], str | None] = lambda: None,
        flops: TokenFlops,
        chips: Chips,
        rows_per_step: int,
        spike_factor: float,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        """The account of one life.

        Args:
            began: when it did, by the monotonic clock.
            committed: tells the step of the newest checkpoint.
            first_step: is asked after every step for a line on what it took to get to it.
            spike_factor: see :class:`numina_finetune.train.spikes.SpikeWatch`.
            publish: stores ``metrics.jsonl`` in the run's place.
        """
        self._publish, self._evaluations = publish, dict[int, Record]()
        self._path, self._accelerator = run / METRICS, accelerator
        self._life, self._step, self._total = life, step, total_steps
        self._active = active
        self._flops, self._chips = flops, chips
        self._began, self._since, self._committed = began, time.monotonic(), committed
        self._first_step = first_step
        self._step_seconds: list[float] = []
        self._rows_per_step, self._curves = rows_per_step, Curves(rows_per_step, spike_factor)
        self._display = Display(step, total_steps) if active and sys.stdout.isatty() else None
        if active:
            lost = _keep_records_up_to(self._path, step, life)
            if self._path.is_file():
                metrics = parse_metrics(self._path.read_text(encoding="utf-8"))
                self._curves.resume(metrics)
                self._evaluations = {int(record["step"]): record for record in metrics.evaluations}
            if lost:
                self._write(*lost)

    def advance(self) -> None:
        """One optimizer step was dispatched."""
        if (told := self._first_step()) and self._active:
            self._say(told)
        if self._display:
            self._display.advance(self._committed())

    def log(
        self, metrics: Sequence[StepMetrics], learning_rates: Sequence[float], spent: Seconds, *, rows: int
    ) -> None:
        """Record the steps since the last log line; they have just been read, so the clock is true.

        Args:
            spent: on all of them.
            rows: that the run has taken by now.
        """
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rate = sum(m.tokens for m in metrics) / seconds
        self._since = now
        count = len(metrics)
        speed = {
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_per_chip": round(rate / self._chips.count, 1),
            **utilisation(self._flops, rate, self._chips),
            "seconds_per_step": round(seconds / count, 4),
            "seconds_input": round(spent.input / count, 4),
            "seconds_dispatch": round(spent.dispatch / count, 4),
            "seconds_wait": round(spent.wait / count, 4),
        }
        records = []
        for metric, learning_rate in zip(metrics, learning_rates, strict=True):
            self._step += 1
            records.append(_record(self._step, metric, learning_rate, speed, self._life))
        if not self._active:
            return
        records, spikes = self._follow(records, rows)
        self._write(*records)
        for record in records:
            left_out = ("step", "life", "time", "rows")
            numbers = {key: value for key, value in record.items() if key not in left_out}
            self._accelerator.log(numbers, step=record["step"])
        self._step_seconds += [speed["seconds_per_step"]] * count
        self._show(records[-1])
        if spikes:
            self._write(*spikes)
        for line in filter(None, (*map(skipped_line, records), *map(self._curves.told, spikes))):
            self._say(line)

    def name_row(self, step: int, row: int | None) -> None:
        """Say which row of a skipped step is the first whose own loss is not finite; None = no single row's is."""
        if self._active and row is not None:
            self._say(
                f"warning: row {row} is the first of step {step} whose own loss is not finite ("
                f"{PREVIEW} --run-rows {row}-{row})"
            )

    def log_evaluation(self, step: int, figures: Mapping[str, float], line: str, key: str) -> None:
        """Record what the evaluation after ``step`` found, durably.

        Args:
            figures: by name, each beginning with ``eval_``.
            line: the same for a person.
            key: what was measured, see :func:`numina_finetune.train.trainer.evaluation_key`.
        """
        if self._active:
            self._write({"step": step, **figures, EVALUATION_KEY: key, "life": self._life})
            self._accelerator.log(dict(figures), step=step)
            self._say(f"step {step}/{self._total}  {line}")
            self._publish()
        self._since = time.monotonic()

    def evaluation_at(self, step: int, key: str) -> Record | None:
        """What earlier lives found of the state after ``step``, where they measured the same."""
        found = self._evaluations.get(step)
        return found if found is not None and found.get(EVALUATION_KEY) == key else None

    def log_checkpoint(self, saved: Saved) -> None:
        """Record what a checkpoint cost."""
        if self._active:
            self._write({"step": saved.step, "checkpoint": asdict(saved), "life": self._life})

    def pause_clock(self) -> None:
        """Leave out of the next rate what was not training, such as a save."""
        self._since = time.monotonic()

    def close(self) -> None:
        if self._display:
            self._display.close()
        if self._curves.summary:
            self._say(self._curves.summary)

    def _follow(self, records: Sequence[Record], rows: int) -> tuple[list[Record], list[Record]]:
        """The steps' records with what follows from those before them, and records of steps that stand out."""
        first = rows - len(records) * self._rows_per_step
        found = [
            self._curves.take(record, first + number * self._rows_per_step) for number, record in enumerate(records)
        ]
        return [record for record, _ in found], [spike for _, spike in found if spike]

    def _write(self, *records: Record) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        if self._display and records:
            self._display.show(records[-1])

    def _show(self, record: Record) -> None:
        rate, left = record["tokens_per_second"], record["seconds_per_step"] * (self._total - self._step)
        more = [form.format(record[name]) for name, form in OPTIONAL_FIGURES.items() if name in record]
        if self._display:
            self._display.goodput = productive_seconds(self._step_seconds) / max(time.monotonic() - self._began, 1e-9)
            return
        self._say(
            f"step {self._step}/{self._total}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            + "  ".join([f"{rate:.0f} tokens/s", *more, f"{clock(left)} left"])
        )

    def _say(self, line: str) -> None:
        print(line, flush=True)  # a display moves out of its way


def _record(step: int, metric: StepMetrics, learning_rate: float, speed: Mapping[str, float], life: int) -> Record:
    return {
        "step": step,
        "loss": metric.loss,
        "learning_rate": learning_rate,
        "grad_norm": metric.grad_norm,
        "weight_norm": metric.weight_norm,
        "supervised_tokens": metric.supervised,
        "tokens": metric.tokens,
        **({} if metric.dropped_share is None else {"dropped_share": metric.dropped_share}),
        **({} if metric.noise is None else {"gradient_signal": metric.signal, "gradient_noise": metric.noise}),
        **speed,
        "applied": metric.applied,
        "time": round(time.time(), 3),
        "life": life,
    }


def _keep_records_up_to(path: Path, step: int, life: int) -> list[Record]:
    """Forget what earlier lives did after their last checkpoint: ``life`` makes those steps again.

    Returns:
        What was lost by it, one record for each earlier life, of which at least the logged steps are known.
    """
    if not path.is_file():
        return []
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            (kept if record["step"] <= step else dropped).append(line + "\n")
        except ValueError:  # a line cut off by a kill
            logger.info("dropped an incomplete line of %s", path)
    storage.write_text(path, "".join(kept))
    lost: dict[int, list[Record]] = {}
    for record in parse_metrics("".join(dropped)).steps:
        lost.setdefault(life_of(record), []).append(record)
    return [
        {
            "step": step,
            "lost": {
                "life": number,
                "steps": len(records),
                "seconds": round(sum(record.get("seconds_per_step", 0.0) for record in records), 3),
                "time": records[-1].get("time"),
            },
            "life": life,
        }
        for number, records in lost.items()
    ]
