"""A run's tokenizer, loaded without what a model needs."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.models.builtin import BUILTIN, TINY_TOKENIZER
from numina_finetune.models.hub import from_hub, resolve_name


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of ``--tokenizer-name``, or of the model.

    Raises:
        ConfigError: it does not exist, or has neither a padding nor an end token.
    """
    name = resolve_name(config.tokenizer)
    if name in BUILTIN:
        return _without_traces(AutoTokenizer.from_pretrained(str(TINY_TOKENIZER)))
    own = config.tokenizer_name is not None
    option, revision = ("--tokenizer-name", None) if own else ("--model-name", config.model_revision)
    tokenizer = from_hub(AutoTokenizer, name, option, trust=config.trust_remote_code, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"{option} {name} has a tokenizer with neither a padding nor an end token: use another tokenizer"
        )
    return _without_traces(tokenizer)


def _without_traces(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Without what an export would tell of the process that loaded it: whether it was kept off the hub."""
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer
