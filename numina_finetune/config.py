"""One run, as plain frozen data: the command line's options, the YAML's keys, and the checks on them.

``RunConfig`` is the single list of options: the command line is generated from its fields (``cli/options.py``), and a
YAML file uses the same names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from numina_finetune.errors import ConfigError
from numina_finetune.option_fields import option, typed_values

FORMATS = ("auto", "qa", "gsm8k", "math", "numina_cot", "numina_1.5", "numina_tir", "messages")
REMAT = ("none", "dots", "full")
ATTENTION = ("auto", "splash", "segments", "flash", "torch")
EXPERTS = ("auto", "dropless", "capacity", "dense")
LOSS_CHUNKS = ("auto", "sequence", "vocabulary")
PRECISIONS = ("bf16", "pure-bf16", "fp32")
SCHEDULES = ("cosine", "cosine_with_min_lr", "linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "adafactor")
BACKENDS = ("auto", "xla", "native")
TRACKERS = ("none", "wandb", "tensorboard")
LORA_EXPORTS = ("merged", "adapter", "both")
GSM8K_STYLES = ("plain", "annotated", "calculator")
TIR_STYLES = ("tool_calls", "text")
OVERLONG = ("drop", "truncate", "split-error")
CHAT_FAMILIES = ("auto", "qwen3", "harmony", "template")
REASONING_EFFORTS = ("low", "medium", "high")
MESH_AXES = ("dcn", "data", "fsdp", "expert", "tensor")
SHARD_AXES = ("fsdp", "expert")
"""The mesh axes over which weights are split; those of experts by expert over ``expert``, by row over ``fsdp``."""
BATCH_AXES = ("dcn", "data", *SHARD_AXES)
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
    model_name: str = option("", "Hub name, local folder, or built-in model (tiny-qwen3, tiny-gpt-oss).", "Model")
    model_revision: str | None = option(None, "Branch, tag or commit of the model.", "Model")
    tokenizer_name: str | None = option(None, "Hub name or folder of the tokenizer; the model's own if unset.", "Model")
    trust_remote_code: bool = option(
        False, "Run Python code that a model or tokenizer brings with it.", "Model", identity=False
    )
    precision: str = option(
        "bf16",
        "bf16 (bf16 compute, fp32 master weights), pure-bf16 (weights in bf16 too, rounded stochastically), or fp32.",
        "Model",
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
    lr_scheduler_type: str = option(
        "cosine",
        "After the warm-up: cosine or linear to 0, cosine_with_min_lr (to --min-lr-rate), constant, or wsd (constant, "
        "and at the end linear to 0).",
        "Optimisation",
    )
    lr_decay_ratio: float = option(
        0.1, "--lr-scheduler-type wsd: share of the optimizer steps over which the rate goes down.", "Optimisation"
    )
    min_lr_rate: float = option(
        0.1,
        "--lr-scheduler-type cosine_with_min_lr: share of the peak learning rate at which the cosine ends.",
        "Optimisation",
    )
    warmup_ratio: float = option(0.03, "Share of the optimizer steps spent warming up.", "Optimisation")
    warmup_steps: int | None = option(
        None, "Optimizer steps spent warming up; overrides --warmup-ratio.", "Optimisation"
    )
    optim: str = option(
        "adamw",
        "Optimizer: adamw, or adafactor, whose state is a row and a column of each matrix, not two more of its size.",
        "Optimisation",
    )
    weight_decay: float = option(0.0, "Decoupled weight decay; not on norms and biases.", "Optimisation")
    adam_beta1: float = option(0.9, "AdamW's first moment decay.", "Optimisation")
    adam_beta2: float = option(0.999, "AdamW's second moment decay.", "Optimisation")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", "Optimisation")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm; 0 = never.", "Optimisation")
    gradient_noise: bool = option(
        False,
        "Measure the gradient noise scale: the batch above which more rows a step help less and less.",
        "Optimisation",
        identity=False,
    )
    num_train_epochs: float = option(1.0, "Passes over the data, where --max-steps is not given.", "Optimisation")
    max_steps: int = option(-1, "Optimizer steps in all; overrides --num-train-epochs.", "Optimisation")
    seed: int = option(42, "Seed of data order and random weights.", "Optimisation")
    remat: str = option(
        "full",
        "What the backward pass computes again: none (all is kept), dots (matrix products and attention are kept) or "
        "full (only each layer's input is kept).",
        "Optimisation",
        identity=False,
    )
    # LoRA
    lora_rank: int = option(
        0, "Rank of LoRA adapters, trained beside frozen weights; 0 = all weights are trained.", "LoRA", alias="lora_r"
    )
    lora_alpha: int | None = option(
        None, "What an adapter adds is scaled by alpha / rank; twice the rank if unset.", "LoRA"
    )
    lora_targets: str = option(
        "all-linear",
        "What has adapters: all-linear (attention, MLPs and experts) or comma-separated names, such as q_proj,v_proj.",
        "LoRA",
    )
    lora_export: str = option(
        "both",
        "What a LoRA run leaves: merged (a plain model in model/), adapter (PEFT's files in adapter/) or both.",
        "LoRA",
        identity=False,
    )
    # Devices
    backend: str = option("auto", "auto, xla (TPU through SPMD) or native (CPU and GPUs).", "Devices", identity=False)
    mesh: str | None = option(
        None,
        'Devices along each axis, such as "fsdp=4,tensor=2"; one axis may be -1. If unset, all on fsdp, or natively on '
        "data (there fsdp splits the weights by FSDP2).",
        "Devices",
        identity=False,
    )
    torch_compile: bool = option(False, "Native: compile each layer by torch.compile.", "Devices", identity=False)
    scan_layers: bool = option(
        True, "XLA: compile one layer, and run it in a loop over all of them.", "Devices", identity=False
    )
    compilation_cache: bool = option(
        False,
        "XLA: keep compiled programs with the run, so that a resumed attempt reads them back. Not tried on a TPU yet.",
        "Devices",
        identity=False,
    )
    attention: str = option(
        "auto",
        "XLA: splash (JAX's kernel for TPUs) or torch. Native: segments (each packed sample by itself), flash (all in "
        "one kernel, on GPUs in bf16) or torch (one mask for all). auto takes what is fastest.",
        "Devices",
        identity=False,
    )
    experts: str = option(
        "auto",
        "XLA, models with experts: dropless (each token to all its experts, by a kernel for TPUs), capacity (a fixed "
        "number of rows for each expert, what is over is dropped and counted), dense (every expert sees every token) "
        "or auto, which is dropless on TPUs.",
        "Devices",
        identity=False,
    )
    expert_capacity: float = option(
        1.25,
        "--experts capacity: rows that an expert takes from a device, over the mean.",
        "Devices",
        identity=False,
    )
    loss_chunks: str = option(
        "auto",
        "XLA: the logits are made in chunks of the sequence (nothing is computed twice), or of the vocabulary (less "
        "memory for large models); auto goes by the size of the output layer.",
        "Devices",
        identity=False,
    )
    # Output
    output_dir: str = option(
        "", "Folder or gs://bucket/prefix that holds this run's own folder.", "Output", identity=False
    )
    run_id: str | None = option(
        None, "Name of the run; a hash of what makes it this run if unset.", "Output", identity=False
    )
    save_steps: int = option(
        500, "Optimizer steps between checkpoints; 0 = only at the end or on a signal.", "Output", identity=False
    )
    save_minutes: float = option(
        0.0, "Minutes between checkpoints, besides --save-steps; 0 = no clock.", "Output", identity=False
    )
    save_total_limit: int = option(
        3, "Committed checkpoints kept; the best by evaluation (accuracy, else loss) besides.", "Output", identity=False
    )
    async_save: bool = option(
        True,
        "Store checkpoints while training goes on; it stands still for the copy to host memory only.",
        "Output",
        identity=False,
    )
    resume_from_checkpoint: str = option(
        "auto",
        "auto (newest committed), none (start anew; refused if there is one), a step number, or the folder "
        "(gs://…/checkpoints/step-…/attempt-…) of another run's checkpoint to begin from.",
        "Output",
        identity=False,
    )
    allow_data_change: bool = option(
        False, "Resume although the training data is another; the row position is kept.", "Output", identity=False
    )
    preemption_grace: float = option(
        25.0, "Seconds that the machine leaves after its notice (SIGTERM or metadata).", "Output", identity=False
    )
    metadata_url: str = option(
        "http://metadata.google.internal/computeMetadata/v1",
        "Metadata service asked for preemption and maintenance; none = never asked.",
        "Output",
        identity=False,
    )
    eval_steps: int = option(0, "Optimizer steps between evaluations; 0 = only at the end.", "Output", identity=False)
    eval_samples: int = option(
        0,
        "Problems that the model answers at each evaluation, the same ones each time; 0 = none, so only the loss.",
        "Output",
        identity=False,
    )
    eval_task: str | None = option(
        None,
        "Whose problems --eval-samples takes: gsm8k, math500, synthetic-gsm8k or a dataset of questions and answers; "
        "those of the evaluation dataset, or held-out ones of synthetic-gsm8k where it is trained on, if unset.",
        "Output",
        identity=False,
    )
    eval_max_new_tokens: int = option(
        512, "--eval-samples: tokens after which an answer is cut.", "Output", identity=False
    )
    per_device_eval_batch_size: int = option(
        8, "--eval-samples: problems that a device answers at a time.", "Output", identity=False
    )
    loss_spike_factor: float = option(
        5.0,
        "A step is reported whose loss or gradient norm is so many standard deviations above the usual; 0 = none is.",
        "Output",
        identity=False,
    )
    logging_steps: int = option(10, "Optimizer steps between log lines.", "Output", identity=False)
    profile_steps: str | None = option(
        None,
        "Optimizer steps of which a trace of the devices is written into the run's folder, such as 10-15.",
        "Output",
        identity=False,
    )
    report_to: str = option("none", "Trackers, comma-separated: wandb, tensorboard, none.", "Output", identity=False)
    tracker_project: str | None = option(
        None, "wandb's project; WANDB_PROJECT or numina_finetune if unset.", "Output", identity=False
    )
    tracker_group: str | None = option(
        None, "wandb's group, which shows runs together, such as the trials of a sweep.", "Output", identity=False
    )
    push_to_hub: bool = option(
        False, "Upload the export to the Hugging Face hub at the end; needs a token.", "Output", identity=False
    )
    hub_model_id: str | None = option(
        None,
        "--push-to-hub: name or user/name; the run's name for the token's own user if unset. Of a LoRA run that "
        "leaves both, the adapter goes to the same name with -adapter.",
        "Output",
        identity=False,
    )
    hub_private: bool = option(False, "--push-to-hub: make a new repository a private one.", "Output", identity=False)
    dry_run: bool = option(
        False,
        "Check everything, prepare the data, say on a page what would run, and stop; no weights are read.",
        "Output",
        identity=False,
    )

    # --- derived ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> str:
        return self.tokenizer_name or self.model_name

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name and name != "none"]

    @property
    def adapters(self) -> dict[str, Any] | None:
        """What the run's adapters are; None where it trains all weights."""
        if not self.lora_rank:
            return None
        return {"rank": self.lora_rank, "scale": self.lora_scale, "targets": self.lora_targets}

    @property
    def lora_scale(self) -> float:
        """What the product of an adapter's two matrices counts; of a run with ``--lora-rank`` only."""
        return (2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha) / self.lora_rank

    @property
    def profiled_steps(self) -> range:
        """``--profile-steps`` as numbers, the first optimizer step being 1; empty if unset."""
        if self.profile_steps is None:
            return range(0)
        first, _, last = self.profile_steps.partition("-")
        return range(int(first), int(last or first) + 1)

    @property
    def resolved_run_id(self) -> str:
        """``--run-id``, or a short name that is the same for every life of the same run."""
        if self.run_id:
            return self.run_id
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:10]
        return f"{Path(self.model_name).name}-{digest}".lower()

    @property
    def run_url(self) -> str:
        """The run's own place: a folder, or ``gs://…``."""
        return f"{self.output_dir.rstrip('/') or '/'}/{self.resolved_run_id}"

    @property
    def run_dir(self) -> Path:
        """The run's own folder on this machine: its place, or where files are made that go to its place."""
        if not self.output_dir.startswith("gs://"):
            return Path(self.output_dir).expanduser() / self.resolved_run_id
        cache = self.cache_dir if self.cache_dir and not self.cache_dir.startswith("gs://") else tempfile.gettempdir()
        key = hashlib.sha256(self.output_dir.encode()).hexdigest()[:10]
        return Path(cache).expanduser() / f"numina-runs-{key}" / self.resolved_run_id

    @property
    def token_cache(self) -> str | None:
        """Where tokenised data is cached; the machines of a run in a bucket share what one of them prepared."""
        if self.cache_dir is None and self.output_dir.startswith("gs://"):
            return f"{self.output_dir.rstrip('/')}/cache"
        return self.cache_dir

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: two commands with equal identities continue one another.

        Logging, saving, mesh and paths are not part of it. The batch enters as it was asked for, so that the same
        command on another mesh finds its run again (and keeps the global batch that the run began with).
        """
        identity = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity")}
        if not self.lora_rank:  # runs that began before there were adapters go on
            identity = {name: value for name, value in identity.items() if not name.startswith("lora_")}
        # What has no effect is left out, and so is what came later: runs that began without it go on.
        if self.lr_scheduler_type != "wsd":
            del identity["lr_decay_ratio"]
        if self.lr_scheduler_type != "cosine_with_min_lr":
            del identity["min_lr_rate"]
        if self.warmup_steps is None:
            del identity["warmup_steps"]
        if self.experts == "capacity":  # the only form that computes something else: it drops tokens
            identity["expert_capacity"] = self.expert_capacity
        identity["against"] = list(self.against)  # as YAML gives it back
        identity["datasets"] = [dataclasses.asdict(source) for source in self.datasets]
        if self.global_batch_size is not None:
            identity["global_batch_size"] = self.global_batch_size
        else:
            identity["per_device_train_batch_size"] = self.per_device_train_batch_size
            identity["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        return identity

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
        values = typed_values(RunConfig, {k: v for k, v in mapping.items() if k != "datasets"}, where, faults)
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
            sources.append(typed_values(SourceConfig, entry, place, faults))
        if faults:
            raise ConfigError(faults)
        return RunConfig(**values, datasets=tuple(SourceConfig(**source) for source in sources))
