"""Real data and tokenizers, where they are; a tiny byte-level tokenizer everywhere."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests import conftest


@pytest.fixture(scope="session")
def real_data() -> Path:
    return conftest.real_data()


@pytest.fixture(scope="session")
def real_rows(real_data: Path) -> Callable[..., list[dict[str, Any]]]:
    """``real_rows("gsm8k/test.jsonl", 100)``: the first rows of a file."""

    def read(name: str, count: int | None = None) -> list[dict[str, Any]]:
        with (real_data / name).open(encoding="utf-8") as file:
            return [json.loads(line) for _, line in zip(range(count or 10**9), file, strict=False)]

    return read


@pytest.fixture(scope="session")
def qwen3(real_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen3")


@pytest.fixture(scope="session")
def gpt_oss(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    source, folder = real_data / "tokenizers" / "gpt-oss", tmp_path_factory.mktemp("gpt-oss")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copy(source / "tokenizer_config.json", folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def with_template(real_data: Path) -> Callable[..., PreTrainedTokenizerBase]:
    """``with_template("Qwen-Qwen2.5-7B-Instruct", "<|eot_id|>")``: Qwen's vocabulary, another model's template."""

    def make(name: str, *special: str) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen3")
        tokenizer.chat_template = (real_data / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer.add_tokens(list(special), special_tokens=True)
        if special:
            tokenizer.eos_token = special[-1]
        tokenizer.add_special_tokens({"extra_special_tokens": list(special)}, replace_extra_special_tokens=False)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny() -> PreTrainedTokenizerBase:
    """One token a byte, and Qwen3's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
