"""What a person and a program see of a run: a progress bar, log lines, ``metrics.jsonl``, trackers."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from numina_finetune import storage
from numina_finetune.checkpoint.manager import Saved
from numina_finetune.train.backend import StepMetrics
from numina_finetune.train.place import METRICS
from numina_finetune.train.speed import Chips, Seconds, TokenFlops, utilisation

logger = logging.getLogger(__name__)


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
        flops: TokenFlops,
        chips: Chips,
    ) -> None:
        self._path, self._accelerator = run / METRICS, accelerator
        self._life, self._step, self._total = life, step, total_steps
        self._active = active
        self._flops, self._chips = flops, chips
        self._since = time.monotonic()
        if active:
            _keep_records_up_to(self._path, step)
        terminal = shutil.get_terminal_size()  # tqdm itself draws nothing where the size is said to be 0 x 0
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            ncols=terminal.columns,
            nrows=terminal.lines,
            disable=not (active and sys.stderr.isatty()),
        )

    def advance(self) -> None:
        """One optimizer step was dispatched."""
        self._bar.update(1)

    def log(self, metrics: Sequence[StepMetrics], learning_rates: Sequence[float], spent: Seconds) -> None:
        """Record the steps since the last log line; they have just been read, so the clock is true.

        Args:
            spent: on all of them.
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
        self._write(*records)
        for record in records:
            numbers = {key: value for key, value in record.items() if key not in ("step", "life")}
            self._accelerator.log(numbers, step=record["step"])
        self._show(metrics[-1], learning_rates[-1], speed)

    def log_evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Record the evaluation loss after ``step``."""
        record = {"step": step, "eval_loss": loss, "eval_tokens": tokens, "life": self._life}
        if self._active:
            self._write(record)
            self._accelerator.log({"eval_loss": loss}, step=step)
            self._say(f"step {step}/{self._total}  evaluation loss {loss:.4f} over {tokens} tokens")
        self._since = time.monotonic()

    def log_checkpoint(self, saved: Saved) -> None:
        """Record what a checkpoint cost."""
        if self._active:
            self._write({"step": saved.step, "checkpoint": asdict(saved), "life": self._life})

    def pause_clock(self) -> None:
        """Leave out of the next rate what was not training, such as a save."""
        self._since = time.monotonic()

    def close(self) -> None:
        self._bar.close()

    def _write(self, *records: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def _show(self, metric: StepMetrics, learning_rate: float, speed: Mapping[str, float]) -> None:
        rate, left = speed["tokens_per_second"], speed["seconds_per_step"] * (self._total - self._step)
        used = f"  mfu {speed['mfu']:.1%}" if "mfu" in speed else ""
        dropped = "" if metric.dropped_share is None else f"  dropped {metric.dropped_share:.2%}"
        self._bar.set_postfix(loss=f"{metric.loss:.4f}", tokens_s=f"{rate:.0f}")
        if self._bar.disable:
            self._say(
                f"step {self._step}/{self._total}  loss {metric.loss:.4f}  lr {learning_rate:.2e}  "
                f"{rate:.0f} tokens/s{used}{dropped}  {_clock(left)} left"
            )

    def _say(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)


def _record(
    step: int, metric: StepMetrics, learning_rate: float, speed: Mapping[str, float], life: int
) -> dict[str, Any]:
    return {
        "step": step,
        "loss": metric.loss,
        "learning_rate": learning_rate,
        "grad_norm": metric.grad_norm,
        "supervised_tokens": metric.supervised,
        "tokens": metric.tokens,
        **({} if metric.dropped_share is None else {"dropped_share": metric.dropped_share}),
        **speed,
        "applied": metric.applied,
        "life": life,
    }


def _keep_records_up_to(path: Path, step: int) -> None:
    """Forget what an earlier life did after its last checkpoint: this life makes those steps again.

    The evaluation after the checkpoint's own step is among it: saves come before evaluations.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if record["step"] < step or (record["step"] == step and "eval_loss" not in record):
                kept.append(line + "\n")
        except ValueError:  # a line cut off by a kill
            logger.info("dropped an incomplete line of %s", path)
    storage.write_text(path, "".join(kept))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
