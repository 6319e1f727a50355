"""What a step does, by its kind: a command with its options, the outputs that it leaves, and what makes its result.

Options have the names and the checks of the command itself. What decides where a step works is the pipeline's own.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from numina_finetune import launch
from numina_finetune.checks import choice_faults, config_faults
from numina_finetune.config import BACKENDS, RunConfig, SourceConfig
from numina_finetune.data.prepare import IndexOptions
from numina_finetune.data.sources import benchmark_source, content_key, preflight, resolve_source, source_kind
from numina_finetune.errors import ConfigError, UserError
from numina_finetune.evaluation.options import EvaluateOptions
from numina_finetune.evaluation.tasks import find_task, load_problems
from numina_finetune.option_fields import flag, values_of, words_of
from numina_finetune.spot.training import named_things
from numina_finetune.storage import NotFound, Store
from numina_finetune.train.metrics import parse_metrics
from numina_finetune.train.place import ADAPTER, METRICS, MODEL, exports_of

CACHE = "cache"

Figures = dict[str, float]


@dataclass(frozen=True)
class Location:
    """Where a step works."""

    root: str
    """The pipeline's place."""
    folder: str
    """The step's own in there."""

    @property
    def url(self) -> str:
        return f"{self.root}/{self.folder}"


class Work(ABC):
    """A step with its options resolved."""

    alone: ClassVar[bool]
    """Whether one process does it while others of the same launch wait."""
    remade: ClassVar[bool] = False
    """Whether nothing may be left of its outputs when it is done again."""
    own: ClassVar[Sequence[str]]
    """Options of the command that the pipeline gives."""

    @classmethod
    @abstractmethod
    def of(cls, options: Mapping[str, Any], location: Location, where: str) -> Work:
        """The work in that place.

        Args:
            where: the step, for messages.

        Raises:
            ConfigError: unknown names, or values of the wrong type, all at once.
        """

    @property
    @abstractmethod
    def outputs(self) -> Mapping[str, str]:
        """Where they are in the step's folder, by name; "" is the folder itself."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes its result, options that have their defaults left out: a new one changes no step of old."""

    @abstractmethod
    def faults(self) -> list[str]:
        """What can be seen to be wrong without a library being loaded."""

    @abstractmethod
    def faults_seen_by_libraries(self) -> list[str]:
        """What can be seen to be wrong besides, before a model or a device is touched."""

    @abstractmethod
    def words(self, scratch: Path) -> list[str]:
        """The command; files that it reads are written into ``scratch``."""

    @abstractmethod
    def named(self) -> list[tuple[str, str]]:
        """Each option that may name a file or folder, and what it names."""

    def files(self) -> dict[str, str]:
        """Digests of the files here that it reads, by name."""
        return {}

    def figures(self, store: Store) -> Figures:
        """What it found.

        Args:
            store: of its folder.
        """
        return {}


@dataclass(frozen=True)
class _Configured(Work):
    """Of the commands that take a run's options."""

    config: RunConfig

    @classmethod
    def of(cls, options: Mapping[str, Any], location: Location, where: str) -> Work:
        config = RunConfig.from_mapping(options, where)
        return cls(replace(config, output_dir=location.root, run_id=location.folder))

    def files(self) -> dict[str, str]:
        return _contents([*map(resolve_source, self.config.datasets), *map(benchmark_source, self.config.against)])

    def faults(self) -> list[str]:
        return [*config_faults(self.config), *preflight(self.config.datasets, self.config)]

    def named(self) -> list[tuple[str, str]]:
        return named_things(self.config)

    def _written(self, scratch: Path) -> list[str]:
        path = scratch / f"{self.config.resolved_run_id}.yaml"
        path.write_text(yaml.safe_dump(self.config.to_mapping(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        return ["--config", str(path)]


class Train(_Configured):
    """``train``: the step's folder is the run's."""

    alone = False
    own = ("output_dir", "run_id", "resume_from_checkpoint", "dry_run")

    @property
    def outputs(self) -> Mapping[str, str]:
        return {"run": "", **{name: name for name in exports_of(self.config)}}

    def identity(self) -> dict[str, Any]:
        return _changed(self.config.identity(), RunConfig().identity()) | _sources(self.config)

    def faults_seen_by_libraries(self) -> list[str]:
        from numina_finetune.evaluation import in_loop
        from numina_finetune.train.run import check

        found = in_loop.faults(self.config)
        try:
            check(self.config, launch.choose_backend(self.config)[0])
        except UserError as error:
            found += error.problems
        return found

    def words(self, scratch: Path) -> list[str]:
        return ["train", *self._written(scratch)]

    def figures(self, store: Store) -> Figures:
        metrics = parse_metrics(_text(store, METRICS))
        found = {"steps": float(metrics.steps[-1]["step"]), "loss": metrics.steps[-1]["loss"]} if metrics.steps else {}
        last = metrics.evaluations[-1] if metrics.evaluations else {}
        return found | {name: last[name] for name in ("eval_loss", "eval_accuracy") if name in last}


class Prepare(_Configured):
    """``data prepare``: the cache of tokenised data in the step's folder."""

    alone = True
    own = ("cache_dir",)
    takes: ClassVar[Sequence[str]] = (
        *(f.name for f in fields(RunConfig) if f.metadata.get("group") == "Data"),
        *("datasets", "model_name", "model_revision", "tokenizer_name", "trust_remote_code", "seed"),
    )

    @classmethod
    def of(cls, options: Mapping[str, Any], location: Location, where: str) -> Work:
        faults = [
            f"{where}: {name} is no option of data prepare: use {', '.join(sorted(cls.takes))}"
            for name in options
            if name not in cls.takes
        ]
        if faults:
            raise ConfigError(faults)
        return super().of({**options, "cache_dir": f"{location.url}/{CACHE}"}, location, where)

    @property
    def outputs(self) -> Mapping[str, str]:
        return {CACHE: CACHE}

    def identity(self) -> dict[str, Any]:
        """What decides the tokens; what is done with them is another step's."""
        chosen, plain = (dataclasses.asdict(IndexOptions.of(config)) for config in (self.config, RunConfig()))
        named = {name: getattr(self.config, name) for name in ("tokenizer", "model_revision")}
        sources = [
            {name: value for name, value in source.items() if name not in ("weight", "max_samples")}
            for source in _sources(self.config)["datasets"]
        ]
        return {**_changed(chosen, plain), **named, "datasets": sources}

    def faults_seen_by_libraries(self) -> list[str]:
        from numina_finetune.models.tokenizer import load_tokenizer

        try:
            load_tokenizer(self.config)
        except UserError as error:
            return error.problems
        return []

    def words(self, scratch: Path) -> list[str]:
        return ["data", "prepare", *self._written(scratch)]


@dataclass(frozen=True)
class Evaluate(Work):
    """``evaluate``: its results in the step's folder."""

    alone = False
    own = ("output_dir",)
    options: EvaluateOptions

    @classmethod
    def of(cls, options: Mapping[str, Any], location: Location, where: str) -> Work:
        given = values_of(EvaluateOptions, options, where)
        return cls(EvaluateOptions.from_mapping({**given, "output_dir": location.url}))

    @property
    def outputs(self) -> Mapping[str, str]:
        return {"results": ""}

    def identity(self) -> dict[str, Any]:
        return _changed(self.options.settings(), dataclasses.asdict(EvaluateOptions()))

    def files(self) -> dict[str, str]:
        named = [self._task.source]
        named += [SourceConfig(self.options.shots_file)] if self.options.shots_file else []
        return _contents(named)

    def faults(self) -> list[str]:
        return self.options.faults()

    def faults_seen_by_libraries(self) -> list[str]:
        from numina_finetune.evaluation.sandbox import Minimum, require

        chosen = self.options.backend if self.options.backend in BACKENDS else "auto"
        devices = RunConfig(backend=chosen)
        found = launch.faults(launch.choose_backend(devices)[0], devices)
        try:
            if self.options.tools:
                require(Minimum(self.options.sandbox_minimum))
        except UserError as error:
            found += error.problems
        try:
            if source_kind(self._task.source.name) != "hub":
                load_problems(self._task)
        except UserError as error:
            found += error.problems
        return found

    def words(self, scratch: Path) -> list[str]:
        return ["evaluate", *words_of(self.options)]

    def named(self) -> list[tuple[str, str]]:
        named = [(name, getattr(self.options, name)) for name in ("model", "tokenizer_name", "task", "shots_file")]
        return [(flag(name), value) for name, value in named if value]

    def figures(self, store: Store) -> Figures:
        from numina_finetune.evaluation.results import SUMMARY

        summary = json.loads(_text(store, SUMMARY))
        return {name: summary["figures"][summary["headline"]][name] for name in ("accuracy", "lower", "upper")}

    @property
    def _task(self) -> Any:
        options = self.options
        return find_task(options.task, options.question_field, options.answer_field, options.answer_style)


@dataclass(frozen=True)
class Export(Work):
    """``export``: a model, or adapters, in the step's folder."""

    alone = True
    remade = True
    own = ("output",)
    output: str = ""
    run: str = ""
    step: str = "newest"
    dtype: str | None = None
    lora_export: str | None = None
    trust_remote_code: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], location: Location, where: str) -> Work:
        export = cls(**values_of(cls, options, where))
        return replace(export, output=f"{location.url}/{export._kind}")

    @property
    def outputs(self) -> Mapping[str, str]:
        return {self._kind: self._kind}

    def identity(self) -> dict[str, Any]:
        return _changed(dataclasses.asdict(replace(self, output="")), dataclasses.asdict(Export()))

    def faults(self) -> list[str]:
        found = [] if self.run else ["--run is missing: give a run, such as that of a train step"]
        if self.step != "newest" and not self.step.isdecimal():
            found.append(f"--step {self.step!r} is unknown: use newest or the number of a step")
        if self.lora_export == "adapter" and self.dtype is not None:
            found.append(f"--dtype {self.dtype}: adapters are written in the type that they were trained in")
        allowed = {"dtype": ("bf16", "fp32", None), "lora_export": ("merged", "adapter", None)}
        return [*found, *choice_faults(self, allowed)]

    def faults_seen_by_libraries(self) -> list[str]:
        from numina_finetune.models.push import PushOptions

        named = self.run.rstrip("/").rpartition("/")[2]
        return PushOptions(self.push_to_hub, self.hub_model_id, self.hub_private).faults(named)

    def words(self, scratch: Path) -> list[str]:
        return ["export", self.run, *words_of(replace(self, run=""))]

    def named(self) -> list[tuple[str, str]]:
        return [("--run", self.run)]

    @property
    def _kind(self) -> str:
        return ADAPTER if self.lora_export == "adapter" else MODEL


KINDS: Mapping[str, type[Work]] = {"prepare": Prepare, "train": Train, "evaluate": Evaluate, "export": Export}
"""By the name that pipelines give them."""


def work_of(kind: str, options: Mapping[str, Any], location: Location, where: str) -> Work:
    """The step's work.

    Raises:
        ConfigError: the options are not the command's, or are the pipeline's own; all of it at once.
    """
    cls = KINDS[kind]
    faults = [
        f"{where}: {name} is the pipeline's own: leave it out, and refer to the step's outputs"
        for name in cls.own
        if name in options
    ]
    try:
        work = cls.of({name: value for name, value in options.items() if name not in cls.own}, location, where)
    except ConfigError as error:
        raise ConfigError([*faults, *error.problems]) from error
    if faults:
        raise ConfigError(faults)
    return work


def _sources(config: RunConfig) -> dict[str, Any]:
    like = dataclasses.asdict(SourceConfig(""))
    return {"datasets": [_changed(dataclasses.asdict(source), like) for source in config.datasets]}


def _changed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have other values than by default."""
    return {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}


def _contents(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """Digests of the sources that are files or folders here."""
    local = {each.name: each for each in sources if each.name and source_kind(each.name) in ("file", "folder")}
    return {name: content_key(source, False) for name, source in local.items()}


def _text(store: Store, name: str) -> str:
    try:
        return store.read(name).decode()
    except NotFound:
        return ""
