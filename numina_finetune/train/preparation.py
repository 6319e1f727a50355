"""What a run trains, and on what: the model's commit, the tokenised data, and how many steps of which batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data.dataset import build_index
from numina_finetune.data.loader import Loader
from numina_finetune.data.prepare import IndexOptions
from numina_finetune.data.sources import evaluation_source
from numina_finetune.data.token_index import TokenIndex, cap_samples, split_validation
from numina_finetune.models.hub import commit_of
from numina_finetune.train.backend import Backend, say
from numina_finetune.train.batch import plan_batch, plan_steps
from numina_finetune.train.trainer import Plan


@dataclass(frozen=True)
class Data:
    """Rows to train on, and perhaps to evaluate on."""

    index: TokenIndex
    train: Loader
    evaluation: Loader | None


def describe(data: Data, plan: Plan) -> str:
    report, batch = data.index.report, plan.batch
    dropped = sum(entry["count"] for source in report["sources"] for entry in source["dropped"].values())
    return (
        f"{len(data.index)} samples ({dropped} rows dropped), {data.train.rows_per_epoch} packed rows an epoch; "
        f"{plan.total_steps} optimizer steps of {batch.global_batch} rows "
        f"({batch.accumulation} x {batch.rows_per_micro_batch})"
    )


def model_commit(config: RunConfig, record: Mapping[str, Any] | None) -> str | None:
    """The commit of the model on the hub that all lives of the run load; None where it has none.

    A run of before commits were recorded goes on with what its revision means now.

    Raises:
        ConfigError: there is no such model.
    """
    if record is not None:
        return record.get("model_commit")
    return commit_of(config.model_name, config.model_revision)


def prepare(
    config: RunConfig, backend: Backend, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any] | None
) -> tuple[Data, Plan]:
    """The tokenised data, and what is to be done with it on this mesh."""
    data = load_data(config, tokenizer)
    batch = plan_batch(config, backend.data_parallel_size, record["global_batch_size"] if record else None)
    if record and batch.accumulation != config.gradient_accumulation_steps and config.global_batch_size is None:
        say(backend, f"accumulation is {batch.accumulation} here, to keep the run's {batch.global_batch} rows a step")
    rows = data.train.rows_for_epochs(config.num_train_epochs)
    total_rows = None if config.max_steps > 0 else rows
    return data, Plan(batch, plan_steps(config, rows, batch.global_batch), total_rows)


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The tokenised data in the order in which the run takes it."""
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
        config.token_cache,
        workers=config.preprocessing_num_workers,
        streaming=config.streaming,
    )
