"""One life of a run, from the command to the outcome: check, prepare, train, export."""

from __future__ import annotations

import logging
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from numina_finetune import launch
from numina_finetune.checkpoint.attempts import Attempt, open_attempt
from numina_finetune.checkpoint.manager import CheckpointManager
from numina_finetune.checkpoint.preemption import StopNotice
from numina_finetune.checkpoint.progress import Progress
from numina_finetune.checkpoint.reading import Checkpoint, checkpoint_at, committed
from numina_finetune.checkpoint.state import StateDoor
from numina_finetune.checks import backend_faults, config_faults
from numina_finetune.config import RunConfig
from numina_finetune.data.dataset import tokenizer_hash
from numina_finetune.data.sources import preflight
from numina_finetune.errors import ConfigError, ExitCode, PushFailed, TrainingDiverged, UserError
from numina_finetune.mesh import parse_mesh
from numina_finetune.models.card import model_card
from numina_finetune.models.export import export_adapter, export_model, trained_weights
from numina_finetune.models.load import base_fingerprint, load_config, load_generation_config, open_model
from numina_finetune.models.precision import EXPORT_DTYPES
from numina_finetune.models.push import PushOptions, push
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.storage import open_store
from numina_finetune.train.accuracy import MeasureAccuracy
from numina_finetune.train.backend import Backend, say
from numina_finetune.train.place import ADAPTER, DATA_REPORT, METRICS, RunPlace, exports_of, open_place, pushed_as
from numina_finetune.train.preparation import Data, describe, model_commit, prepare
from numina_finetune.train.profiling import FOLDER as PROFILE
from numina_finetune.train.record import (
    check_output,
    facts_of,
    pinned,
    read_record,
    resume_candidates,
    resume_faults,
    write_record,
)
from numina_finetune.train.report import Report
from numina_finetune.train.speed import TokenFlops, token_flops
from numina_finetune.train.startup import StartUp
from numina_finetune.train.trackers import (
    TENSORBOARD,
    TrackedLife,
    close_trackers,
    missing_trackers,
    start_trackers,
    tracked_facts,
    tracker_run_key,
)
from numina_finetune.train.trainer import Plan, Trainer

logger = logging.getLogger(__name__)

MakeBackend = Callable[[RunConfig], Backend]
MakeEvaluator = Callable[[RunConfig, Backend, PreTrainedTokenizerBase, GenerationConfig], MeasureAccuracy]
"""What measures the accuracy of the model that a backend holds."""


def check(config: RunConfig, backend: str) -> None:
    """Everything that can be seen to be wrong before a model is loaded.

    Raises:
        ConfigError: all of it at once.
    """
    faults = [*config_faults(config), *backend_faults(config, backend), *launch.faults(backend, config)]
    faults += missing_trackers(config)
    faults += PushOptions.of(config).faults(config.resolved_run_id)
    faults += preflight(config.datasets, config)
    devices = launch.device_count(backend)
    if devices is not None:
        faults += _problems(lambda: parse_mesh(config.mesh, devices))
    if config.model_name:
        known = _as_recorded(config)
        faults += _problems(lambda: load_config(known, load_tokenizer(known)))
    if config.output_dir:
        faults += _problems(lambda: check_output(config))
    if "/" in config.resume_from_checkpoint:
        faults += _problems(lambda: checkpoint_at(config.resume_from_checkpoint))
    if faults:
        raise ConfigError(faults)


def _as_recorded(config: RunConfig) -> RunConfig:
    """With the model at the commit that the run began with, where it has begun."""
    try:
        record = read_record(open_store(config.run_url)) if config.output_dir else None
    except UserError:  # told by the check of the output
        record = None
    return pinned(config, record.get("model_commit")) if record else config


def train(
    config: RunConfig, make_backend: MakeBackend, notice: StopNotice, make_evaluator: MakeEvaluator | None = None
) -> ExitCode:
    """Run or resume; what became of it is also written to ``attempts/{n}/outcome.json``.

    Args:
        make_evaluator: makes what ``--eval-samples`` asks for.
    """
    backend = make_backend(config)
    say(backend, backend.device_description)
    place = open_place(config)
    place.folder.mkdir(parents=True, exist_ok=True)
    number = backend.processes.broadcast(open_attempt(place.store).number if backend.process_index == 0 else None)
    attempt = Attempt(number, place.store, backend.process_index)
    life = _Life(config, backend, place, attempt, Progress(), notice, make_evaluator)
    try:
        finished = life.run()
    except BaseException as error:
        kind = {
            PushFailed: "crashed",
            TrainingDiverged: "diverged",
            UserError: "configuration",
            KeyboardInterrupt: "stopped",
        }
        name = next((name for cls, name in kind.items() if isinstance(error, cls)), "crashed")
        life.finish(name, "".join(traceback.format_exception_only(error)).strip())
        raise
    return life.outcome(finished)


@dataclass
class _Life:
    """One life of a run, from its data to its outcome."""

    config: RunConfig
    backend: Backend
    place: RunPlace
    attempt: Attempt
    progress: Progress
    notice: StopNotice
    make_evaluator: MakeEvaluator | None = None
    checkpoints: CheckpointManager | None = None
    began: float = field(default_factory=time.monotonic)
    start_up: StartUp = field(default_factory=StartUp)

    def run(self) -> bool:
        """Resume, train, export; whether the run is finished."""
        asked, backend, place = self.config, self.backend, self.place
        self.start_up.part("start")
        record, commit = backend.processes.broadcast(self._record() if backend.process_index == 0 else None)
        config = self.config = pinned(asked, commit)
        tokenizer = load_tokenizer(config)
        data, plan = prepare(config, backend, tokenizer, record)
        say(backend, f"{place.url}: {describe(data, plan)}")
        self.start_up.part("data")
        fingerprint, base = tokenizer_hash(tokenizer), base_fingerprint(config)
        self._claim(asked, record, commit, data, plan, fingerprint, base)
        facts = facts_of(
            asked,
            data_key=data.index.data_key,
            tokenizer=fingerprint,
            base=base,
            global_batch=plan.batch.global_batch,
            mesh=backend.mesh_shape.by_axis,
            backend=backend.name,
        )
        candidates = self._candidates(facts)
        if candidates and candidates[0].step >= plan.total_steps and all(map(place.has_exported, exports_of(config))):
            self.progress.step = candidates[0].step
            say(backend, f"nothing to do: the run has made all {plan.total_steps} steps; {_whereabouts(config, place)}")
            self._push()
            return True

        model, weights = open_model(config, tokenizer, weights=not candidates)
        flops = token_flops(model, config.max_seq_length)
        backend.place(model, config, weights)
        self.checkpoints = CheckpointManager(
            place.store,
            self.attempt.number,
            StateDoor(backend, self.progress),
            backend.processes,
            hosts=backend.process_count,
            keep=config.save_total_limit,
            facts=facts,
            asynchronous=config.async_save,
            remaining=self.notice.remaining,
            before_commit=self._publish_records,
        )
        if candidates:
            checkpoint = self.checkpoints.load(candidates)
            say(backend, f"resumed from the checkpoint of step {checkpoint.step}/{plan.total_steps}")
        measure = None
        if config.eval_samples and self.make_evaluator is not None:
            generation = load_generation_config(config, model.config)
            measure = self.make_evaluator(config, backend, tokenizer, generation)
        self.start_up.part("model")
        finished = self._train(data, plan, self.checkpoints, flops, measure)
        say(backend, backend.summary())
        if finished:
            self._export(tokenizer, data)
        return finished

    def outcome(self, finished: bool) -> ExitCode:
        """Record what became of this life, and say it by the exit code."""
        if finished:
            self.finish("done", "all steps made, model exported")
            return ExitCode.DONE
        saved = self.checkpoints and self.checkpoints.committed_step
        lost = "" if saved == self.progress.step else f"; not saved in the time left: the newest checkpoint is {saved}"
        if self.notice.signal == signal.SIGINT:
            self.finish("stopped", self.notice.reason + lost)
            return ExitCode.STOPPED
        self.finish("preempted", self.notice.reason + lost)
        return ExitCode.PREEMPTED

    def finish(self, kind: str, reason: str) -> None:
        """Record what became of this life."""
        checkpoints = self.checkpoints
        self.attempt.finish(
            kind,
            step=self.progress.step,
            saved_step=checkpoints.committed_step if checkpoints else None,
            reason=reason,
            seconds={**(checkpoints.seconds if checkpoints else {}), **self.start_up.seconds},
        )

    def _train(
        self,
        data: Data,
        plan: Plan,
        checkpoints: CheckpointManager,
        flops: TokenFlops,
        measure: MeasureAccuracy | None,
    ) -> bool:
        config, backend = self.config, self.backend
        if config.trackers:
            self._start_trackers(data)
        first = backend.process_index == 0
        if first:
            self.place.fetch(METRICS)
        report = Report(
            self.place.folder,
            backend.accelerator,
            life=self.attempt.number,
            step=self.progress.step,
            total_steps=plan.total_steps,
            active=first,
            began=self.began,
            first_step=lambda: self.start_up.first_step(backend.compile_seconds()),
            committed=lambda: checkpoints.newest_committed,
            flops=flops,
            chips=backend.chips,
            rows_per_step=plan.batch.global_batch,
            spike_factor=config.loss_spike_factor,
            publish=lambda: self.place.publish(METRICS),
        )
        trainer = Trainer(
            config,
            backend,
            plan,
            data.train,
            data.evaluation,
            progress=self.progress,
            checkpoints=checkpoints,
            report=report,
            notice=self.notice,
            measure=measure,
        )
        try:
            return trainer.run()
        except KeyboardInterrupt:  # the user's second word: at once
            checkpoints.close(patience=0)
            raise
        finally:
            checkpoints.close()
            report.close()
            self.place.publish_folder(PROFILE)
            close_trackers(backend.accelerator, self.notice.remaining())
            self.place.publish_folder(TENSORBOARD)

    def _start_trackers(self, data: Data) -> None:
        place, backend = self.place, self.backend
        if backend.process_index == 0:
            key, facts = tracker_run_key(place.store), tracked_facts(self.config, data.index.report)
            start_trackers(backend.accelerator, TrackedLife(self.config, place.folder, key, self.progress.step, facts))

    def _publish_records(self) -> None:
        """What a checkpoint's steps left behind, durable with it."""
        self.place.publish(METRICS)
        self.place.publish_folder(TENSORBOARD)

    def _record(self) -> tuple[dict[str, Any] | None, str | None]:
        """What an earlier life recorded, and the commit of the model."""
        record = read_record(self.place.store)
        return record, model_commit(self.config, record)

    def _claim(
        self,
        asked: RunConfig,
        record: Mapping[str, Any] | None,
        commit: str | None,
        data: Data,
        plan: Plan,
        tokenizer: str,
        base: str | None,
    ) -> None:
        """Write the run's record in its first life; in a later one, refuse what does not match it."""
        if record is not None:
            may_change = self.config.allow_data_change
            resume_faults(
                record, data_key=data.index.data_key, tokenizer=tokenizer, base=base, data_may_change=may_change
            )
            if record["data_key"] != data.index.data_key:
                say(
                    self.backend,
                    f"the training data changed (data_key was {record['data_key']}, is {data.index.data_key}): "
                    "going on from the same row position, as --allow-data-change asks for",
                )
        elif self.backend.process_index == 0:
            self.place.store.write_json(DATA_REPORT, data.index.report)
            write_record(
                self.place.store,
                asked,
                global_batch=plan.batch.global_batch,
                data_key=data.index.data_key,
                tokenizer=tokenizer,
                base=base,
                total_steps=plan.total_steps,
                commit=commit,
            )
        self.backend.processes.barrier()

    def _candidates(self, facts: Mapping[str, Any]) -> list[Checkpoint]:
        """The checkpoints to resume from, the first one first, the same on every process."""
        found = resume_candidates(self.config, self.place, facts) if self.backend.process_index == 0 else []
        plain = [(c.step, c.attempt, c.store.url, c.prefix) for c in found]
        own = self.place.store
        return [
            Checkpoint(step, attempt, own if url == own.url else open_store(url), prefix)
            for step, attempt, url, prefix in self.backend.processes.broadcast(plain)
        ]

    def _export(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        """The final checkpoint as a plain Hugging Face folder, and as an adapter alone."""
        config, place, progress = self.config, self.place, self.progress
        if self.backend.process_index == 0:
            for name in exports_of(config):
                self._export_as(name, tokenizer, data)
                place.publish_exported(name)
            place.publish(METRICS)
            told = f"done: {progress.step} steps, {progress.tokens} tokens; {_whereabouts(config, place)}"
            say(self.backend, told)
        self.backend.processes.barrier()
        self._push()

    def _push(self) -> None:
        """What was exported, in this life or an earlier one, onto the hub."""
        config, place = self.config, self.place
        if not config.push_to_hub or self.backend.process_index != 0:
            return
        for name, model_id in pushed_as(config).items():
            again = f"the {name} is whole in {place.url}/{name}, and the same command pushes it"
            with place.exported(name) as folder:
                address = push(folder, model_id, private=config.hub_private, again=again)
            say(self.backend, f"the {name} is on the hub: {address}")

    def _export_as(self, name: str, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        config, place, progress = self.config, self.place, self.progress
        shards, model_config = committed(place.store)[0].open().shards(), load_config(config, tokenizer)
        card = model_card(
            config,
            run_id=place.name,
            steps=progress.step,
            tokens=progress.tokens,
            data=data.index.report,
            adapter=name == ADAPTER,
        )
        if name == ADAPTER:
            export_adapter(shards, place.folder / name, run=config, config=model_config, tokenizer=tokenizer, card=card)
            return
        dtype = EXPORT_DTYPES[config.precision]
        export_model(
            trained_weights(shards, config, tokenizer, dtype),
            place.folder / name,
            config=model_config,
            tokenizer=tokenizer,
            generation=load_generation_config(config, model_config),
            card=card,
            dtype=dtype,
        )


def _whereabouts(config: RunConfig, place: RunPlace) -> str:
    """Where a person finds what the run leaves."""
    return " and ".join(f"the {name} is in {place.url}/{name}" for name in exports_of(config))


def _problems(attempt: Callable[[], object]) -> list[str]:
    """The problems of the UserError that ``attempt`` raises; other errors are left for when they matter."""
    try:
        attempt()
    except UserError as error:
        return error.problems
    return []
