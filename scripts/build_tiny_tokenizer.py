"""Build the embedded tokenizer from the text of the synthetic problems.

    python scripts/build_tiny_tokenizer.py [FOLDER]

Byte-level BPE, so that every text encodes and decodes without loss; digits one by one, as Qwen splits them; the
special tokens and the chat layout are those of Qwen3, so that code written for one works with the other. The result is
the same on every run. The chat template beside it, ``chat_template.jinja``, is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from numina_finetune.data.synthetic import generate_problems
from numina_finetune.models.builtin import TINY_TOKENIZER

LARGEST_VOCABULARY = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Whole tokens that are nevertheless ordinary text: decoding keeps them."""
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""BPE never merges across these: words, single digits, runs of punctuation, line ends, other white space."""
LAYOUT = ("system\n", "user\n", "assistant\n", "\n\n")
"""Text of the chat layout, which the problems do not contain."""


def build(folder: Path) -> Tokenizer:
    """Train the tokenizer and write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY - len(SPECIAL) - len(MARKS),
        min_frequency=10,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_settings(), indent=2) + "\n", encoding="utf-8")
    return tokenizer


def _text() -> Iterator[str]:
    for row in generate_problems("train"):
        yield row["question"]
        yield row["answer"]
        yield from LAYOUT


def _settings() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY_TOKENIZER
    print(f"{build(target).get_vocab_size()} tokens written to {target}")
