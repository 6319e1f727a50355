"""Exact match of greedy answers."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from numina_finetune.evaluation.accuracy import exact_match, score
from numina_finetune.models.builtin import TINY_TOKENIZER


def test_exact_match_counts_right_wrong_and_missing_answers() -> None:
    gold = ["1+1 = <<1+1=2>>2\n#### 2", "#### 1,000", "#### 3", "#### 2"]
    report = score(gold, ["so\n#### 2", "#### 1000", "#### 4", "I do not know"])
    assert (report.n, report.correct, report.accuracy, report.invalid) == (4, 2, 0.5, 1)
    assert report.majority == 0.5
    assert report.lower < 0.5 < report.upper


def test_a_model_that_knows_nothing_scores_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    report = exact_match(
        Qwen3ForCausalLM(config),
        tokenizer,
        [{"question": "2+3?", "answer": "#### 5"}] * 3,
        prompt_ids=lambda question: tokenizer(question)["input_ids"],
        batch_size=2,
        max_new_tokens=8,
    )
    assert (report.n, report.correct, report.invalid, report.majority) == (3, 0, 3, 1.0)
