"""``run.yaml``: what a run was when it began, and the refusal to continue it as anything else."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from numina_finetune import storage
from numina_finetune.checkpoint.manager import committed
from numina_finetune.config import RunConfig, flag
from numina_finetune.errors import CheckpointError

RECORD = "run.yaml"
MODEL = "model"


def read_record(run: Path) -> dict[str, Any] | None:
    """The record of the run in ``run``; None where none began, or none got as far as a checkpoint worth protecting.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = run / RECORD
    if not path.is_file() or not committed(run):
        return None
    try:
        record: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {**record, "identity": dict(record["identity"])}
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is damaged or no record of a run ({error!r}): move its folder away") from error


def write_record(
    run: Path, config: RunConfig, *, global_batch: int, data_key: str, tokenizer: str, total_steps: int
) -> None:
    """Write the record of a run's first life."""
    record = {
        "run_id": config.resolved_run_id,
        "identity": config.identity(),
        "global_batch_size": global_batch,
        "total_steps": total_steps,
        "data_key": data_key,
        "tokenizer": tokenizer,
        "config": config.to_mapping(),
        "versions": versions(),
    }
    storage.write_text(run / RECORD, yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def versions() -> dict[str, str]:
    """Of the interpreter and the libraries that decide the numbers."""
    names = ("numina_finetune", "torch", "torch_xla", "transformers", "accelerate", "datasets", "tokenizers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_output(config: RunConfig) -> None:
    """Refuse an output folder that this command may not write into.

    A folder may hold many runs, each under its own ``--run-id``. What is refused is to continue a run with other
    settings, and to begin an unnamed run beside another one: on a machine that comes and goes, a setting changed by
    accident would otherwise throw away what was trained.

    Raises:
        CheckpointError: the folder cannot be used, or holds another run; or its record cannot be read.
    """
    if faults := _output_faults(config):
        raise CheckpointError(faults)


def _output_faults(config: RunConfig) -> list[str]:
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        return [f"--output-dir {folder} is a file: give a folder"]
    if not os.access(_nearest_existing(folder), os.W_OK):
        return [f"--output-dir {folder} cannot be written to: give a folder of your own"]
    own = config.run_dir
    record = read_record(own)
    if record is not None:
        differences = _differences(record["identity"], config.identity())
        return [
            f"--output-dir {folder} holds run {own.name} with {name} {old!r}, this command has {new!r}: "
            "restore it to resume, or give another --run-id or --output-dir"
            for name, old, new in differences
        ]
    if committed(own) and not (own / RECORD).is_file():
        return [f"{own} has checkpoints but no {RECORD}: give another --run-id"]
    if config.run_id:
        return []
    for other in sorted(path.parent for path in folder.glob(f"*/{RECORD}")):
        theirs = read_record(other)
        if theirs is not None:
            differences = _differences(theirs["identity"], config.identity())
            told = "; ".join(f"{name} {old!r}, here {new!r}" for name, old, new in differences)
            return [
                f"--output-dir {folder} holds the checkpoints of another run, {other.name} ({told}): restore its "
                "settings to resume it, or give this one a --run-id or another --output-dir"
            ]
    return []


def resume_faults(record: Mapping[str, Any], *, data_key: str, tokenizer: str) -> None:
    """Refuse a resume on other data or another tokenizer.

    Raises:
        CheckpointError: naming both values.
    """
    faults = []
    for name, now in (("data_key", data_key), ("tokenizer", tokenizer)):
        if record[name] != now:
            what = "training data" if name == "data_key" else "tokenizer"
            faults.append(
                f"the {what} changed since run {record['run_id']} began: {name} was {record[name]}, is {now}: "
                "restore it, or give another --run-id"
            )
    if faults:
        raise CheckpointError(faults)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [("the datasets" if name == "datasets" else flag(name), old.get(name), new.get(name)) for name in names]


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
