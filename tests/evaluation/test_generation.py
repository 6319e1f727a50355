"""Greedy decoding with a fixed cache says what transformers' own ``generate`` says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from numina_finetune.evaluation.accuracy import exact_match, score
from numina_finetune.evaluation.generation import generate_greedy
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.generation import READ_EVERY

PAD, END = 0, 1
PROMPTS = [[5, 9, 23], [7], [40, 41, 42, 43, 44, 45, 46, 47], [60, 2, 60, 2], [11, 12]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return Qwen3ForCausalLM(config).eval()


def reference(model: PreTrainedModel, prompt: list[int], new: int, eos: list[int] | None) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_tokens_equal_those_of_generate_for_mixed_prompt_lengths(model: PreTrainedModel, batch_size: int) -> None:
    ours = generate_greedy(model, PROMPTS, max_new_tokens=24, eos_ids=[], pad_id=PAD, batch_size=batch_size)
    assert ours == [reference(model, prompt, 24, None) for prompt in PROMPTS]
    assert len({tuple(row) for row in ours}) == len(PROMPTS)


def test_a_row_stops_at_any_end_token_and_the_others_go_on(model: PreTrainedModel) -> None:
    free = [reference(model, prompt, 24, None) for prompt in PROMPTS]
    ends = [free[0][3], free[1][6]]
    ours = generate_greedy(model, PROMPTS, max_new_tokens=24, eos_ids=ends, pad_id=PAD, batch_size=8)
    assert ours == [reference(model, prompt, 24, ends) for prompt in PROMPTS]
    assert len({len(row) for row in ours}) > 1


def test_decoding_stops_at_the_first_look_after_every_row_has_ended(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference(model, PROMPTS[0], 1, None)
    calls = []
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    assert generate_greedy(model, PROMPTS[:1], max_new_tokens=50, eos_ids=first, pad_id=PAD, batch_size=4) == [first]
    assert len(calls) == READ_EVERY < 50


def test_no_prompts_give_no_rows_and_an_empty_prompt_is_refused(model: PreTrainedModel) -> None:
    assert generate_greedy(model, [], max_new_tokens=3, eos_ids=[], pad_id=PAD, batch_size=2) == []
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate_greedy(model, [[]], max_new_tokens=3, eos_ids=[], pad_id=PAD, batch_size=2)


def test_training_mode_is_given_back(model: PreTrainedModel) -> None:
    model.train()
    generate_greedy(model, PROMPTS, max_new_tokens=1, eos_ids=[], pad_id=PAD, batch_size=2)
    assert model.training
    model.eval()


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
