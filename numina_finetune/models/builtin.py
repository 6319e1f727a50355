"""Built-in models: real architectures, small and random, for the quickstart and the tests.

They use the embedded tokenizer (``tiny_tokenizer/``, built by ``scripts/build_tiny_tokenizer.py``) unless another is
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GptOssConfig, PretrainedConfig, PreTrainedTokenizerBase, Qwen3Config

BUILTIN = frozenset({"tiny-qwen3", "tiny-gpt-oss"})
"""Names that ``--model-name`` takes without a hub or a folder."""

TINY_TOKENIZER = Path(__file__).parent / "tiny_tokenizer"
"""Folder of the embedded tokenizer; ``AutoTokenizer.from_pretrained`` loads it."""

VOCABULARY_MULTIPLE = 64
"""The embedding has a multiple of this many rows, so that every mesh can shard it."""


_CALL = "<|call|>"


def tiny_config(name: str, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a built-in model for ``tokenizer``; every sharded dimension is divisible by 4.

    Raises:
        ValueError: ``name`` is not a built-in model.
    """
    if name not in BUILTIN:
        raise ValueError(f"{name!r} is no built-in model: use one of {', '.join(sorted(BUILTIN))}")
    rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    common: dict[str, Any] = {
        "vocab_size": rows,
        "head_dim": 32,
        "initializer_range": 0.08,  # learned to copy in about half the steps that the usual 0.02 took
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if name == "tiny-gpt-oss":
        call = tokenizer.get_vocab().get(_CALL)
        if call is not None:  # in Harmony a turn may end in a call as well
            common["eos_token_id"] = [tokenizer.eos_token_id, call]
        return GptOssConfig(
            **common,
            num_hidden_layers=4,  # two pairs, so that there is something to loop over
            hidden_size=128,
            intermediate_size=128,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=4,
            sliding_window=16,
            max_position_embeddings=131072,
        )
    return Qwen3Config(
        **common,
        num_hidden_layers=2,
        hidden_size=192,
        intermediate_size=576,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
