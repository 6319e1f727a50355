"""Shared by all tests: the test data, where it is there, and training runs in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.storage import Store, open_store
from tests.programs import ROOT, run_module

# Accelerate decides for or against XLA at its import, for as long as the process lives: the test module that imports it
# first would decide for all tests of this process. XLA runs in processes of its own.
os.environ["USE_TORCH_XLA"] = "false"
# A shell lets what it starts in the background ignore Ctrl-C, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = [
    *("--model-name", "tiny-qwen3", "--dataset-name", "synthetic-gsm8k[test]", "--format", "gsm8k"),
    *("--max-seq-length", "128", "--per-device-train-batch-size", "1"),
]
"""A run that takes seconds: the embedded default, cut small. Sizes alone: users run the rest as it is by default."""


def real_data() -> Path:
    """The folder of real test data; skips the test where there is none, fails it where the one named is absent."""
    named = os.environ.get("NUMINA_TEST_DATA")
    folder = Path(named or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        if named:
            pytest.fail(f"NUMINA_TEST_DATA={named} is no folder")
        pytest.skip(f"the real data is not here: set NUMINA_TEST_DATA (looked in {folder})")
    return folder


def environment(*, devices: int | None = None, **extra: str) -> dict[str, str]:
    """A clean environment for a training process: XLA with so many virtual CPU devices, or native."""
    dropped = ("PJRT_DEVICE", "CPU_NUM_DEVICES", "USE_TORCH_XLA", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if devices is not None:
        env |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
    return env | extra


@dataclass(frozen=True)
class Run:
    """A finished training process and the folder it wrote."""

    code: int
    output: str
    folder: Path

    @property
    def run(self) -> Path:
        """The one run's own folder."""
        (record,) = self.folder.glob("*/run.yaml")
        return record.parent

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.metrics if "loss" in record]

    def outcome(self, attempt: int = 1) -> dict[str, Any]:
        path = self.run / "attempts" / str(attempt) / "outcome.json"
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return outcome

    @property
    def checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(marker.parent for marker in self.run.glob("checkpoints/*/*/COMMITTED"))

    @property
    def state(self) -> str:
        """sha256 of the newest checkpoint's weights and moments; an export in bf16 would hide most of what differs."""
        return state_of(open_store(self.run))


def state_of(store: Store) -> str:
    """sha256 of the weights and moments in the newest checkpoint of the run in ``store``."""
    newest = max(name for name in store.names("checkpoints/") if name.endswith("/COMMITTED")).removesuffix("COMMITTED")
    files = sorted(store.names(f"{newest}state/"))
    assert files
    return hashlib.sha256(b"".join(store.read(name) for name in files)).hexdigest()


def command(folder: Path, *arguments: str, cache: Path | None = None) -> list[str]:
    """The training command of a tiny run into ``folder``; later options win over the tiny ones."""
    return [sys.executable, "-m", "numina_finetune", *options_of(folder, *arguments, cache=cache)]


def options_of(folder: Path, *arguments: str, cache: Path | None = None) -> list[str]:
    """What follows ``numina-finetune`` in that command."""
    cached = cache or folder.parent / "cache"
    return [*TINY, "--output-dir", str(folder), "--cache-dir", str(cached), *arguments]


def train(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 600) -> Run:
    """A tiny run, in a process of its own, waited for."""
    return train_as(folder, *options_of(folder, *arguments), env=env, timeout=timeout)


def train_as(folder: Path, *options: str, env: Mapping[str, str] | None = None, timeout: float = 600) -> Run:
    """The command line with these options alone, which put the run into ``folder``, and waited for."""
    result = run_module("numina_finetune", *options, env=env or environment(devices=4), timeout=timeout, together=True)
    return Run(result.returncode, result.stdout, folder)


@pytest.fixture
def native_here() -> Iterator[None]:
    """Lets the command line run inside the tests' own process: what it sets in the environment is undone."""
    before = dict(os.environ)
    for name in ("PJRT_DEVICE", "CPU_NUM_DEVICES", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)
