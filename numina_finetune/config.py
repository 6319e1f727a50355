"""One run, as plain frozen data: the command line's options, the YAML's keys, and the checks on them.

``RunConfig`` is the single list of options: the command line is generated from its fields (``cli.py``), and a
YAML file uses the same names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from numina_finetune.errors import ConfigError

FORMATS = ("auto", "qa", "gsm8k", "math", "numina_cot", "numina_1.5", "numina_tir", "messages")
PRECISIONS = ("bf16", "pure-bf16", "fp32")
SCHEDULES = ("cosine", "linear", "constant")
BACKENDS = ("auto", "xla", "native")
TRACKERS = ("none", "wandb", "tensorboard")
GSM8K_STYLES = ("plain", "annotated", "calculator")
TIR_STYLES = ("tool_calls", "text")
OVERLONG = ("drop", "truncate", "split-error")
CHAT_FAMILIES = ("auto", "qwen3", "harmony", "template")
REASONING_EFFORTS = ("low", "medium", "high")
MESH_AXES = ("dcn", "data", "fsdp", "expert", "tensor")
BATCH_AXES = ("dcn", "data", "fsdp")
"""The mesh axes over which the rows of a batch are split; their product is the data-parallel size."""

ALIASES = {
    "openai/oss-20b": "openai/gpt-oss-20b",
    "openai/oss-120b": "openai/gpt-oss-120b",
    "AI-MO/NuminaMath": "AI-MO/NuminaMath-CoT",
    "gsm8k": "openai/gsm8k",
    "math": "DigitalLearningGmbH/MATH-lighteval",
    "math500": "HuggingFaceH4/MATH-500",
}
"""Names that users type from memory, and the hub's own."""


def option(default: Any, help: str, group: str, *, identity: bool = True) -> Any:
    """A field that is also a command-line option; two lives of one run may differ where ``identity`` is false."""
    return field(default=default, metadata={"help": help, "group": group, "identity": identity})


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the mixture."""

    name: str
    """Hub name, folder, ``.jsonl``/``.json``/``.parquet`` file, or ``synthetic-gsm8k``."""
    config: str | None = None
    """Hub configuration, such as ``main`` of ``openai/gsm8k``."""
    split: str = "train"
    revision: str | None = None
    format: str = "auto"
    weight: float | None = None
    """Share of the rows this source gives; None everywhere = every row once an epoch."""
    max_samples: int | None = None
    """At most so many of its samples, chosen by the seed; None = all."""
    messages_field: str = "messages"
    question_field: str | None = None
    """Column of the question; None = the format's own."""
    answer_field: str | None = None
    """Column of the answer; None = the format's own."""
    tool_calls_field: str | None = None
    """Column of OpenAI tool calls, all made in one turn before the answer."""
    tool_name_field: str | None = None
    """Column of the names of the tools that are called; None = python."""
    tool_input_field: str | None = None
    """Column of the inputs of sequential tool calls."""
    tool_output_field: str | None = None
    """Column of the results of the tool calls."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs to know, resolved and immutable."""

    # Model
    model_name: str = option("", "Hub name, local folder, or built-in model (tiny-qwen3).", "Model")
    model_revision: str | None = option(None, "Branch, tag or commit of the model.", "Model")
    tokenizer_name: str | None = option(None, "Hub name or folder of the tokenizer; the model's own if unset.", "Model")
    precision: str = option(
        "bf16", "bf16 (bf16 compute, fp32 master weights), pure-bf16 (weights and moments too), or fp32.", "Model"
    )
    # Data
    datasets: tuple[SourceConfig, ...] = ()
    eval_dataset_name: str | None = option(
        None, "Dataset of the evaluation loss; takes name[split].", "Data", identity=False
    )
    eval_split: str = option("test", "Split of --eval-dataset-name.", "Data", identity=False)
    validation_size: float = option(
        0.0, "Held-out part of the training rows for the evaluation loss: a share below 1, else a count.", "Data"
    )
    system_prompt: str | None = option(None, "System message put before every conversation that has none.", "Data")
    gsm8k_style: str = option(
        "plain",
        "GSM8K's <<48/2=24>>: plain strips it, annotated keeps it as text, calculator makes it a tool call.",
        "Data",
    )
    max_seq_length: int = option(1024, "Tokens in a row of the batch; one fixed shape for the whole run.", "Data")
    tir_style: str = option(
        "tool_calls", "NuminaMath-TIR's code blocks: tool_calls, or text (one turn, results out of the loss).", "Data"
    )
    chat_family: str = option("auto", "Chat layout: auto, qwen3, harmony (gpt-oss) or template.", "Data")
    chat_date: str = option("2025-06-28", "Today's date, as system messages give it: YYYY-MM-DD.", "Data")
    reasoning_effort: str = option("medium", "What gpt-oss's system message asks for: low, medium or high.", "Data")
    against: tuple[str, ...] = option(
        (), "Benchmark whose questions are looked for in the data, such as gsm8k:test; may be repeated.", "Data"
    )
    decontaminate: bool = option(False, "Drop the rows whose questions stand in an --against benchmark.", "Data")
    overlong: str = option(
        "drop",
        "Samples longer than --max-seq-length: drop, truncate (behind the last assistant turn that fits) or "
        "split-error (stop, naming them).",
        "Data",
    )
    packing: bool = option(True, "Several samples in one row, attention kept apart.", "Data")
    cache_dir: str | None = option(
        None, "Folder or gs://bucket/prefix where tokenised data is cached, by content.", "Data", identity=False
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that prepare data; for large sources, the number of cores if unset.", "Data", identity=False
    )
    streaming: bool = option(
        False, "Read the datasets as streams, without a copy on this disk.", "Data", identity=False
    )
    # Optimisation
    per_device_train_batch_size: int = option(
        8, "Rows a device takes in one micro-batch.", "Optimisation", identity=False
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches in one optimizer step.", "Optimisation", identity=False)
    global_batch_size: int | None = option(
        None, "Rows in one optimizer step; accumulation follows from it and the mesh.", "Optimisation", identity=False
    )
    learning_rate: float = option(2e-5, "Peak learning rate.", "Optimisation")
    lr_scheduler_type: str = option("cosine", "cosine, linear or constant, after the warm-up.", "Optimisation")
    warmup_ratio: float = option(0.03, "Share of the optimizer steps spent warming up.", "Optimisation")
    optim: str = option("adamw", "Optimizer: adamw.", "Optimisation")
    weight_decay: float = option(0.0, "Decoupled weight decay; not on norms and biases.", "Optimisation")
    adam_beta1: float = option(0.9, "AdamW's first moment decay.", "Optimisation")
    adam_beta2: float = option(0.999, "AdamW's second moment decay.", "Optimisation")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", "Optimisation")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm; 0 = never.", "Optimisation")
    num_train_epochs: float = option(1.0, "Passes over the data, where --max-steps is not given.", "Optimisation")
    max_steps: int = option(-1, "Optimizer steps in all; overrides --num-train-epochs.", "Optimisation")
    seed: int = option(42, "Seed of data order and random weights.", "Optimisation")
    gradient_checkpointing: bool = option(
        True, "Recompute each layer in the backward pass.", "Optimisation", identity=False
    )
    # Devices
    backend: str = option("auto", "auto, xla (TPU through SPMD) or native (CPU and GPUs).", "Devices", identity=False)
    mesh: str | None = option(
        None,
        'Devices along each axis, such as "fsdp=4,tensor=2"; one axis may be -1. All on fsdp if unset.',
        "Devices",
        identity=False,
    )
    # Output
    output_dir: str = option("", "Folder that holds this run's own folder.", "Output", identity=False)
    run_id: str | None = option(
        None, "Name of the run; a hash of what makes it this run if unset.", "Output", identity=False
    )
    save_steps: int = option(
        500, "Optimizer steps between checkpoints; 0 = only at the end or on a signal.", "Output", identity=False
    )
    save_total_limit: int = option(3, "Committed checkpoints kept.", "Output", identity=False)
    resume_from_checkpoint: str = option(
        "auto",
        "auto (newest committed), none (start anew; refused if there is one), or a step number.",
        "Output",
        identity=False,
    )
    eval_steps: int = option(
        0, "Optimizer steps between evaluations of the loss; 0 = only at the end.", "Output", identity=False
    )
    logging_steps: int = option(10, "Optimizer steps between log lines.", "Output", identity=False)
    report_to: str = option("none", "Trackers, comma-separated: wandb, tensorboard, none.", "Output", identity=False)
    dry_run: bool = option(
        False, "Check everything, prepare the data, say what would run, and stop.", "Output", identity=False
    )

    # --- derived ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> str:
        return self.tokenizer_name or self.model_name

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name and name != "none"]

    @property
    def resolved_run_id(self) -> str:
        """``--run-id``, or a short name that is the same for every life of the same run."""
        if self.run_id:
            return self.run_id
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:10]
        return f"{Path(self.model_name).name}-{digest}".lower()

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.output_dir) / self.resolved_run_id

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: two commands with equal identities continue one another.

        Logging, saving, mesh and paths are not part of it. The batch enters as it was asked for, so that the same
        command on another mesh finds its run again (and keeps the global batch that the run began with).
        """
        identity = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity")}
        identity["against"] = list(self.against)  # as YAML gives it back
        identity["datasets"] = [dataclasses.asdict(source) for source in self.datasets]
        if self.global_batch_size is not None:
            identity["global_batch_size"] = self.global_batch_size
        else:
            identity["per_device_train_batch_size"] = self.per_device_train_batch_size
            identity["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        return identity

    # --- checks ----------------------------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """Every fault that can be seen without opening a file or a device."""
        return [
            *self._missing(),
            *self._not_among(),
            *self._out_of_range(),
            *self._contradictions(),
            *(fault for source in self.datasets for fault in _source_faults(source)),
        ]

    def _missing(self) -> list[str]:
        faults = []
        if not self.datasets:
            faults.append(
                "--dataset-name is missing: give a hub name, a folder or a .jsonl/.parquet file "
                "(or run `numina-finetune quickstart`, which needs none)"
            )
        if not self.model_name:
            faults.append("--model-name is missing: give a hub name, a folder, or tiny-qwen3")
        if not self.output_dir:
            faults.append("--output-dir is missing: give the folder that will hold the run")
        return faults

    def _not_among(self) -> list[str]:
        allowed = {
            "precision": PRECISIONS,
            "lr_scheduler_type": SCHEDULES,
            "backend": BACKENDS,
            "optim": ("adamw",),
            "gsm8k_style": GSM8K_STYLES,
            "tir_style": TIR_STYLES,
            "chat_family": CHAT_FAMILIES,
            "reasoning_effort": REASONING_EFFORTS,
            "overlong": OVERLONG,
        }
        faults = [
            f"{flag(name)} {getattr(self, name)!r} is unknown: use one of {', '.join(choices)}"
            for name, choices in allowed.items()
            if getattr(self, name) not in choices
        ]
        faults += [
            f"--report-to {name!r} is unknown: use {', '.join(TRACKERS)}"
            for name in self.report_to.split(",")
            if name and name not in TRACKERS
        ]
        if self.resume_from_checkpoint not in ("auto", "none") and not self.resume_from_checkpoint.isdecimal():
            faults.append(
                f"--resume-from-checkpoint {self.resume_from_checkpoint!r} is unknown: use auto, none or a step number"
            )
        return faults

    def _out_of_range(self) -> list[str]:
        at_least: dict[str, float] = {
            "max_seq_length": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "save_total_limit": 1,
            "logging_steps": 1,
            "save_steps": 0,
            "eval_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "learning_rate": 0,
            "validation_size": 0,
            "seed": 0,
        }
        faults = [
            f"{flag(name)} {getattr(self, name)} is too small: use {bound:g} or more"
            for name, bound in at_least.items()
            if not getattr(self, name) >= bound or not math.isfinite(getattr(self, name))
        ]
        if not 0 <= self.warmup_ratio <= 1:
            faults.append(f"--warmup-ratio {self.warmup_ratio} is out of range: use a share from 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{flag(name)} {getattr(self, name)} is out of range: use 0 up to, but not, 1")
        if not self.adam_epsilon > 0:
            faults.append(f"--adam-epsilon {self.adam_epsilon} is too small: use more than 0, such as 1e-8")
        if self.max_steps < 1 and self.max_steps != -1:
            faults.append(f"--max-steps {self.max_steps} is out of range: use 1 or more, or -1 for whole epochs")
        if not 0 < self.num_train_epochs < math.inf:
            faults.append(f"--num-train-epochs {self.num_train_epochs} is out of range: use more than 0")
        for name in ("global_batch_size", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{flag(name)} {value} is too small: use 1 or more")
        if not _is_date(self.chat_date):
            faults.append(f"--chat-date {self.chat_date!r} is no date: write it as 2025-06-28")
        return faults

    def _contradictions(self) -> list[str]:
        faults = []
        weighted = [source for source in self.datasets if source.weight is not None]
        if weighted and len(weighted) < len(self.datasets):
            faults.append(
                f"--dataset-weight is given for {len(weighted)} of {len(self.datasets)} datasets: "
                "give it for each, or for none (then every row is seen once an epoch)"
            )
        if self.eval_dataset_name and self.validation_size:
            faults.append(
                f"--eval-dataset-name {self.eval_dataset_name} and --validation-size {self.validation_size:g} both "
                "name the evaluation data: keep one"
            )
        if self.eval_steps and not (self.eval_dataset_name or self.validation_size):
            faults.append(
                f"--eval-steps {self.eval_steps} has nothing to evaluate: add --eval-dataset-name or --validation-size"
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            faults.append(
                f"--global-batch-size {self.global_batch_size} and --gradient-accumulation-steps "
                f"{self.gradient_accumulation_steps} both set the accumulation: keep one"
            )
        if self.decontaminate and not self.against:
            faults.append("--decontaminate has no benchmark to look for: add --against, such as --against gsm8k:test")
        if self.output_dir.startswith("gs://"):
            faults.append(f"--output-dir {self.output_dir} is not a local folder: give one")
        if self.run_id is not None and (not self.run_id.strip() or "/" in self.run_id or self.run_id.startswith(".")):
            faults.append(f"--run-id {self.run_id!r} cannot name a folder: use letters, digits, - and _")
        return faults

    # --- YAML ------------------------------------------------------------------------------------------------------

    def to_mapping(self) -> dict[str, Any]:
        """Plain data with the YAML's names."""
        mapping = dataclasses.asdict(self)
        mapping["datasets"] = [dataclasses.asdict(source) for source in self.datasets]
        mapping["against"] = list(self.against)
        return mapping

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any], where: str = "the configuration") -> RunConfig:
        """The inverse of :meth:`to_mapping`; unset names take their defaults.

        Raises:
            ConfigError: unknown names, or values of the wrong type, all at once.
        """
        faults: list[str] = []
        values = _typed(RunConfig, {k: v for k, v in mapping.items() if k != "datasets"}, where, faults)
        sources = []
        entries = mapping.get("datasets") or []
        if not isinstance(entries, list | tuple):
            faults.append(f"{where}: datasets is {entries!r}: it needs a list, one entry for each dataset")
            entries = []
        for position, entry in enumerate(entries):
            place = f"{where}, datasets[{position}]"
            entry = {"name": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping) or "name" not in entry:
                faults.append(f"{place}: needs a mapping with at least `name`")
                continue
            sources.append(_typed(SourceConfig, entry, place, faults))
        if faults:
            raise ConfigError(faults)
        return RunConfig(**values, datasets=tuple(SourceConfig(**source) for source in sources))


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def load_yaml(path: str) -> dict[str, Any]:
    """The mapping in a run's YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"--config {path} holds {type(mapping).__name__}: it needs a mapping of option names")
    return mapping


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _source_faults(source: SourceConfig) -> list[str]:
    faults = []
    if source.format not in FORMATS:
        faults.append(f"--format {source.format!r} (dataset {source.name}) is unknown: use one of {', '.join(FORMATS)}")
    if source.weight is not None and not (source.weight > 0 and math.isfinite(source.weight)):
        faults.append(f"--dataset-weight {source.weight} (dataset {source.name}) is too small: use more than 0")
    if source.max_samples is not None and source.max_samples < 1:
        faults.append(f"--dataset-max-samples {source.max_samples} (dataset {source.name}) is too small: use 1 or more")
    return faults


def _typed(cls: type, mapping: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """Values of ``mapping`` converted to the types of ``cls``'s fields; what does not fit goes into ``faults``."""
    known = {f.name: f for f in fields(cls) if f.name != "datasets"}
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        name = str(name).replace("-", "_")
        if name not in known:
            faults.append(f"{where}: {name!r} is unknown: use one of {', '.join(sorted(known))}")
            continue
        try:
            values[name] = _convert(str(known[name].type), value)
        except (TypeError, ValueError, OverflowError):
            faults.append(f"{where}: {name} is {value!r}: it needs {known[name].type}")
    return values


def _convert(annotation: str, value: Any) -> Any:
    kind = annotation.removesuffix(" | None")
    if value is None:
        if kind == annotation:
            raise TypeError
        return None
    if kind == "bool":
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind == "int":
        if isinstance(value, bool) or int(value) != value:
            raise TypeError
        return int(value)
    if kind == "float":
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # YAML reads 1e-5 as text
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise TypeError
        return tuple(value)
    if not isinstance(value, str):
        raise TypeError
    return value
