"""``--dry-run``: on one page, what a command would train, on what, where, and what it would leave.

Nothing is written but the cache of tokens, and no weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from numina_finetune.config import RunConfig
from numina_finetune.data.dataset import tokenizer_hash
from numina_finetune.data.loader import NO_LOSS, Batch, supervised_tokens
from numina_finetune.data.preview import packed_samples, preview
from numina_finetune.data.report import summary_lines
from numina_finetune.errors import ExitCode
from numina_finetune.files import user_cache
from numina_finetune.models.builtin import BUILTIN
from numina_finetune.models.hub import is_staged, weights_at_hand
from numina_finetune.models.load import base_fingerprint, blank_model
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.train.backend import Backend
from numina_finetune.train.estimate import GB, Estimate, estimate
from numina_finetune.train.place import DATA_REPORT, METRICS, RunPlace, exports_of, open_place, pushed_as
from numina_finetune.train.preparation import Data, describe, model_commit, prepare
from numina_finetune.train.profiling import FOLDER as PROFILE
from numina_finetune.train.provenance import redacted
from numina_finetune.train.record import (
    RECORD,
    facts_of,
    pinned,
    read_record,
    resume_candidates,
    resume_faults,
)
from numina_finetune.train.trackers import TENSORBOARD, wandb_project
from numina_finetune.train.trainer import Plan

SAMPLES_SHOWN = 3
"""Of the batch's first row, in full."""
ROWS_SHOWN = 8
PUBLISHED_BYTES = 2
"""Of a parameter on the hub, where models are published in bf16."""
DERIVED, DEFAULT = "derived", "default"


def dry_run(config: RunConfig, make_backend: Callable[[RunConfig], Backend], origins: Mapping[str, str]) -> ExitCode:
    """Prepare the data as the run would, and print the page.

    Args:
        config: checked.
        origins: where each field's value comes from, if not from its default.

    Raises:
        UserError: what would stop the run: of its data, its batch on this mesh, or the run that it would continue.
    """
    backend, place = make_backend(config), open_place(config)
    record = backend.processes.broadcast(read_record(place.store) if backend.process_index == 0 else None)
    asked, commit = config, model_commit(config, record)
    config = pinned(asked, commit)
    tokenizer = load_tokenizer(config)
    data, plan = prepare(config, backend, tokenizer, record)
    if backend.process_index == 0:
        reckoned = estimate(
            blank_model(config, tokenizer), config, config.per_device_train_batch_size, backend.mesh_shape
        )
        page = {
            "configuration": configuration_lines(asked, origins),
            "what would run": [
                f"{config.model_name}, {f'commit {commit}' if commit else 'which has no commits'}",
                f"{backend.device_description}; mesh {backend.mesh_shape}",
                f"{describe(data, plan)}; {config.max_seq_length} tokens a row",
                _beginning(asked, config, place, record, backend, data, plan, tokenizer),
            ],
            "data": _data_lines(config, data),
            "the first batch, targets between ⟦ and ⟧": batch_lines(_first_batch(data, plan), tokenizer),
            "memory of a device": reckoned.lines(config.remat),
            "where everything goes": place_lines(config, place),
            "downloads": _download_lines(config, reckoned),
        }
        print("\n\n".join("\n".join(chain([f"# {title}"], lines)) for title, lines in page.items()), flush=True)
    return ExitCode.DONE


def configuration_lines(config: RunConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """Every option as YAML that ``--config`` takes and that gives the same run; behind each, where it comes from."""
    mapping = redacted(config.to_mapping())
    del mapping["dry_run"]
    told = {name: origins.get(name, DEFAULT) for name in mapping}
    if config.run_id is None:
        mapping["run_id"], told["run_id"] = config.resolved_run_id, DERIVED
    for name, value in mapping.items():
        first, *more = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True).rstrip("\n").split("\n")
        if more and not isinstance(value, list):  # a long text is folded, and a comment would be part of it
            yield f"# {told[name]}:"
            yield first
        else:
            yield f"{first}  # {told[name]}"
        yield from more


def batch_lines(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A batch as the model sees it: of its first row the first samples in full, of the others their sizes."""
    for row in range(min(len(batch.input_ids), ROWS_SHOWN)):
        samples = list(packed_samples(batch, row))
        tokens = sum(len(sample.input_ids) for sample in samples)
        targets = int(np.count_nonzero(batch.labels[row] != NO_LOSS))
        yield (
            f"row {row}: {tokens} tokens in {batch.input_ids.shape[1]} places, {targets} supervised; "
            f"samples packed in it: {len(samples)}"
        )
        if row == 0:
            for number, sample in enumerate(samples[:SAMPLES_SHOWN]):
                yield preview(sample, tokenizer, color=False, number=number)
            if len(samples) > SAMPLES_SHOWN:
                yield f"… and {len(samples) - SAMPLES_SHOWN} samples more in this row"
    if len(batch.input_ids) > ROWS_SHOWN:
        yield f"… and {len(batch.input_ids) - ROWS_SHOWN} rows more"
    yield (
        f"{len(batch.input_ids)} rows in the optimizer step: {np.count_nonzero(batch.segment_ids)} tokens, "
        f"{supervised_tokens(batch)} supervised"
    )


def place_lines(config: RunConfig, place: RunPlace) -> Iterator[str]:
    """The places that the run would write to, and whether something is there."""
    there = "is there already" if place.store.stat(RECORD) else "is new"
    yield f"run: {place.url} ({there}), in it:"
    exports = ", ".join(f"{name}/" for name in exports_of(config))
    yield f"  checkpoints/ (the newest {config.save_total_limit}), {exports} (the export at the end), attempts/"
    yield f"  {RECORD}, {METRICS}, {DATA_REPORT}{f', {PROFILE}/' if config.profiled_steps else ''}"
    if not place.is_local:
        yield f"copies on their way: {place.folder}"
    yield f"token cache: {config.token_cache or user_cache()} (filled by this dry run)"
    for name, model_id in pushed_as(config).items() if config.push_to_hub else ():
        yield f"hub: {name}/ to {model_id}"
    if "tensorboard" in config.trackers:
        yield f"TensorBoard: {place.url}/{TENSORBOARD}"
    if "wandb" in config.trackers:
        yield f"wandb: project {wandb_project(config)}"


def _first_batch(data: Data, plan: Plan) -> Batch:
    return data.train.batch(0, plan.batch.global_batch, plan.total_rows)


def _data_lines(config: RunConfig, data: Data) -> Iterator[str]:
    tokens = int(data.index.lengths.sum())
    yield from summary_lines(data.index.report, data.train.rows_per_epoch, config.max_seq_length, tokens=tokens)
    if data.evaluation is not None:
        yield f"evaluation: {data.evaluation.rows_per_epoch} packed rows"


def _beginning(
    asked: RunConfig,
    config: RunConfig,
    place: RunPlace,
    record: Mapping[str, object] | None,
    backend: Backend,
    data: Data,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """From which step the run would go on; where it could not, the refusal."""
    if config.lora_rank and not _at_hand(config):
        return "the frozen weights are not here yet: whether a resume fits them is seen when they are"
    fingerprint, base, data_key = tokenizer_hash(tokenizer), base_fingerprint(config), data.index.data_key
    if record is not None:
        may_change = config.allow_data_change
        resume_faults(record, data_key=data_key, tokenizer=fingerprint, base=base, data_may_change=may_change)
    facts = facts_of(
        asked,
        data_key=data_key,
        tokenizer=fingerprint,
        base=base,
        global_batch=plan.batch.global_batch,
        mesh=backend.mesh_shape.by_axis,
        backend=backend.name,
    )
    candidates = resume_candidates(config, place, facts)
    if not candidates:
        return f"would begin at step 0 of {plan.total_steps}"
    if candidates[0].step >= plan.total_steps:
        return f"all {plan.total_steps} steps are made: only what the export lacks would be written"
    return f"would resume from step {candidates[0].step} of {plan.total_steps}: {candidates[0].address}"


def _at_hand(config: RunConfig) -> bool:
    name = config.model_name
    return name in BUILTIN or is_staged(name) or weights_at_hand(name, config.model_revision)


def _download_lines(config: RunConfig, reckoned: Estimate) -> Iterator[str]:
    if is_staged(config.model_name):
        yield f"the weights are read from {config.model_name}, each part by the host that needs it"
    elif _at_hand(config):
        yield "none: the model is made or lies here, and the data is prepared"
    else:
        size = (reckoned.trained + reckoned.frozen) * PUBLISHED_BYTES / GB
        yield f"the weights of {config.model_name}: about {size:.3g} GB, if they are in bf16"
