"""Turns read back as messages, and problems solved in rounds by a model that says what real rows say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from numina_finetune.data import format_example
from numina_finetune.data.chat import ChatOptions, Rendered, render, resolve_family
from numina_finetune.data.conversation import Conversation, Message
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.data.tool_calls import validate_conversation
from numina_finetune.errors import ConfigError, DataError
from numina_finetune.evaluation.rounds import Ended, Generate, Transcript, code_block, solve_with_tools
from numina_finetune.evaluation.sandbox import Limits, Minimum, sandbox
from numina_finetune.evaluation.turns import TurnReader
from tests.evaluation.tiers import usable

LIMITS = Limits(wall_seconds=60, output_chars=None)
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(params=["qwen3", "gpt_oss"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def talks(rows: Sequence[dict[str, Any]], **options: str) -> list[Conversation]:
    found = []
    for row in rows:
        try:
            example = format_example(row, **options)
            found.append(validate_conversation(example["messages"], example["tools"]))
        except DataError:
            continue
    return found


def turns_of(rendered: Rendered) -> list[tuple[list[int], list[int]]]:
    """(prompt, what the model is to write after it) for each run of targets."""
    ids, mask = rendered.input_ids, [*rendered.loss_mask, False]
    starts = [at for at in range(len(ids)) if mask[at] and not (at and mask[at - 1])]
    return [(ids[:start], ids[start : mask.index(False, start)]) for start in starts]


def comparable(message: Message) -> Message:
    """Without ids, and with arguments as what they say."""
    copy: Message = json.loads(json.dumps(message))
    for call in copy.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        del call["id"]
    return copy


# --- reading turns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("toolcalls/glaive_openai.jsonl", None),
        ("tir/mathcoder_math_test_7b.jsonl", 60),
        ("tir/tora_gsm8k_test_70b.jsonl", 60),
    ],
)
def test_real_turns_are_read_back_as_the_messages_they_were_rendered_from(
    real_rows: Rows, tokenizer: PreTrainedTokenizerBase, file: str, count: int | None
) -> None:
    reader = TurnReader(tokenizer, resolve_family(tokenizer), tools=True)
    read = 0
    for talk in talks(real_rows(file, count)):
        said = [comparable(message) for message in talk.messages if message["role"] == "assistant"]
        turns = [reader.read(tokens) for _, tokens in turns_of(render(talk, tokenizer))]
        assert [comparable(turn.message(1)) for turn in turns] == said
        assert all(call.fault is None for turn in turns for call in turn.calls)
        read += len(turns)
    assert read > 100


def test_names_of_control_tokens_in_an_answer_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    content = "a <tool_call> and an <|im_end|> and a <|call|>"
    talk = Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": content}])
    ((_, tokens),) = turns_of(render(talk, tokenizer))
    turn = TurnReader(tokenizer, resolve_family(tokenizer), tools=True).read(tokens)
    assert (turn.content, turn.calls, turn.ended) == (content, (), True)


def test_a_turn_without_its_end_was_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a long answer"}])
    ((_, tokens),) = turns_of(render(talk, tokenizer))
    turn = TurnReader(tokenizer, resolve_family(tokenizer), tools=True).read(tokens[:-1])
    assert (turn.content, turn.ended) == ("a long answer", False)


def test_gpt_oss_may_name_the_recipient_in_either_place_and_reason_apart(gpt_oss: PreTrainedTokenizerBase) -> None:
    text = (
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary<|message|>I add.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.python <|constrain|>json<|message|>{"code":"1"}<|call|>'
    )
    turn = TurnReader(gpt_oss, "harmony", tools=True).read(gpt_oss(text)["input_ids"])
    assert (turn.reasoning, turn.content, turn.ended) == ("think", "I add.", True)
    assert [(call.name, call.arguments) for call in turn.calls] == [("python", '{"code":"1"}')]


def test_a_template_whose_calls_cannot_be_read_is_refused(qwen3: PreTrainedTokenizerBase) -> None:
    template = qwen3.chat_template
    try:
        qwen3.chat_template = "{{ messages }}"
        with pytest.raises(ConfigError, match="--tir-style text"):
            TurnReader(qwen3, "template", tools=True)
    finally:
        qwen3.chat_template = template


@pytest.mark.parametrize(
    ("text", "complete", "code"),
    [
        ("```python\n1+1\n```\n```output\n", False, "1+1\n"),
        ("```python\n1+1\n```\nSo", False, "1+1\n"),
        ("```python\n1+1\n```\n```outp", False, None),
        ("```python\n1+1\n```", False, None),
        ("```python\n1+1\n```", True, "1+1\n"),
        ("```python\n1+1", True, None),
        ("```python\n```\n```output\n", False, ""),
        ("no code ```here```\n", True, None),
        ('```python\ns = "```"\n```\n```output\n', False, 's = "```"\n'),
    ],
)
def test_code_is_run_once_its_block_is_closed(text: str, complete: bool, code: str | None) -> None:
    found = code_block(text, complete=complete)
    assert (found and found[0]) == code


# --- rounds -----------------------------------------------------------------------------------------------------------


class Script:
    """A model that says, after each prompt that it knows, what a real row says there."""

    def __init__(self, rendered: Sequence[Rendered]) -> None:
        self._answers = {tuple(prompt): tokens for row in rendered for prompt, tokens in turns_of(row)}
        self.batches: list[int] = []

    def __call__(self, prompts: Sequence[Sequence[int]], ended: Ended | None) -> list[list[int]]:
        self.batches.append(len(prompts))
        return [self._cut(self._answers[tuple(prompt)], ended) for prompt in prompts]

    def _cut(self, tokens: list[int], ended: Ended | None) -> list[int]:
        """As a backend that asks every eight tokens does."""
        for count in range(8, len(tokens), 8):
            if ended and ended(tokens[:count]):
                return tokens[:count]
        return tokens


REPRODUCED = (3, 4, 6, 7, 8, 9, 16, 20)
"""Rows of four to seven rounds whose recorded outputs the sandbox reproduces to the letter."""


@pytest.mark.parametrize("style", ["tool_calls", "text"])
def test_a_model_that_says_what_a_real_row_says_gets_its_results_and_its_answer(
    real_rows: Rows, tokenizer: PreTrainedTokenizerBase, style: str
) -> None:
    usable(Minimum.ISOLATED)
    rows = real_rows("tir/mathcoder_math_test_7b.jsonl", max(REPRODUCED) + 1)
    real = talks([rows[number] for number in REPRODUCED], format="numina_tir", tir_style=style)
    script = Script([render(talk, tokenizer) for talk in real])
    starts = [Conversation(talk.messages[:1], talk.tools) for talk in real]
    found = solve_with_tools(starts, script, tokenizer, chat=ChatOptions(), style=style, max_rounds=8, limits=LIMITS)
    for transcript, talk in zip(found, real, strict=True):
        said = [{key: value for key, value in message.items() if key != "no_loss"} for message in talk.messages]
        assert [comparable(message) for message in transcript.messages] == [comparable(message) for message in said]
        assert transcript.text == said[-1]["content"]
        assert transcript.stopped == "answered" and set(transcript.outcomes) == {"ok"}
    assert script.batches[0] == len(real), "all problems are generated together"
    assert len(script.batches) == 1 + max(transcript.rounds for transcript in found)


class Lines:
    """A model that writes one prepared text after the other, whatever it is shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *texts: str) -> None:
        self._tokenizer, self._texts = tokenizer, list(texts)
        self.prompts: list[str] = []

    def __call__(self, prompts: Sequence[Sequence[int]], ended: Ended | None) -> list[list[int]]:
        (prompt,) = prompts
        self.prompts.append(self._tokenizer.decode(prompt))
        return [self._tokenizer(self._texts.pop(0), add_special_tokens=False)["input_ids"]]


ASK = Conversation([{"role": "user", "content": "2+2?"}], [PYTHON_TOOL])


def call(code: str, name: str = "python") -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'code': code}})}\n</tool_call>"


def solve(
    model: Generate, tokenizer: PreTrainedTokenizerBase, max_rounds: int = 3, style: str = "tool_calls"
) -> Transcript:
    usable(Minimum.ISOLATED)
    talk = ASK if style == "tool_calls" else Conversation(ASK.messages)
    return solve_with_tools(
        [talk], model, tokenizer, chat=ChatOptions(), style=style, max_rounds=max_rounds, limits=Limits()
    )[0]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("<tool_call>\n{oops}\n</tool_call>", "the call is no JSON"),
        ('<tool_call>\n{"name": "python"}\n</tool_call>', "the argument code is missing"),
        ('<tool_call>\n{"name": "python", "arguments": "2"}\n</tool_call>', "the arguments are no JSON object"),
        (call("1", name="shell"), "there is no tool 'shell'"),
        ('<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n', "never closed"),
        ('<tool_call>\n{"name": "python", "arguments": {"code": "\\ud800"}}\n</tool_call>', "lone surrogate"),
    ],
)
def test_a_malformed_call_is_answered_with_its_fault_and_the_model_goes_on(
    qwen3: PreTrainedTokenizerBase, written: str, told: str
) -> None:
    model = Lines(qwen3, f"{written}<|im_end|>", f"Again.\n{call('2+2')}<|im_end|>", "Four.<|im_end|>")
    transcript = solve(model, qwen3)
    assert transcript.outcomes == ("malformed", "ok") and transcript.stopped == "answered"
    assert told in transcript.messages[2]["content"] and told in model.prompts[1]
    assert transcript.messages[4]["content"] == "4" and transcript.text == "Four."


def test_a_malformed_call_of_gpt_oss_is_answered_too(gpt_oss: PreTrainedTokenizerBase) -> None:
    start = " to=functions.python<|channel|>commentary <|constrain|>json<|message|>"
    model = Lines(
        gpt_oss, start + "2+2<|call|>", start + '{"code":"2+2"}<|call|>', "<|channel|>final<|message|>4<|return|>"
    )
    transcript = solve(model, gpt_oss)
    assert transcript.outcomes == ("malformed", "ok") and transcript.text == "4"
    assert (
        f"{start}2+2<|call|><|start|>functions.python to=assistant<|channel|>commentary<|message|>Error"
        in model.prompts[1]
    )


def test_several_calls_of_one_turn_share_the_interpreter_and_are_answered_in_order(
    qwen3: PreTrainedTokenizerBase,
) -> None:
    model = Lines(qwen3, f"{call('x = 3')}\n{call('x')}<|im_end|>", "3<|im_end|>")
    transcript = solve(model, qwen3)
    assert transcript.outcomes == ("ok", "ok")
    assert [message["content"] for message in transcript.messages if message["role"] == "tool"] == ["", "3"]


def test_rounds_are_limited(qwen3: PreTrainedTokenizerBase) -> None:
    transcript = solve(Lines(qwen3, *[f"{call('1')}<|im_end|>"] * 3), qwen3, max_rounds=2)
    assert (transcript.rounds, transcript.stopped) == (2, "max_rounds")
    transcript = solve(Lines(qwen3, *["<tool_call>{<|im_end|>"] * 3), qwen3, max_rounds=2)
    assert (transcript.rounds, transcript.stopped) == (2, "malformed call")


@pytest.mark.parametrize("style", ["tool_calls", "text"])
def test_a_turn_that_is_cut_ends_the_problem(qwen3: PreTrainedTokenizerBase, style: str) -> None:
    transcript = solve(Lines(qwen3, "It is about"), qwen3, style=style)
    assert (transcript.text, transcript.stopped, transcript.rounds) == ("It is about", "length", 0)


def test_what_the_layout_cannot_show_ends_the_problem(qwen3: PreTrainedTokenizerBase) -> None:
    model = Lines(qwen3, f"<think>hm</think>{call('1')}<|im_end|>")
    assert solve(model, qwen3).stopped == "malformed call"


def test_text_goes_on_behind_the_result_of_its_code(qwen3: PreTrainedTokenizerBase) -> None:
    first = "Add.\n```python\nx = 2\nx + 2\n```\n```output\nI guess"
    model = Lines(qwen3, first, "\n```python\n1/0\n```\nand so", "So 4.<|im_end|>")
    transcript = solve(model, qwen3, style="text")
    assert transcript.outcomes == ("ok", "error") and transcript.stopped == "answered"
    assert transcript.text.startswith(
        "Add.\n```python\nx = 2\nx + 2\n```\n```output\n4\n```\n\n```python\n1/0\n```\n```output\nTraceback"
    )
    assert transcript.text.endswith("ZeroDivisionError: division by zero\n```\nSo 4.")
    assert model.prompts[1].endswith("```output\n4\n```\n")


def test_gpt_oss_may_reason_before_the_text_with_its_code(gpt_oss: PreTrainedTokenizerBase) -> None:
    first = "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|>"
    model = Lines(gpt_oss, first + "```python\n2+2\n```\n```output\n", "So 4.<|return|>")
    transcript = solve(model, gpt_oss, style="text")
    assert transcript.text == "```python\n2+2\n```\n```output\n4\n```\nSo 4." and transcript.stopped == "answered"
    assert model.prompts[1].endswith(first + "```python\n2+2\n```\n```output\n4\n```\n")


def test_a_sandbox_that_protects_too_little_is_refused_before_anything_is_generated(
    qwen3: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "protections", lambda layers: {"namespaces": "no", "seccomp": None, "landlock": None})
    with pytest.raises(ConfigError, match="namespaces"):
        solve_with_tools(
            [ASK], Lines(qwen3), qwen3, chat=ChatOptions(), style="tool_calls", max_rounds=1, limits=Limits()
        )
