"""Decoding with a fixed cache says what transformers' own ``generate`` says, and draws by its rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from numina_finetune.models.generation import READ_EVERY, PlainDecoder, at_rest
from numina_finetune.models.sampling import drawn
from numina_finetune.train.backend import Decoding, Ended
from numina_finetune.train.decoding import decode
from tests.decoding import NEW_TOKENS, PAD, PROMPTS, TIE, decoded_model, gaps, generated


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return decoded_model("qwen3", layers=2)


def ours(
    model: PreTrainedModel, prompts: list[list[int]], ended: Ended | None = None, *, rows: int = 3, **options: Any
) -> list[list[int]]:
    settings = {"max_new_tokens": NEW_TOKENS, "stop_ids": frozenset(), "pad_id": PAD, "batch_size": rows}
    with at_rest(model):
        found = decode(PlainDecoder(model), prompts, Decoding(**(settings | options)), ended, rows=rows)
    return [found[number] for number in range(len(prompts))]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-windows", "gpt-oss"])
def test_tokens_equal_those_of_generate_for_mixed_prompt_lengths(name: str) -> None:
    model = decoded_model(name)
    theirs = generated(model, PROMPTS, NEW_TOKENS)
    for rows in (1, 3, 8):
        leads = gaps(model, PROMPTS, ours(model, PROMPTS, rows=rows), theirs)
        assert len(leads) <= 1 and all(lead < TIE for lead in leads)
    assert len({tuple(row) for row in theirs}) == len(PROMPTS)


def test_a_row_stops_at_any_stop_token_and_the_others_go_on(model: PreTrainedModel) -> None:
    free = generated(model, PROMPTS, NEW_TOKENS)
    stops = [free[0][3], free[1][6]]
    found = ours(model, PROMPTS, stop_ids=frozenset(stops))
    assert found == generated(model, PROMPTS, NEW_TOKENS, stops)
    assert len({len(row) for row in found}) > 1


def test_decoding_ends_at_the_first_look_after_every_row_has(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generated(model, PROMPTS[:1], 1)
    calls = []
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    assert ours(model, PROMPTS[:1], stop_ids=frozenset(first[0])) == first
    assert len(calls) == READ_EVERY < NEW_TOKENS


def test_a_row_that_is_over_for_its_reader_ends_and_the_others_go_on(model: PreTrainedModel) -> None:
    free = ours(model, PROMPTS)
    found = ours(model, PROMPTS, lambda tokens: tokens[:5] == free[2][:5])
    assert found[2] == free[2][:READ_EVERY]
    assert [row for number, row in enumerate(found) if number != 2] == [*free[:2], *free[3:]]


def test_a_draw_depends_on_the_seed_and_the_prompt_and_not_on_its_company(model: PreTrainedModel) -> None:
    one = ours(model, PROMPTS, temperature=1.0, seed=1)
    assert one == ours(model, PROMPTS, temperature=1.0, seed=1, rows=8)
    assert one[3:] == ours(model, PROMPTS[3:], temperature=1.0, seed=1)
    assert one != ours(model, PROMPTS, temperature=1.0, seed=2)
    twice = ours(model, [PROMPTS[0]] * 3, temperature=1.0, seed=1)
    assert twice[0] == one[0] and len({tuple(row) for row in twice}) == 3


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}])
def test_a_draw_from_one_token_is_the_likeliest(model: PreTrainedModel, options: dict[str, float]) -> None:
    assert ours(model, PROMPTS, **{"temperature": 0.7, **options}) == ours(model, PROMPTS)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 0.95, 20), (1.7, 0.5, 0), (1, 1, 7)])
def test_tokens_are_drawn_with_the_probabilities_of_transformers(temperature: float, top_p: float, top_k: int) -> None:
    draws = 20000
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    theirs = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    theirs = TopPLogitsWarper(float(top_p))(None, theirs)
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens = drawn(logits.expand(draws, -1), uniform, torch.tensor([temperature, top_p, top_k], dtype=torch.float32))
    found = torch.bincount(tokens, minlength=50) / draws
    torch.testing.assert_close(found, theirs.softmax(-1)[0], atol=2 / draws, rtol=0)


def test_no_prompts_give_no_rows_and_an_empty_prompt_is_refused(model: PreTrainedModel) -> None:
    assert ours(model, []) == []
    with pytest.raises(ValueError, match="a prompt is empty"):
        ours(model, [[1], []])


def test_training_mode_and_attention_are_given_back(model: PreTrainedModel) -> None:
    model.train()
    before = model.config._attn_implementation
    ours(model, PROMPTS, max_new_tokens=1)
    assert model.training and model.config._attn_implementation == before
    model.eval()
