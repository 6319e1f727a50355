"""A model's tokens become attempts; its python calls are run on the way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from numina_finetune.data.chat import ChatOptions
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.evaluation.prompts import PromptOptions, Prompts
from numina_finetune.evaluation.sandbox import Limits, Minimum
from numina_finetune.evaluation.solving import Attempt, Tools, solve_directly, solve_with_python
from numina_finetune.evaluation.tasks import Problem
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.processes import ProcessGroup
from numina_finetune.train.backend import Decoding, Ended

PROBLEM = Problem("0", "What is 2**10?", "1024", "#### 1024")
LIMITS = Limits(minimum=Minimum.NONE)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))


class Scripted:
    """Stands for ``Backend.generate``: says the next of its texts to each prompt, and keeps the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *texts: str) -> None:
        self._tokenizer, self._texts = tokenizer, iter(texts)
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[Sequence[int]], decoding: Decoding, ended: Ended | None) -> list[list[int]]:
        self.asked += [self._tokenizer.decode(list(prompt)) for prompt in prompts]
        text = next(self._texts)
        return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for _ in prompts]


def decoding(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> Decoding:
    return Decoding(200, prompts.stop_ids(GenerationConfig()), int(tokenizer.pad_token_id), 4)


def with_python(tokenizer: PreTrainedTokenizerBase, style: str, *texts: str) -> tuple[Attempt, Scripted]:
    tools = [PYTHON_TOOL] if style == "tool_calls" else None
    prompts = Prompts(tokenizer, PromptOptions(chat=ChatOptions()), tools=tools)
    says = Scripted(tokenizer, *texts)
    solve = solve_with_python(prompts, says, decoding(prompts, tokenizer), Tools(style, 3, LIMITS), ProcessGroup())
    (attempt,) = solve([PROBLEM])
    return attempt, says


def test_an_answer_is_told_from_one_that_was_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = Prompts(tokenizer, PromptOptions())

    def attempt(text: str) -> Attempt:
        return solve_directly(prompts, Scripted(tokenizer, text), decoding(prompts, tokenizer))([PROBLEM])[0]

    answered, cut = attempt("#### 1024<|im_end|>"), attempt("#### 10")
    assert (answered.text, answered.stopped) == ("#### 1024", "answered")
    assert (cut.text, cut.stopped) == ("#### 10", "length")
    assert answered.tokens == len(tokenizer("#### 1024<|im_end|>", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("style", "texts"),
    [
        (
            "tool_calls",
            (
                '<tool_call>\n{"name": "python", "arguments": {"code": "2**10"}}\n</tool_call><|im_end|>',
                "#### 1024<|im_end|>",
            ),
        ),
        ("text", ("So:\n```python\nprint(2**10)\n```\n```output\n", "#### 1024<|im_end|>")),
    ],
)
def test_the_code_of_a_model_is_run_and_its_last_words_are_graded(
    tokenizer: PreTrainedTokenizerBase, style: str, texts: tuple[str, ...]
) -> None:
    attempt, says = with_python(tokenizer, style, *texts)
    assert attempt.text.endswith("#### 1024")
    assert (attempt.rounds, attempt.stopped) == (("ok",), "answered")
    assert "1024" in says.asked[1], "it was shown the result"
    assert "2**10" in attempt.work + attempt.text
    own = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert 0 < attempt.tokens <= own
