"""``run.yaml``: what a run was when it began, and the refusal to continue it as anything else."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from numina_finetune.checkpoint.reading import Checkpoint, Unsound, checkpoint_at, committed, drop_unsound, of_step
from numina_finetune.config import RunConfig
from numina_finetune.errors import CheckpointError
from numina_finetune.option_fields import flag
from numina_finetune.storage import Damaged, NotFound, Store, open_store
from numina_finetune.train.place import RunPlace
from numina_finetune.train.provenance import git_state, redacted, versions

logger = logging.getLogger(__name__)

RECORD = "run.yaml"
OPTIMIZER_SETTINGS = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")
"""What the optimizer's moments were made with; rates and decay may change under them."""


def read_record(store: Store) -> dict[str, Any] | None:
    """The record of a run; None where none began, or none got as far as a checkpoint worth protecting.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        text = store.read(RECORD)
        if not committed(store):
            return None
        record: dict[str, Any] = yaml.safe_load(text)
        return {**record, "identity": dict(record["identity"])}
    except NotFound:
        return None
    except (Damaged, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{store.address(RECORD)} is damaged or no record of a run ({error!r}): move its folder away"
        ) from error


def write_record(
    store: Store,
    config: RunConfig,
    *,
    global_batch: int,
    data_key: str,
    tokenizer: str,
    base: str | None,
    total_steps: int,
    commit: str | None,
) -> None:
    """Write the record of a run's first life.

    Args:
        config: as the run was asked for.
        commit: of the model on the hub.
    """
    record = {
        "run_id": config.resolved_run_id,
        "identity": config.identity(),
        "global_batch_size": global_batch,
        "total_steps": total_steps,
        "data_key": data_key,
        "tokenizer": tokenizer,
        "base": base,
        "model_commit": commit,
        "config": redacted(config.to_mapping()),
        "versions": versions(),
        "git": git_state(),
    }
    store.write(RECORD, yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode())


def recorded_config(record: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> RunConfig:
    """The configuration of a run, its model at the commit that it began with.

    Args:
        where: the record stands.
        trust_remote_code: whether code that comes with the model may be run here, whatever the run allowed.
    """
    config = RunConfig.from_mapping(record["config"], where)
    return replace(pinned(config, record.get("model_commit")), trust_remote_code=trust_remote_code)


def pinned(config: RunConfig, commit: str | None) -> RunConfig:
    """The configuration under its own name, with the model at a commit: a branch that moves changes no run."""
    if commit is None:
        return config
    return replace(config, model_revision=commit, run_id=config.resolved_run_id)


def check_output(config: RunConfig) -> None:
    """Refuse an output place that this command may not write into.

    A place may hold many runs, each under its own ``--run-id``. What is refused is to continue a run with other
    settings, and to begin an unnamed run beside another one: on a machine that comes and goes, a setting changed by
    accident would otherwise throw away what was trained.

    Raises:
        CheckpointError: the place cannot be used, or holds another run; or its record cannot be read.
    """
    faults = [] if config.output_dir.startswith("gs://") else _folder_faults(Path(config.output_dir).expanduser())
    if faults := faults or _run_faults(config):
        raise CheckpointError(faults)


def _folder_faults(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"--output-dir {folder} is a file: give a folder"]
    if not os.access(_nearest_existing(folder), os.W_OK):
        return [f"--output-dir {folder} cannot be written to: give a folder of your own"]
    return []


def _run_faults(config: RunConfig) -> list[str]:
    place, own = config.output_dir, open_store(config.run_url)
    record = read_record(own)
    if record is not None:
        differences = setting_differences(
            record["identity"], config.identity(), data_may_change=config.allow_data_change
        )
        return [
            f"--output-dir {place} holds run {config.resolved_run_id} with {name} {old!r}, this command has {new!r}: "
            "restore it to resume, or give another --run-id or --output-dir"
            for name, old, new in differences
        ]
    if committed(own) and own.stat(RECORD) is None:
        return [f"{own.url} has checkpoints but no {RECORD}: give another --run-id"]
    if config.run_id:
        return []
    for other in open_store(place).folders():
        theirs = read_record(open_store(f"{place.rstrip('/')}/{other}"))
        if theirs is not None:
            differences = setting_differences(theirs["identity"], config.identity())
            told = "; ".join(f"{name} {old!r}, here {new!r}" for name, old, new in differences)
            return [
                f"--output-dir {place} holds the checkpoints of another run, {other} ({told}): restore its "
                "settings to resume it, or give this one a --run-id or another --output-dir"
            ]
    return []


def resume_faults(
    record: Mapping[str, Any], *, data_key: str, tokenizer: str, base: str | None, data_may_change: bool
) -> None:
    """Refuse a resume on other data, with another tokenizer, or beside other frozen weights.

    Raises:
        CheckpointError: naming both values.
    """
    faults = []
    if record["data_key"] != data_key and not data_may_change:
        faults.append(
            f"the training data changed since run {record['run_id']} began: data_key was {record['data_key']}, is "
            f"{data_key}: restore it, give another --run-id, or go on from the same row position with "
            "--allow-data-change"
        )
    if record["tokenizer"] != tokenizer:
        faults.append(
            f"the tokenizer changed since run {record['run_id']} began: tokenizer was {record['tokenizer']}, is "
            f"{tokenizer}: restore it, or give another --run-id"
        )
    if faults := [*faults, *base_faults(record, base)]:
        raise CheckpointError(faults)


def base_faults(record: Mapping[str, Any], base: str | None) -> list[str]:
    """What is wrong with these frozen weights for the adapters of the run."""
    if record.get("base") == base:
        return []
    name = record["config"]["model_name"]
    return [
        f"the weights of {name}, beside which run {record['run_id']} trains adapters, changed since it began: their "
        f"fingerprint was {record.get('base')}, is {base}: restore them, or give another --run-id"
    ]


def origin_faults(checkpoint: Checkpoint, now: Mapping[str, Any], *, data_may_change: bool) -> None:
    """Refuse to begin from another run's checkpoint that does not fit.

    Args:
        now: what this run's own manifests say.

    Raises:
        CheckpointError: naming both values; or the checkpoint is not sound.
    """
    try:
        then = checkpoint.open().manifest
    except Unsound as error:
        raise CheckpointError(error.faults) from error
    told = {"model": "model", "tokenizer": "tokenizer", "optimizer": "optimizer", "precision": "--precision"}
    told |= {"lora": "LoRA adapters", "base": "frozen weights (their fingerprint)"}
    if not data_may_change:
        told["data_key"] = "training data (data_key)"
    hint = {"data_key": "restore it, or go on from the same row position with --allow-data-change"}
    faults = [
        f"--resume-from-checkpoint {checkpoint.address}: its {what} is {then.get(name)!r}, this run's {now[name]!r}: "
        + hint.get(name, "use that one, or another checkpoint")
        for name, what in told.items()
        if then.get(name) != now[name]
    ]
    if faults:
        raise CheckpointError(faults)


def resume_candidates(config: RunConfig, place: RunPlace, facts: Mapping[str, Any]) -> list[Checkpoint]:
    """What ``--resume-from-checkpoint`` asks for, from the first one on that is whole.

    Raises:
        CheckpointError: it is not there, is damaged, or does not fit.
    """
    wish, own = config.resume_from_checkpoint, committed(place.store)
    if wish == "none":
        if own:
            raise CheckpointError(
                f"--resume-from-checkpoint none, but {place.url} has a checkpoint of step {own[0].step}: "
                "give another --run-id to start anew, or leave the option out to resume"
            )
        return []
    if wish.isdecimal():
        return drop_unsound(of_step(place.store, int(wish)))
    if wish == "auto" or own:
        if wish != "auto":
            logger.info("%s has checkpoints of its own: they count, not --resume-from-checkpoint %s", place.url, wish)
        return drop_unsound(own)
    origin = checkpoint_at(wish)
    origin_faults(origin, facts, data_may_change=config.allow_data_change)
    return [origin]


def facts_of(
    config: RunConfig,
    *,
    data_key: str,
    tokenizer: str,
    base: str | None,
    global_batch: int,
    mesh: Mapping[str, int],
    backend: str,
) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run besides its files."""
    return {
        "run_id": config.resolved_run_id,
        "model": {"name": config.model_name, "revision": config.model_revision},
        "tokenizer": tokenizer,
        "precision": config.precision,
        "lora": config.adapters,
        "base": base,
        "optimizer": {name: getattr(config, name) for name in OPTIMIZER_SETTINGS},
        "data_key": data_key,
        "global_batch_size": global_batch,
        "mesh": dict(mesh),
        "backend": backend,
        "versions": versions(),
    }


def setting_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, data_may_change: bool = False
) -> list[tuple[str, Any, Any]]:
    """Option, old value and new value, of two runs' identities."""
    free = {"datasets", *(f.name for f in fields(RunConfig) if f.metadata.get("group") == "Data")}
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    names = [name for name in names if not (data_may_change and name in free)]
    return [("the datasets" if name == "datasets" else flag(name), old.get(name), new.get(name)) for name in names]


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
