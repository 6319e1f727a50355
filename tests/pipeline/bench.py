"""A pipeline's file, its place, and the command that runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numina_finetune.pipeline.command import RunOptions, load
from numina_finetune.pipeline.plan import Step
from numina_finetune.pipeline.records import StepRecord, read_step
from tests.conftest import ROOT, environment

TINY = """
name: tiny
steps:
  - name: data
    kind: prepare
    options: &data
      model_name: tiny-qwen3
      datasets: [{name: "synthetic-gsm8k[test]", format: gsm8k}]
      max_seq_length: 128
  - name: cot
    kind: train
    options:
      <<: *data
      cache_dir: ${data.cache}
      per_device_train_batch_size: 1
      backend: native
      max_steps: 3
      save_steps: 2
      metadata_url: none
  - name: export
    kind: export
    options: {run: "${cot.run}", dtype: bf16}
"""
"""Three steps of seconds."""
DEADLINE = 600.0
"""Seconds after which what must happen counts as never happening."""


@dataclass(frozen=True)
class Pipeline:
    """One pipeline in one place."""

    file: Path
    output_dir: str
    env: Mapping[str, str] = field(default_factory=environment)

    @property
    def words(self) -> list[str]:
        return ["run", str(self.file), "--output-dir", self.output_dir]

    @property
    def steps(self) -> dict[str, Step]:
        faults: list[str] = []
        _, steps = load(RunOptions(str(self.file), self.output_dir), faults)
        assert faults == []
        return {step.name: step for step in steps}

    def records(self) -> dict[str, StepRecord]:
        return {name: read_step(step) for name, step in self.steps.items()}

    def folder(self, name: str) -> Path:
        return Path(self.steps[name].location.url)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Of the steps that a training has on record, in the order in which they were made."""
        lines = (self.folder(name) / "metrics.jsonl").read_text("utf-8").splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    def start(self, *more: str, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launcher, "-m", "numina_finetune", *self.words, *more],
            cwd=ROOT,
            env=dict(self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for what must happen while the process lives."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and all below it, at once: what a machine that vanishes does."""
    pids = [process.pid, *_below(process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def _below(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text("utf-8").split():
            yield int(child)
            yield from _below(int(child))
