"""What is wrong with a run's options, as far as it can be seen without opening a file or a device."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import date
from urllib.parse import urlsplit

from numina_finetune.config import (
    ATTENTION,
    BACKENDS,
    CHAT_FAMILIES,
    EXPERTS,
    FORMATS,
    GSM8K_STYLES,
    LORA_EXPORTS,
    LOSS_CHUNKS,
    OPTIMIZERS,
    OVERLONG,
    PRECISIONS,
    REASONING_EFFORTS,
    REMAT,
    SCHEDULES,
    TIR_STYLES,
    TRACKERS,
    RunConfig,
    SourceConfig,
)
from numina_finetune.option_fields import flag


def config_faults(config: RunConfig) -> list[str]:
    """Every fault that can be seen without opening a file or a device."""
    return [
        *_missing(config),
        *_not_among(config),
        *_out_of_range(config),
        *_contradictions(config),
        *(fault for source in config.datasets for fault in _source_faults(source)),
    ]


def _missing(config: RunConfig) -> list[str]:
    faults = []
    if not config.datasets:
        faults.append(
            "--dataset-name is missing: give a hub name, a folder or a .jsonl/.parquet file "
            "(or run `numina-finetune quickstart`, which needs none)"
        )
    if not config.model_name:
        faults.append("--model-name is missing: give a hub name, a folder, or tiny-qwen3")
    if not config.output_dir:
        faults.append("--output-dir is missing: give the folder that will hold the run")
    return faults


def _not_among(config: RunConfig) -> list[str]:
    allowed = {
        "precision": PRECISIONS,
        "remat": REMAT,
        "attention": ATTENTION,
        "experts": EXPERTS,
        "loss_chunks": LOSS_CHUNKS,
        "lr_scheduler_type": SCHEDULES,
        "backend": BACKENDS,
        "optim": OPTIMIZERS,
        "lora_export": LORA_EXPORTS,
        "gsm8k_style": GSM8K_STYLES,
        "tir_style": TIR_STYLES,
        "chat_family": CHAT_FAMILIES,
        "reasoning_effort": REASONING_EFFORTS,
        "overlong": OVERLONG,
    }
    faults = choice_faults(config, allowed)
    faults += [
        f"--report-to {name!r} is unknown: use {', '.join(TRACKERS)}"
        for name in config.report_to.split(",")
        if name and name not in TRACKERS
    ]
    wish = config.resume_from_checkpoint
    if wish not in ("auto", "none") and not wish.isdecimal() and "/" not in wish:
        faults.append(
            f"--resume-from-checkpoint {wish!r} is unknown: use auto, none, a step number, or the path of a "
            "checkpoint's folder"
        )
    return faults


def _out_of_range(config: RunConfig) -> list[str]:
    at_least: dict[str, float] = {
        "max_seq_length": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_total_limit": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "save_minutes": 0,
        "eval_steps": 0,
        "eval_samples": 0,
        "eval_max_new_tokens": 1,
        "per_device_eval_batch_size": 1,
        "preemption_grace": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "loss_spike_factor": 0,
        "learning_rate": 0,
        "validation_size": 0,
        "seed": 0,
        "lora_rank": 0,
    }
    faults = bound_faults(config, at_least)
    for name in ("warmup_ratio", "lr_decay_ratio", "min_lr_rate"):
        if not 0 <= getattr(config, name) <= 1:
            faults.append(f"{flag(name)} {getattr(config, name)} is out of range: use a share from 0 to 1")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            faults.append(f"{flag(name)} {getattr(config, name)} is out of range: use 0 up to, but not, 1")
    if not 0 < config.expert_capacity < math.inf:
        faults.append(f"--expert-capacity {config.expert_capacity} is out of range: use more than 0, such as 1.25")
    if not config.adam_epsilon > 0:
        faults.append(f"--adam-epsilon {config.adam_epsilon} is too small: use more than 0, such as 1e-8")
    if config.max_steps < 1 and config.max_steps != -1:
        faults.append(f"--max-steps {config.max_steps} is out of range: use 1 or more, or -1 for whole epochs")
    if not 0 < config.num_train_epochs < math.inf:
        faults.append(f"--num-train-epochs {config.num_train_epochs} is out of range: use more than 0")
    for name, least in (
        ("global_batch_size", 1),
        ("preprocessing_num_workers", 1),
        ("lora_alpha", 1),
        ("warmup_steps", 0),
    ):
        value = getattr(config, name)
        if value is not None and value < least:
            faults.append(f"{flag(name)} {value} is too small: use {least} or more")
    if config.profile_steps is not None and not _is_range(config.profile_steps):
        faults.append(f"--profile-steps {config.profile_steps!r} is no range of steps: write it as 10-15")
    if not is_date(config.chat_date):
        faults.append(f"--chat-date {config.chat_date!r} is no date: write it as 2025-06-28")
    return faults


def _contradictions(config: RunConfig) -> list[str]:
    faults = []
    weighted = [source for source in config.datasets if source.weight is not None]
    if weighted and len(weighted) < len(config.datasets):
        faults.append(
            f"--dataset-weight is given for {len(weighted)} of {len(config.datasets)} datasets: "
            "give it for each, or for none (then every row is seen once an epoch)"
        )
    if config.gradient_noise and (config.optim != "adamw" or config.adam_beta1 == 0):
        which = f"--optim {config.optim}" if config.optim != "adamw" else "--adam-beta1 0"
        faults.append(f"--gradient-noise is measured with AdamW's first moment, which {which} has not: leave one out")
    by_shares = config.lr_scheduler_type == "wsd" and config.warmup_steps is None
    if by_shares and config.warmup_ratio + config.lr_decay_ratio > 1:
        faults.append(
            f"--warmup-ratio {config.warmup_ratio} and --lr-decay-ratio {config.lr_decay_ratio} are more than the "
            "whole run: use shares that come to 1 or less"
        )
    if config.warmup_steps is not None and 0 < config.max_steps < config.warmup_steps:
        faults.append(
            f"--warmup-steps {config.warmup_steps} is more than --max-steps {config.max_steps}: the peak learning rate "
            "would never be reached; use fewer"
        )
    if config.eval_dataset_name and config.validation_size:
        faults.append(
            f"--eval-dataset-name {config.eval_dataset_name} and --validation-size {config.validation_size:g} both "
            "name the evaluation data: keep one"
        )
    if config.eval_steps and not (config.eval_dataset_name or config.validation_size or config.eval_samples):
        faults.append(
            f"--eval-steps {config.eval_steps} has nothing to evaluate: add --eval-dataset-name or --validation-size "
            "for the loss, --eval-samples for the accuracy"
        )
    if config.eval_task and not config.eval_samples:
        faults.append(f"--eval-task {config.eval_task} is not asked anything: say of how many problems, --eval-samples")
    if config.global_batch_size is not None and config.gradient_accumulation_steps != 1:
        faults.append(
            f"--global-batch-size {config.global_batch_size} and --gradient-accumulation-steps "
            f"{config.gradient_accumulation_steps} both set the accumulation: keep one"
        )
    if config.decontaminate and not config.against:
        faults.append("--decontaminate has no benchmark to look for: add --against, such as --against gsm8k:test")
    if config.lora_rank == 0:
        faults += [
            f"{flag(f.name)} {getattr(config, f.name)} has no adapters to be about: add --lora-rank, such as "
            "--lora-rank 16"
            for f in fields(config)
            if f.name.startswith("lora_") and getattr(config, f.name) != f.default
        ]
    faults += [
        f"{flag(name)} {getattr(config, name)} is for wandb, which is not asked for: add --report-to wandb"
        for name in ("tracker_project", "tracker_group")
        if getattr(config, name) is not None and "wandb" not in config.trackers
    ]
    scheme, separator, rest = config.output_dir.partition("://")
    if separator and (scheme != "gs" or not rest.split("/")[0]):
        faults.append(f"--output-dir {config.output_dir} is no place to store: give gs://bucket/prefix or a folder")
    if config.metadata_url != "none" and not _is_plain_http(config.metadata_url):
        faults.append(
            f"--metadata-url {config.metadata_url!r} is no address of a metadata service: "
            "write it as http://HOST[:PORT]/PATH, or none"
        )
    run_id = config.run_id
    if run_id is not None and (not run_id.strip() or "/" in run_id or run_id.startswith(".")):
        faults.append(f"--run-id {config.run_id!r} cannot name a folder: use letters, digits, - and _")
    return faults


def backend_faults(config: RunConfig, backend: str) -> list[str]:
    """The options that the backend, ``xla`` or ``native``, has not."""
    if backend == "xla":
        faults = ["--torch-compile is for the native backend: leave it out, XLA compiles the whole step"]
        faults = faults if config.torch_compile else []
        if config.attention in ("segments", "flash"):
            faults.append(f"--attention {config.attention} is for the native backend: use auto, splash or torch")
        if config.precision == "pure-bf16" and importlib.util.find_spec("jax") is None:
            faults.append(
                "--precision pure-bf16 rounds by JAX on XLA, which is not installed: use bf16, or pip install jax"
            )
        return faults
    faults = []
    if config.attention == "splash":
        faults.append("--attention splash is a kernel for TPUs: use auto, segments, flash or torch with this backend")
    if config.experts not in ("auto", "dense"):
        faults.append(f"--experts {config.experts} is for XLA: use auto or dense with the native backend")
    if config.compilation_cache:
        faults.append("--compilation-cache keeps XLA's programs: leave it out with the native backend")
    if config.torch_compile and config.remat == "dots":
        faults.append("--torch-compile with --remat dots: compiled layers keep all or their input: use none or full")
    return faults


def choice_faults(options: object, allowed: Mapping[str, Sequence[str | None]]) -> list[str]:
    """The options whose values are not among the allowed ones; None among them means that one may be unset."""
    return [
        f"{flag(name)} {getattr(options, name)!r} is unknown: use one of {', '.join(filter(None, choices))}"
        for name, choices in allowed.items()
        if getattr(options, name) not in choices
    ]


def bound_faults(options: object, at_least: Mapping[str, float]) -> list[str]:
    """The options whose numbers are too small, or no numbers."""
    return [
        f"{flag(name)} {getattr(options, name)} is too small: use {bound:g} or more"
        for name, bound in at_least.items()
        if not getattr(options, name) >= bound or not math.isfinite(getattr(options, name))
    ]


def _is_range(text: str) -> bool:
    match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    return match is not None and int(match[1]) <= int(match[2] or match[1])


def is_date(text: str) -> bool:
    """Whether it is a date, written YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_plain_http(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and not parts.query + parts.fragment
    except ValueError:  # a port that is no number
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
