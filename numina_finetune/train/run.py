"""One life of a run, from the command to the outcome: check, prepare, train, export."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from numina_finetune import launch, storage
from numina_finetune.checkpoint.attempts import ATTEMPTS, Attempt, open_attempt
from numina_finetune.checkpoint.manager import Checkpoint, CheckpointManager, committed, newest_sound
from numina_finetune.checkpoint.preemption import StopNotice
from numina_finetune.checkpoint.progress import Progress
from numina_finetune.checkpoint.state import STATE_FOLDER, attach
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data.dataset import build_index, tokenizer_hash
from numina_finetune.data.loader import Loader
from numina_finetune.data.prepare import IndexOptions
from numina_finetune.data.sources import evaluation_source, preflight
from numina_finetune.data.token_index import TokenIndex, cap_samples, split_validation
from numina_finetune.errors import CheckpointError, ConfigError, ExitCode, UserError
from numina_finetune.mesh import parse_mesh
from numina_finetune.models.builtin import BUILTIN
from numina_finetune.models.card import model_card
from numina_finetune.models.export import export_model
from numina_finetune.models.hub import resolve_name
from numina_finetune.models.load import load_config, load_model
from numina_finetune.models.precision import EXPORT_DTYPES
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.train.backend import Backend
from numina_finetune.train.batch import plan_batch, plan_steps
from numina_finetune.train.record import (
    MODEL,
    check_output,
    read_record,
    resume_faults,
    versions,
    write_record,
)
from numina_finetune.train.report import Report
from numina_finetune.train.trainer import Plan, Trainer

logger = logging.getLogger(__name__)

MakeBackend = Callable[[RunConfig], Backend]


@dataclass(frozen=True)
class Data:
    """Rows to train on, and perhaps to evaluate on."""

    index: TokenIndex
    train: Loader
    evaluation: Loader | None


def check(config: RunConfig, backend: str) -> None:
    """Everything that can be seen to be wrong before a model is loaded.

    Raises:
        ConfigError: all of it at once.
    """
    faults = [*config.faults(), *launch.faults(backend), *preflight(config.datasets, config)]
    devices = launch.device_count(backend)
    if devices is not None:
        faults += _problems(lambda: parse_mesh(config.mesh, devices))
    if config.model_name:
        faults += _problems(lambda: load_config(config, load_tokenizer(config)))
    if config.output_dir and not config.output_dir.startswith("gs://"):
        faults += _problems(lambda: check_output(config))
    if faults:
        raise ConfigError(faults)


def train(config: RunConfig, make_backend: MakeBackend, notice: StopNotice) -> ExitCode:
    """Run or resume; what became of it is also written to ``attempts/{n}/outcome.json``."""
    backend = make_backend(config)
    _say(backend, backend.device_description)
    if config.dry_run:
        data, plan = _prepare(config, backend, load_tokenizer(config), None)
        _say(backend, f"dry run: {_describe(data, plan)}")
        return ExitCode.DONE
    run = config.run_dir
    number = backend.processes.broadcast(open_attempt(run).number if backend.process_index == 0 else None)
    attempt = Attempt(number, run / ATTEMPTS / str(number), backend.process_index)
    progress = Progress()
    try:
        finished = _live(config, backend, run, attempt, progress, notice)
    except BaseException as error:
        kind = {UserError: "configuration", KeyboardInterrupt: "stopped"}
        name = next((name for cls, name in kind.items() if isinstance(error, cls)), "crashed")
        attempt.finish(name, step=progress.step, reason="".join(traceback.format_exception_only(error)).strip())
        raise
    return _outcome(attempt, progress, notice, finished)


def _live(
    config: RunConfig, backend: Backend, run: Path, attempt: Attempt, progress: Progress, notice: StopNotice
) -> bool:
    """Resume, train, export; whether the run is finished."""
    tokenizer = load_tokenizer(config)
    record = backend.processes.broadcast(read_record(run))
    data, plan = _prepare(config, backend, tokenizer, record)
    _say(backend, f"{run}: {_describe(data, plan)}")
    _claim(config, backend, run, record, data, plan, tokenizer)
    checkpoint = backend.processes.broadcast(_checkpoint_to_resume(config, run) if backend.process_index == 0 else None)
    if checkpoint is not None and checkpoint.step >= plan.total_steps and (run / MODEL).is_dir():
        progress.step = checkpoint.step
        _say(backend, f"nothing to do: the run has made all {plan.total_steps} steps; the model is in {run / MODEL}")
        return True

    backend.place(load_model(config, tokenizer, weights=checkpoint is None), config)
    attach(backend, progress)
    facts = {
        "mesh": backend.mesh_shape.by_axis,
        "backend": backend.name,
        "data_key": data.index.data_key,
        "global_batch_size": plan.batch.global_batch,
        "versions": versions(),
    }
    checkpoints = CheckpointManager(run, attempt.number, backend, keep=config.save_total_limit, facts=facts)
    if checkpoint is not None:
        checkpoints.load(checkpoint)
        _say(backend, f"resumed from the checkpoint of step {checkpoint.step}/{plan.total_steps}")
    if config.trackers:
        backend.accelerator.init_trackers("numina_finetune", config=_flat(config))
    report = Report(
        run,
        backend.accelerator,
        life=attempt.number,
        step=progress.step,
        total_steps=plan.total_steps,
        active=backend.process_index == 0,
    )
    trainer = Trainer(
        config,
        backend,
        plan,
        data.train,
        data.evaluation,
        progress=progress,
        checkpoints=checkpoints,
        report=report,
        notice=notice,
    )
    try:
        finished = trainer.run()
    finally:
        report.close()
        if config.trackers:
            backend.accelerator.end_training()
    _say(backend, backend.summary())
    if finished:
        _export(config, backend, run, progress, tokenizer, data)
    return finished


def _prepare(
    config: RunConfig, backend: Backend, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any] | None
) -> tuple[Data, Plan]:
    """The tokenised data, and what is to be done with it on this mesh."""
    data = _load_data(config, tokenizer)
    batch = plan_batch(config, backend.data_parallel_size, record["global_batch_size"] if record else None)
    if record and batch.accumulation != config.gradient_accumulation_steps and config.global_batch_size is None:
        _say(backend, f"accumulation is {batch.accumulation} here, to keep the run's {batch.global_batch} rows a step")
    rows = data.train.rows_for_epochs(config.num_train_epochs)
    total_rows = None if config.max_steps > 0 else rows
    return data, Plan(batch, plan_steps(config, rows, batch.global_batch), total_rows)


def _load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    index = _index(config, config.datasets, tokenizer)
    index = cap_samples(index, [source.max_samples for source in config.datasets], config.seed)
    held_out: TokenIndex | None = None
    if config.validation_size:
        index, held_out = split_validation(index, config.validation_size, config.seed)
    elif source := evaluation_source(config):
        # the benchmarks are what the run is evaluated on: they are looked for in the training data only
        held_out = _index(replace(config, against=(), decontaminate=False), [source], tokenizer)

    def loader(part: TokenIndex, weights: list[float] | None, shuffle: bool) -> Loader:
        return Loader(
            part,
            seq_len=config.max_seq_length,
            packing=config.packing,
            seed=config.seed,
            pad_id=int(tokenizer.pad_token_id),
            weights=weights,
            shuffle=shuffle,
        )

    weights = [source.weight for source in config.datasets if source.weight is not None]
    evaluation = loader(held_out, None, False) if held_out is not None else None
    return Data(index, loader(index, weights or None, True), evaluation)


def _index(config: RunConfig, sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerBase) -> TokenIndex:
    return build_index(
        sources,
        tokenizer,
        IndexOptions.of(config),
        config.cache_dir,
        workers=config.preprocessing_num_workers,
        streaming=config.streaming,
    )


def _claim(
    config: RunConfig,
    backend: Backend,
    run: Path,
    record: Mapping[str, Any] | None,
    data: Data,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the run's record in its first life; in a later one, refuse what does not match it."""
    fingerprint = tokenizer_hash(tokenizer)
    if record is not None:
        resume_faults(record, data_key=data.index.data_key, tokenizer=fingerprint)
    elif backend.process_index == 0:
        storage.write_json(run / "data_report.json", data.index.report)
        write_record(
            run,
            config,
            global_batch=plan.batch.global_batch,
            data_key=data.index.data_key,
            tokenizer=fingerprint,
            total_steps=plan.total_steps,
        )
    backend.processes.barrier()


def _checkpoint_to_resume(config: RunConfig, run: Path) -> Checkpoint | None:
    wish = config.resume_from_checkpoint
    if wish == "none":
        if found := committed(run):
            raise CheckpointError(
                f"--resume-from-checkpoint none, but {run} has a checkpoint of step {found[0].step}: "
                "give another --run-id to start anew, or leave the option out to resume"
            )
        return None
    return newest_sound(run, None if wish == "auto" else int(wish))


def _export(
    config: RunConfig, backend: Backend, run: Path, progress: Progress, tokenizer: PreTrainedTokenizerBase, data: Data
) -> None:
    """The final checkpoint as a plain Hugging Face folder."""
    if backend.process_index == 0:
        model_config = load_config(config, tokenizer)
        export_model(
            committed(run)[0].folder / STATE_FOLDER,
            run / MODEL,
            config=model_config,
            tokenizer=tokenizer,
            generation=_generation_config(config, model_config),
            card=model_card(
                config, run_id=run.name, steps=progress.step, tokens=progress.tokens, data=data.index.report
            ),
            dtype=EXPORT_DTYPES[config.precision],
        )
        _say(backend, f"done: {progress.step} steps, {progress.tokens} tokens; the model is in {run / MODEL}")
    backend.processes.barrier()


def _generation_config(config: RunConfig, model_config: PretrainedConfig) -> GenerationConfig:
    name = resolve_name(config.model_name)
    if name not in BUILTIN:
        try:
            return GenerationConfig.from_pretrained(name, revision=config.model_revision)
        except OSError:
            logger.info("%s has no generation configuration: derived from its model configuration", name)
    return GenerationConfig.from_model_config(model_config)


def _outcome(attempt: Attempt, progress: Progress, notice: StopNotice, finished: bool) -> ExitCode:
    if finished:
        attempt.finish("done", step=progress.step, reason="all steps made, model exported")
        return ExitCode.DONE
    if notice.signal == signal.SIGINT:
        attempt.finish("stopped", step=progress.step, reason="SIGINT")
        return ExitCode.STOPPED
    reason = notice.signal.name if notice.signal else "another process was asked to stop"
    attempt.finish("preempted", step=progress.step, reason=reason)
    return ExitCode.PREEMPTED


def _describe(data: Data, plan: Plan) -> str:
    report, batch = data.index.report, plan.batch
    dropped = sum(entry["count"] for source in report["sources"] for entry in source["dropped"].values())
    return (
        f"{len(data.index)} samples ({dropped} rows dropped), {data.train.rows_per_epoch} packed rows an epoch; "
        f"{plan.total_steps} optimizer steps of {batch.global_batch} rows "
        f"({batch.accumulation} x {batch.rows_per_micro_batch})"
    )


def _flat(config: RunConfig) -> dict[str, Any]:
    """The configuration as trackers take it: plain values only."""
    mapping = config.to_mapping()
    mapping["datasets"] = ", ".join(source.name for source in config.datasets)
    return {name: value for name, value in mapping.items() if isinstance(value, bool | int | float | str)}


def _problems(attempt: Callable[[], object]) -> list[str]:
    """The problems of the UserError that ``attempt`` raises; other errors are left for when they matter."""
    try:
        attempt()
    except UserError as error:
        return error.problems
    return []


def _say(backend: Backend, line: str) -> None:
    if backend.process_index == 0:
        print(line, flush=True)
