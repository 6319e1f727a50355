"""Built-in models: real architectures, small and random, for the quickstart and the tests.

They use the embedded tokenizer (``tiny_tokenizer/``, built by ``scripts/build_tiny_tokenizer.py``) unless another is
named.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen3Config

BUILTIN = frozenset({"tiny-qwen3"})
"""Names that ``--model-name`` takes without a hub or a folder."""

TINY_TOKENIZER = Path(__file__).parent / "tiny_tokenizer"
"""Folder of the embedded tokenizer; ``AutoTokenizer.from_pretrained`` loads it."""

VOCABULARY_MULTIPLE = 64
"""The embedding has a multiple of this many rows, so that every mesh can shard it."""


def tiny_config(name: str, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """The configuration of a built-in model for ``tokenizer``; every sharded dimension is divisible by 4.

    Raises:
        ValueError: ``name`` is not a built-in model.
    """
    if name not in BUILTIN:
        raise ValueError(f"{name!r} is no built-in model: use one of {', '.join(sorted(BUILTIN))}")
    rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return Qwen3Config(
        vocab_size=rows,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        initializer_range=0.08,  # learned to copy in about half the steps that the usual 0.02 took
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
