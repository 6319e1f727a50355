"""The embedded tokenizer and the built-in model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from numina_finetune.data.chat import render, render_prompt, resolve_family
from numina_finetune.data.synthetic import generate_problems
from numina_finetune.models.builtin import TINY_TOKENIZER, tiny_config

ROOT = Path(__file__).parents[2]
TEXTS = [
    "",
    " leading and trailing ",
    "48/2 = <<48/2=24>>24 clips\n\n#### 24",
    "line\r\nends\t\n \n",
    "Ünïcödé “quotes” 数学 🧮 e\u0301 \u00e9",
    "\\frac{1}{2} \\boxed{x^2+1}",
    "".join(map(chr, range(0x250))),
    "<think>\nplan\n</think> <tool_call>{}</tool_call>",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own_and_common_words_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in (" apples", " How", " many", " have", " <<", "####"))


def test_chat_marks_are_single_tokens_and_only_the_control_tokens_are_special(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    special = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    names = ("think", "tool_call", "tool_response")
    marks = {f"<{slash}{name}>" for name in names for slash in ("", "/")}
    assert all(len(tokenizer(mark)["input_ids"]) == 1 for mark in special | marks)
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>", "<|im_end|>"}
    text = "<|im_start|>" + "".join(sorted(marks)) + "<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "".join(sorted(marks))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_chats_are_laid_out_as_qwen3_does_with_thinking_off(tokenizer: PreTrainedTokenizerBase) -> None:
    question = [{"role": "user", "content": "2+3?"}]
    prompt = "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    generation = tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert generation == prompt
    answer = [*question, {"role": "assistant", "content": "5"}]
    assert tokenizer.apply_chat_template(answer, tokenize=False) == prompt + "5<|im_end|>\n"
    assert tokenizer.decode(render_prompt(question, tokenizer)) == prompt
    assert resolve_family(tokenizer) == "qwen3"


def test_a_generated_problem_is_short(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in generate_problems("train", count=500):
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        assert len(render({"messages": turns}, tokenizer).input_ids) <= 128


def test_the_script_rebuilds_the_shipped_tokenizer(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build", ROOT / "scripts" / "build_tiny_tokenizer.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.build(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TINY_TOKENIZER / name).read_text()), name


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-gpt-oss"])
def test_the_tiny_model_fits_its_tokenizer_and_shards_over_four_devices(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    config = tiny_config(name, tokenizer)
    assert config.vocab_size >= len(tokenizer) and config.vocab_size % 64 == 0
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config)
    assert 1e6 <= model.num_parameters() <= 3e6
    assert all(size % 4 == 0 for parameter in model.parameters() for size in parameter.shape)


def test_an_unknown_name_is_refused_with_the_known_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="'tiny-llama' is no built-in model: use one of tiny-gpt-oss, tiny-qwen3"):
        tiny_config("tiny-llama", tokenizer)
