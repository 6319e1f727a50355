"""The training loop."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from numina_finetune.checkpoint.manager import CheckpointManager
from numina_finetune.checkpoint.preemption import StopNotice
from numina_finetune.checkpoint.progress import Progress
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import Batch, Loader
from numina_finetune.train.accuracy import MeasureAccuracy
from numina_finetune.train.backend import Backend, DeviceBatch, DeviceMetrics, StepMetrics
from numina_finetune.train.batch import BatchPlan
from numina_finetune.train.optim import learning_rate_at
from numina_finetune.train.profiling import ProfiledSteps
from numina_finetune.train.report import Report
from numina_finetune.train.skipped import SkippedSteps
from numina_finetune.train.speed import Seconds

logger = logging.getLogger(__name__)

_EVALUATED = ("eval_dataset_name", "eval_split", "validation_size", "eval_samples", "eval_task", "eval_max_new_tokens")
"""Options that say what an evaluation measures."""


@dataclass(frozen=True)
class Plan:
    """What this life of the run has to do."""

    batch: BatchPlan
    total_steps: int
    total_rows: int | None
    """Rows from this one on are empty; None where ``--max-steps`` sets the end."""


class Trainer:
    """One life of a run, from its newest checkpoint to its end or to a notice."""

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        plan: Plan,
        train_rows: Loader,
        eval_rows: Loader | None,
        *,
        progress: Progress,
        checkpoints: CheckpointManager,
        report: Report,
        notice: StopNotice,
        measure: MeasureAccuracy | None = None,
    ) -> None:
        self._config, self._backend, self._plan = config, backend, plan
        self._train_rows, self._eval_rows, self._measure = train_rows, eval_rows, measure
        self._progress, self._checkpoints, self._report, self._notice = progress, checkpoints, report, notice
        self._saved_step, self._saved_at = progress.step, time.monotonic()
        self._save_put_off = False
        self._pending: list[tuple[DeviceMetrics, float]] = []
        self._skipped = SkippedSteps()
        self._spent = Seconds()
        self._profile = ProfiledSteps(config, backend)
        self._eval_key = evaluation_key(config)

    def run(self) -> bool:
        """Train until the last step (True) or until any process is asked to stop (False); saved either way."""
        # A life that ended between its last save and the evaluation leaves it to the next one.
        if self._evaluation_due() and not self._is_evaluated() and not self._evaluate():
            return self._stop()
        while self._progress.step < self._plan.total_steps:
            if self._stop_wanted():
                return self._stop()
            self._train_step()
            if self._progress.step % self._config.logging_steps == 0:
                self._log()
            if self._save_due():
                self._save()
            if self._evaluation_due() and not self._evaluate():
                return self._stop()
        self._profile.close()
        self._checkpoints.finish()
        self._report_saves()
        return True

    def _stop(self) -> bool:
        """Save, as any process was asked to stop."""
        self._notice.follow(self._backend.processes.gather(self._notice.told))
        self._profile.close()
        self._log()
        self._leave_streak()
        self._save(wait=True)
        return False

    def _stop_wanted(self) -> bool:
        return self._backend.processes.any(self._notice.wanted)

    def _leave_streak(self) -> None:
        """Go back to the end of the last step that was not skipped, whose state is the present one: the next attempt
        makes the skipped steps again, and a streak that goes on is as long as it would have been.
        """
        self._progress.step -= self._skipped.streak
        self._progress.rows -= self._skipped.streak * self._plan.batch.global_batch
        self._progress.tokens -= sum(self._skipped.tokens)
        self._skipped = SkippedSteps()

    def _save_due(self) -> bool:
        step, config = self._progress.step, self._config
        if step == self._plan.total_steps or (config.save_steps and step % config.save_steps == 0):
            return True
        if self._save_put_off:
            return True
        if not config.save_minutes:
            return False
        return self._backend.processes.any(time.monotonic() - self._saved_at >= 60 * config.save_minutes)

    def _evaluation_due(self) -> bool:
        step, every = self._progress.step, self._config.eval_steps
        return step > 0 and (step == self._plan.total_steps or (every > 0 and step % every == 0))

    def _train_step(self) -> None:
        learning_rate = learning_rate_at(self._progress.step, self._plan.total_steps, self._config)
        self._profile.before(self._progress.step + 1)
        begun = time.monotonic()
        batches = [self._backend.put_batch(rows) for rows in self._micro_batches()]
        sent = time.monotonic()
        self._pending.append((self._backend.step(batches, learning_rate), learning_rate))
        self._spent.input += sent - begun
        self._spent.dispatch += time.monotonic() - sent
        self._progress.step += 1
        self._profile.after(self._progress.step)
        self._progress.rows += self._plan.batch.global_batch
        self._report.advance()

    def _micro_batches(self) -> Iterator[Batch]:
        """This process's part of each micro-batch of the next optimizer step."""
        plan = self._plan.batch
        for micro_batch in range(plan.accumulation):
            first = self._progress.rows + micro_batch * plan.rows_per_micro_batch
            yield self._share(self._train_rows, first, plan.rows_per_micro_batch, self._plan.total_rows)

    def _share(self, rows: Loader, first: int, count: int, end: int | None) -> Batch:
        own = count * self._backend.replicas_per_process // self._backend.data_parallel_size
        return rows.batch(first + own * self._backend.process_index, own, end)

    def _log(self) -> None:
        """Read the metrics since the last time: the one place where the loop waits for the device."""
        if not self._pending:
            return
        begun = time.monotonic()
        metrics = self._backend.read([device for device, _ in self._pending])
        self._spent.wait += time.monotonic() - begun
        self._progress.tokens += sum(metric.tokens for metric in metrics)
        rates = [rate for _, rate in self._pending]
        self._report.log(metrics, rates, self._spent, rows=self._progress.rows)
        self._spent = Seconds()
        self._pending.clear()
        self._watch(metrics)

    def _watch(self, metrics: Sequence[StepMetrics]) -> None:
        """Look for skipped steps among those just read, and for weights that are not finite."""
        for step, metric in enumerate(metrics, self._progress.step - len(metrics) + 1):
            begins = not self._skipped.streak
            self._skipped.take(step, metric, self._backend.nonfinite, self._saved)
            if self._skipped.streak and begins and not self._stop_wanted():
                self._report.name_row(step, self._infinite_row(step))

    def _infinite_row(self, step: int) -> int | None:
        """The first row of a step whose loss alone is not finite; None where no single row's is."""
        first, rows = (step - 1) * self._plan.batch.global_batch, self._plan.batch.global_batch
        if math.isfinite(self._loss_of(first, first + rows)):
            return None
        while rows > 1:
            rows -= (half := rows // 2)
            if math.isfinite(self._loss_of(first, first + rows)):
                first, rows = first + rows, half
        return first

    def _loss_of(self, first: int, end: int) -> float:
        """Summed loss of training rows, in batches of the training shape."""
        size = self._plan.batch.rows_per_micro_batch
        end = end if self._plan.total_rows is None else min(end, self._plan.total_rows)
        shares = (self._share(self._train_rows, row, size, end) for row in range(first, end, size))
        return self._backend.evaluate(self._backend.put_batch(share) for share in shares)[0]

    def _save(self, *, wait: bool = False) -> None:
        """Save what is not saved yet; within a streak of skipped steps, only once it has ended."""
        self._log()
        self._save_put_off = bool(self._skipped.streak)
        if self._save_put_off and self._progress.step == self._plan.total_steps:
            self._end_streak()
        if self._save_put_off:
            return
        if self._saved_step == self._progress.step:
            if wait:
                self._checkpoints.finish()
        elif self._checkpoints.save(self._progress.step, wait=wait):
            self._saved_step, self._saved_at = self._progress.step, time.monotonic()
        self._report_saves()
        self._report.pause_clock()

    def _end_streak(self) -> None:
        """No step is left to end the streak: the rows before it tell whether the model or the data is at fault."""
        last = self._progress.rows - self._skipped.streak * self._plan.batch.global_batch
        before = self._loss_of(last - self._plan.batch.rows_per_micro_batch, last) if last > 0 else math.nan
        if not math.isfinite(before):
            raise self._skipped.give_up(self._progress.step, self._saved())
        self._skipped, self._save_put_off = SkippedSteps(), False

    def _saved(self) -> int:
        """Step of the newest checkpoint, once none is on its way; 0 = there is none."""
        self._checkpoints.finish()
        self._report_saves()
        return self._checkpoints.committed_step or 0

    def _report_saves(self) -> None:
        for saved in self._checkpoints.drain():
            self._report.log_checkpoint(saved)

    def _is_evaluated(self) -> bool:
        """Whether an earlier life evaluated this very state; what it found is then taken over."""
        found = self._backend.processes.broadcast(self._report.evaluation_at(self._progress.step, self._eval_key))
        if found is None:
            return False
        self._checkpoints.note_evaluation(self._progress.step, found.get("eval_loss"), found.get("eval_accuracy"))
        return True

    def _evaluate(self) -> bool:
        """The loss and the accuracy, as far as there is something to measure; False if told to stop on the way."""
        if self._eval_rows is None and self._measure is None:
            return True
        self._save()  # an evaluation may take longer than a machine leaves
        figures: dict[str, float] = {}
        said: list[str] = []
        loss, accuracy = None, None
        if self._eval_rows is not None:
            found = self._evaluation_loss(self._eval_rows)
            if found is None:
                return False
            loss, tokens = found
            figures |= {"eval_loss": loss, "eval_tokens": tokens}
            said.append(f"evaluation loss {loss:.4f} over {tokens} tokens")
        if self._measure is not None:
            accuracy = self._measure(self._stop_wanted)
            if accuracy is None:
                return False
            figures |= accuracy.figures
            said.append(f"{accuracy}")
        self._report.log_evaluation(self._progress.step, figures, "  ".join(said), self._eval_key)
        self._checkpoints.note_evaluation(self._progress.step, loss, accuracy.share if accuracy else None)
        return True

    def _evaluation_loss(self, evaluated: Loader) -> tuple[float, int] | None:
        """Mean loss over the whole evaluation set, in rows of the training shape, and its supervised tokens; None if
        told to stop on the way.
        """
        rows, total = self._plan.batch.rows_per_micro_batch, evaluated.rows_per_epoch
        given = 0

        def batches() -> Iterator[DeviceBatch]:
            nonlocal given
            while given < total and not self._stop_wanted():
                yield self._backend.put_batch(self._share(evaluated, given, rows, total))
                given += rows

        loss, tokens = self._backend.evaluate(batches())
        return (loss / max(tokens, 1), tokens) if given >= total else None


def evaluation_key(config: RunConfig) -> str:
    """The same for evaluations of one state that measure the same."""
    return hashlib.sha256(json.dumps([getattr(config, name) for name in _EVALUATED]).encode()).hexdigest()[:10]
