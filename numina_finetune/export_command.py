"""``numina-finetune export``: a plain Hugging Face folder from any checkpoint of a run, on a CPU."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from numina_finetune.checkpoint.progress import Progress
from numina_finetune.checkpoint.reading import Checkpoint, OpenCheckpoint, Unsound, say_damaged
from numina_finetune.checkpoint_commands import of_step, one_run
from numina_finetune.config import RunConfig
from numina_finetune.errors import CheckpointError, ConfigError, ExitCode
from numina_finetune.models.card import model_card
from numina_finetune.models.export import export_adapter, export_model, trained_weights
from numina_finetune.models.load import base_fingerprint, load_config, load_generation_config
from numina_finetune.models.precision import EXPORT_DTYPES
from numina_finetune.models.push import PushOptions, push
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.storage import Damaged, NotFound, Store, open_store
from numina_finetune.train.place import DATA_REPORT, store_model
from numina_finetune.train.record import RECORD, base_faults, read_record, recorded_config

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""What ``--dtype`` takes."""


def run_export(
    url: str,
    step: str,
    output: str,
    dtype: str | None,
    lora_export: str | None = None,
    *,
    trust_remote_code: bool = False,
    hub: PushOptions = PushOptions(),  # noqa: B008
) -> ExitCode:
    """Make a plain Hugging Face folder of a checkpoint's weights, or one of its adapters; whole or not at all.

    Args:
        url: of the run.
        step: a number, or ``newest``.
        output: a folder, or ``gs://bucket/prefix``, with nothing in it.
        dtype: of the weights written; None: the one that the run computes with.
        lora_export: ``merged`` or ``adapter``, of a run with adapters; None: merged.
        trust_remote_code: whether code that the model brings may be run here.
        hub: where else it goes.

    Raises:
        ConfigError, CheckpointError: a wrong value, a place that is in use, or no sound checkpoint.
    """
    store = one_run(url)
    run_id = store.url.rstrip("/").rpartition("/")[2]
    _refuse(step, output, dtype, lora_export, hub.faults(run_id))
    record = read_record(store)
    if record is None:
        raise CheckpointError(f"{store.url} has no {RECORD} or no committed checkpoint: nothing says what to export")
    config = recorded_config(record, store.address(RECORD), trust_remote_code=trust_remote_code)
    if lora_export is not None and not config.lora_rank:
        raise ConfigError(f"--lora-export {lora_export}: {store.url} is a run without adapters: leave the option out")
    if lora_export != "adapter" and (faults := base_faults(record, base_fingerprint(config))):
        raise CheckpointError(faults)
    candidates = of_step(store, None if step == "newest" else int(step))
    with _building_place(output) as folder:
        checkpoint = _export_first_sound(
            candidates,
            config,
            folder,
            DTYPES[dtype] if dtype else EXPORT_DTYPES[config.precision],
            adapter=lora_export == "adapter",
        )
        if output.startswith("gs://"):
            store_model(folder, open_store(output))
        print(f"exported the checkpoint of step {checkpoint.step} to {output}", flush=True)
        if hub.wanted:
            model_id = hub.model_id or run_id
            again = f"the export is whole in {output}: `hf upload {model_id} FOLDER` pushes it"
            print(f"it is on the hub: {push(folder, model_id, private=hub.private, again=again)}")
    return ExitCode.DONE


def _refuse(step: str, output: str, dtype: str | None, lora_export: str | None, faults: list[str]) -> None:
    if step != "newest" and not step.isdecimal():
        faults.append(f"--step {step!r} is unknown: use newest or the number of a step")
    if dtype is not None and dtype not in DTYPES:
        faults.append(f"--dtype {dtype!r} is unknown: use {' or '.join(DTYPES)}")
    if lora_export not in (None, "merged", "adapter"):
        faults.append(f"--lora-export {lora_export!r} is unknown: use merged or adapter, one folder at a time")
    if lora_export == "adapter" and dtype is not None:
        faults.append(f"--dtype {dtype}: adapters are written in the type that they were trained in: leave it out")
    if _is_taken(output):
        faults.append(f"--output {output} is not empty: give another place, or delete what is there")
    if faults:
        raise ConfigError(faults)


def _is_taken(output: str) -> bool:
    if output.startswith("gs://"):
        return bool(open_store(output).names())
    path = Path(output).expanduser()
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


@contextmanager
def _building_place(output: str) -> Iterator[Path]:
    """The folder to write: the output itself, or one that goes once its files are in the bucket."""
    if not output.startswith("gs://"):
        yield Path(output).expanduser().absolute()
        return
    with TemporaryDirectory(prefix="numina-export-") as scratch:
        yield Path(scratch) / "model"


def _export_first_sound(
    candidates: Sequence[Checkpoint], config: RunConfig, folder: Path, dtype: torch.dtype, *, adapter: bool
) -> Checkpoint:
    tokenizer, data = load_tokenizer(config), _data_report(candidates[0].store)
    damage: list[str] = []
    for checkpoint in candidates:
        try:
            _export(checkpoint.open(), config, tokenizer, folder, dtype, data, adapter=adapter)
        except (Unsound, Damaged, NotFound) as error:
            damage.append(f"{error}")
            say_damaged(checkpoint, damage[-1])
        else:
            return checkpoint
    raise CheckpointError(
        [*damage, f"no other checkpoint to export: `checkpoints list {candidates[0].store.url}` shows what is there"]
    )


def _export(
    opened: OpenCheckpoint,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    data: Mapping[str, Any],
    *,
    adapter: bool,
) -> None:
    progress, model_config = _progress(opened), load_config(config, tokenizer)
    card = model_card(
        config,
        run_id=opened.manifest["run_id"],
        steps=progress.step,
        tokens=progress.tokens,
        data=data,
        adapter=adapter,
    )
    if adapter:
        export_adapter(opened.shards(), folder, run=config, config=model_config, tokenizer=tokenizer, card=card)
        return
    export_model(
        trained_weights(opened.shards(), config, tokenizer, dtype),
        folder,
        config=model_config,
        tokenizer=tokenizer,
        generation=load_generation_config(config, model_config),
        card=card,
        dtype=dtype,
    )


def _data_report(store: Store) -> Mapping[str, Any]:
    """What the run's data was; only the model card tells of it, so that an export does not fail without it."""
    try:
        report: dict[str, Any] = json.loads(store.read(DATA_REPORT))
        return report
    except (NotFound, Damaged, ValueError) as error:
        logger.warning("the model card will say nothing about the data: %s", error)
        return {"sources": []}


def _progress(opened: OpenCheckpoint) -> Progress:
    """Where the run stood, out of what Accelerate saved."""
    progress = Progress()
    saved = io.BytesIO(opened.small(0)["custom_checkpoint_0.pkl"])
    progress.load_state_dict(torch.load(saved, weights_only=True))
    return progress
