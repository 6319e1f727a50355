"""The accuracy of a model in training: the same problems each time, answered greedily where the weights lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import GenerationConfig, PreTrainedTokenizerBase

from numina_finetune.config import RunConfig
from numina_finetune.data.chat import ChatOptions
from numina_finetune.data.sources import SYNTHETIC, evaluation_source, resolve_source
from numina_finetune.errors import ConfigError, UserError
from numina_finetune.evaluation.prompts import PromptOptions, Prompts
from numina_finetune.evaluation.run import run_batches
from numina_finetune.evaluation.scoring import figures
from numina_finetune.evaluation.solving import solve_directly
from numina_finetune.evaluation.tasks import Problems, Task, find_task, load_problems
from numina_finetune.models.load import load_config
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.train.accuracy import Accuracy, MeasureAccuracy
from numina_finetune.train.backend import Backend, Decoding, DecodingStopped


def faults(config: RunConfig) -> list[str]:
    """What is wrong with ``--eval-samples``, before anything expensive; nothing where it is not asked for."""
    if config.eval_samples < 1 or not config.model_name:
        return []
    try:
        asked, tokenizer = _problems(config), load_tokenizer(config)
        prompts = _prompts(config, tokenizer)
        limit = getattr(load_config(config, tokenizer), "max_position_embeddings", None)
        longest = max(len(prompts.ids(problem.question)) for problem in asked.problems)
    except UserError as error:
        return error.problems
    if limit is not None and longest + config.eval_max_new_tokens > limit:
        return [
            f"--eval-max-new-tokens {config.eval_max_new_tokens} behind the longest prompt ({longest} tokens) is more "
            f"than the {limit} positions of {config.model_name}: use {max(limit - longest, 0)} or less"
        ]
    return []


def make_evaluator(
    config: RunConfig, backend: Backend, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> MeasureAccuracy:
    """What measures the accuracy of the model that the backend holds, whenever it is called."""
    asked, prompts = _problems(config), _prompts(config, tokenizer)
    rows = config.per_device_eval_batch_size * backend.data_parallel_size
    decoding = Decoding(
        max_new_tokens=config.eval_max_new_tokens,
        stop_ids=prompts.stop_ids(generation),
        pad_id=int(tokenizer.pad_token_id),
        batch_size=rows,
    )

    def measure(stop: Callable[[], bool]) -> Accuracy | None:
        solve = solve_directly(prompts, partial(backend.generate, stop=stop), decoding)
        try:
            records = run_batches(asked, solve, samples=1, rows=rows, stop=stop)
        except DecodingStopped:
            return None
        if records is None:
            return None
        found = figures(records, asked.style)
        return Accuracy(found.problems, found.accuracy, found.lower, found.upper)

    return measure


def _problems(config: RunConfig) -> Problems:
    """
    Raises:
        ConfigError, DataError: there are none to ask.
    """
    return load_problems(_task(config), config.eval_samples, config.seed)


def _task(config: RunConfig) -> Task:
    if config.eval_task:
        return find_task(config.eval_task, None, None, None)
    if source := evaluation_source(config):
        return Task(source.name, source, None)
    if any(resolve_source(source).name == SYNTHETIC for source in config.datasets):
        return find_task(SYNTHETIC, None, None, None)
    raise ConfigError(
        f"--eval-samples {config.eval_samples} has no problems with known answers: name a benchmark or a dataset with "
        "--eval-task"
    )


def _prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """As training puts them."""
    chat = ChatOptions(config.chat_family, config.chat_date, config.reasoning_effort)
    return Prompts(tokenizer, PromptOptions(system_prompt=config.system_prompt, chat=chat))
