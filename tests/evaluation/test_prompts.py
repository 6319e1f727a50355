"""Prompts are those of training, or the harness's text; answers are what a model's tokens say."""

from __future__ import annotations

import gzip
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from numina_finetune.data.chat import render
from numina_finetune.evaluation.prompts import PromptOptions, Prompts
from numina_finetune.evaluation.tasks import Problem
from numina_finetune.models.builtin import TINY_TOKENIZER
from tests.conftest import real_data

EXAMPLES = [Problem("0", "1+1?", "2", "1+1=2\n#### 2"), Problem("1", "2+2?", "4", "#### 4")]
NO_ENDS = GenerationConfig()


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))


@pytest.fixture(scope="module", params=["qwen3", "gpt-oss"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp(request.param)
    for path in (real_data() / "tokenizers" / request.param).glob("tokenizer*"):
        if path.suffix == ".gz":
            with gzip.open(path) as packed, (folder / path.stem).open("wb") as file:
                shutil.copyfileobj(packed, file)
        else:
            shutil.copy(path, folder)
    return AutoTokenizer.from_pretrained(folder)


def supervised(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], list[int]]:
    """A training sample as its prompt and what the model learns to write."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = render({"messages": messages}, tokenizer)
    first = sample.loss_mask.index(True)
    learned = [token for token, target in zip(sample.input_ids, sample.loss_mask, strict=True) if target]
    return sample.input_ids[:first], learned


def test_a_chat_prompt_is_the_one_of_training_and_the_answer_learned_there_is_read_back(
    real: PreTrainedTokenizerBase,
) -> None:
    prompts = Prompts(real, PromptOptions())
    answer = "48 + 7 = 55.\n#### 55"
    prompt, learned = supervised(real, "How many?", answer)
    assert prompts.ids("How many?") == prompt[: len(prompts.ids("How many?"))]
    assert prompts.text(learned) == answer
    assert learned[-1] in prompts.stop_ids(NO_ENDS)


def test_of_harmonys_messages_the_last_one_is_the_answer(real: PreTrainedTokenizerBase) -> None:
    if "<|channel|>" not in real.get_added_vocab():
        pytest.skip("this tokenizer has no channels")
    said = "<|channel|>analysis<|message|>Is it 3?<|end|><|start|>assistant<|channel|>final<|message|>#### 4<|return|>"
    assert Prompts(real, PromptOptions()).text(real(said, add_special_tokens=False)["input_ids"]) == "#### 4"


def test_examples_and_instruction_are_turns_of_the_chat(tiny: PreTrainedTokenizerBase) -> None:
    options = PromptOptions(instruction="Box it.", system_prompt="Be brief.")
    assert Prompts(tiny, options, EXAMPLES[:1]).conversation("3+3?").messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?\n\nBox it."},
        {"role": "assistant", "content": "1+1=2\n#### 2"},
        {"role": "user", "content": "3+3?\n\nBox it."},
    ]


def test_a_completion_is_the_harness_text(tiny: PreTrainedTokenizerBase) -> None:
    prompts = Prompts(tiny, PromptOptions("completion"), EXAMPLES)
    assert tiny.decode(prompts.ids("3+3?")) == (
        "Question: 1+1?\nAnswer: 1+1=2\n#### 2\n\nQuestion: 2+2?\nAnswer: #### 4\n\nQuestion: 3+3?\nAnswer:"
    )
    with_instruction = Prompts(tiny, PromptOptions("completion", "Solve."), EXAMPLES[1:])
    assert tiny.decode(with_instruction.ids("3+3?")).startswith("Solve.\n\nQuestion: 2+2?")


def test_a_completion_ends_where_it_asks_the_next_question(tiny: PreTrainedTokenizerBase) -> None:
    prompts = Prompts(tiny, PromptOptions("completion"))
    tokens = tiny(" #### 6\n\nQuestion: 4+4?")["input_ids"]
    assert prompts.ended(tokens) and not prompts.ended(tokens[:4])
    assert prompts.text(tokens) == "#### 6"
    assert not Prompts(tiny, PromptOptions()).ended(tokens), "in a chat it is what the model says"


def test_what_ends_a_turn_is_known_from_tokenizer_settings_and_layout(tiny: PreTrainedTokenizerBase) -> None:
    stops = Prompts(tiny, PromptOptions()).stop_ids(GenerationConfig(eos_token_id=[7, 9]))
    assert stops >= {7, 9, tiny.eos_token_id, tiny.get_added_vocab()["<|im_end|>"]}
