"""The model that ``evaluate`` or ``generate`` asks: a folder, a hub name, a built-in one, or a run's checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from numina_finetune.checkpoint.reading import Checkpoint, drop_unsound
from numina_finetune.checkpoint_commands import best_checkpoint, of_step, one_run
from numina_finetune.config import RunConfig
from numina_finetune.errors import CheckpointError, ConfigError
from numina_finetune.evaluation.options import AnswerOptions
from numina_finetune.models.builtin import BUILTIN
from numina_finetune.models.export import trained_weights
from numina_finetune.models.load import (
    base_fingerprint,
    load_config,
    load_generation_config,
    open_model,
    weights_fingerprint,
)
from numina_finetune.models.precision import EXPORT_DTYPES
from numina_finetune.models.stream import Wanted, Weights, whole
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.models.weights import NamedWeights, WeightParts
from numina_finetune.storage import Store, open_store
from numina_finetune.train.backend import Decoding
from numina_finetune.train.record import RECORD, base_faults, read_record, recorded_config

_SHORTEST = 2
"""``max_seq_length``, which is of training: the least that no model is too short for."""

Opened = tuple[PreTrainedModel, Weights | None]
"""As :func:`numina_finetune.models.load.open_model` gives it."""


@dataclass(frozen=True)
class AskedModel:
    """A model that has been found, not loaded yet."""

    config: RunConfig
    """As what a backend takes it."""
    tokenizer: PreTrainedTokenizerBase
    architecture: PretrainedConfig
    generation: GenerationConfig
    identity: dict[str, Any]
    """What tells it from other models."""
    open: Callable[[], Opened]

    def refuse_beyond(self, longest: int, new: int, remedy: str) -> None:
        """Refuse what goes beyond the positions that the model knows.

        Args:
            longest: tokens of the longest prompt.
            new: tokens that may come behind it.
            remedy: what else than fewer new ones would help.

        Raises:
            ConfigError: naming the limit.
        """
        limit = getattr(self.architecture, "max_position_embeddings", None)
        if limit is not None and longest + new > limit:
            raise ConfigError(
                f"--max-new-tokens {new} behind the longest prompt ({longest} tokens) is more than the {limit} "
                f"positions of {self.config.model_name}: use {max(limit - longest, 0)} or less, or {remedy}"
            )

    def decoding(self, options: AnswerOptions, stop_ids: frozenset[int]) -> Decoding:
        """How the options have its tokens chosen."""
        return Decoding(
            max_new_tokens=options.max_new_tokens,
            stop_ids=stop_ids,
            pad_id=int(self.tokenizer.pad_token_id),
            batch_size=options.batch_size,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        )


def find_model(options: AnswerOptions) -> AskedModel:
    """What ``--model`` names.

    Raises:
        ConfigError, CheckpointError: there is no such thing, or it cannot be asked.
    """
    run = _run_at(options.model)
    return _of_run(run, options) if run else _of_name(options)


def _of_name(options: AnswerOptions) -> AskedModel:
    folder = Path(options.model).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {options.model} holds adapters alone: give the run that they are of, or a merged model "
            "(numina-finetune export … --lora-export merged)"
        )
    config = RunConfig(
        model_name=options.model,
        model_revision=options.model_revision,
        **_placed_as(options, options.precision or "fp32"),
    )
    tokenizer = load_tokenizer(config)
    architecture = load_config(config, tokenizer)
    if options.precision is None and options.model not in BUILTIN and architecture.dtype != torch.float32:
        config = replace(config, precision="pure-bf16")
    return AskedModel(
        config,
        tokenizer,
        architecture,
        load_generation_config(config, architecture),
        {"weights": weights_fingerprint(config), "precision": config.precision},
        lambda: open_model(config, tokenizer),
    )


def _of_run(store: Store, options: AnswerOptions) -> AskedModel:
    record = read_record(store)
    if record is None:
        raise CheckpointError(f"--model {store.url} has no {RECORD} or no committed checkpoint: nothing to ask")
    trained = recorded_config(record, store.address(RECORD), trust_remote_code=options.trust_remote_code)
    if faults := base_faults(record, base_fingerprint(trained)):
        raise CheckpointError(faults)
    checkpoint = _checkpoint(store, options.checkpoint)
    precision = options.precision or ("fp32" if trained.precision == "fp32" else "pure-bf16")
    config = RunConfig(
        model_name=trained.model_name,
        model_revision=trained.model_revision,
        **{"tokenizer_name": trained.tokenizer_name, **_placed_as(options, precision)},
    )
    tokenizer = load_tokenizer(config)

    def opened() -> Opened:
        model, _ = open_model(config, tokenizer, weights=False)
        shards = checkpoint.open().shards()
        named = trained_weights(shards, trained, tokenizer, EXPORT_DTYPES[precision])
        return model, _source(model, named)

    architecture = load_config(config, tokenizer)
    return AskedModel(
        config,
        tokenizer,
        architecture,
        load_generation_config(config, architecture),
        {"checkpoint": f"step {checkpoint.step}, attempt {checkpoint.attempt}", "precision": precision},
        opened,
    )


def _placed_as(options: AnswerOptions, precision: str) -> dict[str, Any]:
    """What a backend asks of a run's configuration, besides the model."""
    values = {"tokenizer_name": options.tokenizer_name} if options.tokenizer_name else {}
    return {
        **values,
        "precision": precision,
        "trust_remote_code": options.trust_remote_code,
        "max_seq_length": _SHORTEST,
        "backend": options.backend,
        "mesh": options.mesh,
        "experts": options.experts,
        "scan_layers": options.scan_layers,
        "attention": "torch",
        "remat": "none",
    }


def _source(model: PreTrainedModel, named: NamedWeights) -> Weights | None:
    """Where the model's values come from; None once they are there, as a model that has values is given them."""
    parts = WeightParts(named)
    filled = [(name, value) for name, value in model.named_parameters() if not value.is_meta]
    if not filled:
        return parts
    parts.read([Wanted(name, whole(value.shape), value.detach()) for name, value in filled])
    return None


def _run_at(url: str) -> Store | None:
    """The run in that place; None where it is a model's."""
    if url.startswith("gs://"):
        return open_store(url) if open_store(url).stat(RECORD) else None
    folder = Path(url).expanduser()
    if url in BUILTIN or not folder.is_dir() or any(folder.glob("*config.json")):
        return None
    return one_run(url)


def _checkpoint(store: Store, wish: str) -> Checkpoint:
    if wish == "best":
        return best_checkpoint(store)
    return drop_unsound(of_step(store, None if wish == "newest" else int(wish)))[0]
