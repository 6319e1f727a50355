"""What is to be run on the workers: files to copy, the set-up, the training command, and the variables it sees."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

SECRETS = "secrets.env"
SETUP, TRAIN = "setup", "train"
MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_PORT")
"""The variables by which the slices of one run find each other."""
_MEGASCALE_PORT = "8080"


@dataclass(frozen=True)
class Job:
    """One run's work, the same on every worker.

    Attributes:
        setup: command that makes the worker ready; quick where that was done before.
        train: command of the training; resumes by itself.
        files: to copy beside them.
        scripts: the same, by name and text.
        secrets: variables that stand in no command line and no log.
    """

    setup: tuple[str, ...]
    train: tuple[str, ...]
    files: tuple[Path, ...] = ()
    scripts: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def write_payload(job: Job, folder: Path, *, setup: str, train: str, environment: Mapping[str, str]) -> Sequence[Path]:
    """Write what a node's workers need into a local folder of one's own; the files to copy.

    Args:
        setup, train: names of the two jobs.
        environment: variables of this node.
    """
    for name, argv in ((setup, job.setup), (train, job.train)):
        spec: dict[str, Any] = {"argv": list(argv), "environment": {**job.environment, **environment}}
        spec["secrets"] = SECRETS if job.secrets else None
        (folder / f"{name}.json").write_text(json.dumps(spec), encoding="utf-8")
    for name, text in job.scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    worker = resources.files("numina_finetune.spot").joinpath("worker.py").read_text(encoding="utf-8")
    (folder / "worker.py").write_text(worker, encoding="utf-8")
    if job.secrets:
        # Born private: between a write and a later chmod others could read.
        descriptor = os.open(folder / SECRETS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(f"{name}={value}\n" for name, value in job.secrets.items())
    return [*sorted(folder.iterdir()), *job.files]


def slice_environment(index: int, slices: int, coordinator: str) -> dict[str, str]:
    """The values of `MEGASCALE` on one slice; none where there is only that one.

    Args:
        coordinator: address of the first worker of the first slice.
    """
    if slices == 1:
        return {}
    values = (f"{coordinator}:{_MEGASCALE_PORT}", str(slices), str(index), _MEGASCALE_PORT)
    return dict(zip(MEGASCALE, values, strict=True))
