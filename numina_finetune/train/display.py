"""The progress of a run on a terminal: a bar, the newest figures, and lines that scroll past above them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESHES_PER_SECOND = 2.0
OPTIONAL_FIGURES = {
    "mfu": "mfu {:.1%}",
    "dropped_share": "dropped {:.2%}",
    "noise_scale_rows": "noise scale {:.0f} rows",
}
"""Of a step, where they are known: key of its record, and how it is shown."""


class Display:
    """Two lines at the foot of the terminal: how far it is and how long it takes; loss, speed, checkpoint, goodput."""

    def __init__(self, step: int, total: int, console: Console | None = None) -> None:
        self.goodput: float | None = None
        """Share of this life's time so far that made optimizer steps (`train.metrics.productive_seconds`)."""
        self._step, self._total = step, total
        self._figures: dict[str, Any] = {}
        self._saved: tuple[int, float] | None = None
        self._end: float | None = None
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._live = Live(self, console=console, refresh_per_second=_REFRESHES_PER_SECOND)
        before = sys.stdout
        self._live.start()
        # Handlers keep the stream that was there when they were made: their lines would run into the display.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._moved.append((handler, handler.setStream(sys.stdout)))

    def advance(self, saved: int | None) -> None:
        """One optimizer step was dispatched; ``saved``: the step of the newest checkpoint."""
        self._step += 1
        self._note_checkpoint(saved)

    def show(self, record: Mapping[str, Any]) -> None:
        """Take over what a record of ``metrics.jsonl`` says."""
        self._figures |= record
        if "checkpoint" in record:
            self._note_checkpoint(record["step"])
        if "seconds_per_step" in record:
            self._end = time.monotonic() + record["seconds_per_step"] * (self._total - record["step"])

    def close(self) -> None:
        """Leave the last figures standing."""
        self._live.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved.clear()

    def _note_checkpoint(self, step: int | None) -> None:
        if step is not None and (self._saved is None or self._saved[0] < step):
            self._saved = step, time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = Table.grid(padding=(0, 1))
        left = "" if self._end is None else f"{clock(max(self._end - time.monotonic(), 0))} left"
        bar = ProgressBar(total=self._total, completed=self._step, width=min(40, max(options.max_width // 3, 8)))
        head.add_row(Text(f"step {self._step}/{self._total}", style="bold"), bar, Text(left))
        yield head
        yield Text("  ".join(self._words()), style="dim")

    def _words(self) -> Iterator[str]:
        figures = self._figures
        for name, form in (
            ("loss", "loss {:.4f}"),
            ("learning_rate", "lr {:.2e}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
            *OPTIONAL_FIGURES.items(),
        ):
            if name in figures:
                yield form.format(figures[name])
        if self._saved is None:
            yield "no checkpoint yet"
        else:
            step, since = self._saved
            yield f"checkpoint of step {step}, {clock(time.monotonic() - since)} ago"
        if self.goodput is not None:
            yield f"goodput {self.goodput:.0%}"
        if "eval_loss" in figures:
            yield f"evaluation loss {figures['eval_loss']:.4f}"
        if "eval_accuracy" in figures:
            ends = [figures.get(f"eval_accuracy_{end}") for end in ("lower", "upper")]
            between = "" if None in ends else f" ({ends[0]:.1%} to {ends[1]:.1%})"
            yield f"accuracy {figures['eval_accuracy']:.1%}{between}"


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
