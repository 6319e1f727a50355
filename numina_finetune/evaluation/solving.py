"""Problems in, attempts at them out: the one place where a model is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numina_finetune.data.conversation import Conversation, Message
from numina_finetune.evaluation.options import AnswerOptions
from numina_finetune.evaluation.prompts import Prompts
from numina_finetune.evaluation.rounds import Transcript, solve_with_tools
from numina_finetune.evaluation.sandbox import Limits, Minimum
from numina_finetune.evaluation.tasks import Problem
from numina_finetune.processes import ProcessGroup
from numina_finetune.train.backend import Decoding, Ended

Generate = Callable[[Sequence[Sequence[int]], Decoding, Ended | None], list[list[int]]]
"""``Backend.generate``."""
_RESULT = re.compile(r"(?<=```output\n).*?(?:```\n?|$)", re.DOTALL)
"""What is put into the output blocks of a turn, up to their ends."""


@dataclass(frozen=True)
class Attempt:
    """What a model wrote."""

    text: str
    """What is graded: its last turn."""
    tokens: int
    """That it wrote, the one that ended it included; with tools, those of the text that it wrote."""
    stopped: str
    """``answered``, ``length`` (it was cut), or with tools ``max_rounds`` or ``malformed call``."""
    rounds: tuple[str, ...] = ()
    """With tools: what became of each call: ok, error, timeout, killed or malformed."""
    work: str = ""
    """With tools: what led to the text, code and results."""


@dataclass(frozen=True)
class Tools:
    """How a model may call python."""

    style: str
    """``tool_calls`` or ``text``, see :mod:`.rounds`."""
    max_rounds: int
    limits: Limits


def tools_of(options: AnswerOptions) -> Tools:
    """What the options allow the model."""
    limits = Limits(
        wall_seconds=options.tool_seconds,
        memory=options.tool_memory_mb << 20,
        output_chars=options.tool_output_chars,
        minimum=Minimum(options.sandbox_minimum),
    )
    return Tools(options.tir_style, options.max_rounds, limits)


Solve = Callable[[Sequence[Problem]], list[Attempt]]
"""One attempt at each problem of a batch; of those that stand there several times, different ones if they are drawn."""


def solve_directly(prompts: Prompts, generate: Generate, decoding: Decoding) -> Solve:
    """A model that answers in one go."""

    def solve(problems: Sequence[Problem]) -> list[Attempt]:
        asked = [prompts.ids(problem.question) for problem in problems]
        return answer_directly(asked, prompts, generate, decoding)

    return solve


def answer_directly(
    asked: Sequence[Sequence[int]], prompts: Prompts, generate: Generate, decoding: Decoding
) -> list[Attempt]:
    """One attempt behind each of the tokens."""

    def stopped(row: list[int]) -> str:
        return "answered" if row[-1] in decoding.stop_ids or prompts.ended(row) else "length"

    rows = generate(asked, decoding, prompts.ended)
    return [Attempt(prompts.text(row), len(row), stopped(row)) for row in rows]


def solve_with_python(
    prompts: Prompts, generate: Generate, decoding: Decoding, tools: Tools, processes: ProcessGroup
) -> Solve:
    """A model whose calls of python are run, by the first of the processes, and answered."""

    def solve(problems: Sequence[Problem]) -> list[Attempt]:
        talks = [prompts.conversation(problem.question) for problem in problems]
        return answer_with_python(talks, prompts, generate, decoding, tools, processes)

    return solve


def answer_with_python(
    talks: Sequence[Conversation],
    prompts: Prompts,
    generate: Generate,
    decoding: Decoding,
    tools: Tools,
    processes: ProcessGroup,
) -> list[Attempt]:
    """One attempt at each conversation."""

    def bound(asked: Sequence[Sequence[int]], ended: Ended | None) -> list[list[int]]:
        return generate(asked, decoding, ended)

    def once(work: Callable[[], Any]) -> Any:
        return processes.broadcast(work() if processes.index == 0 else None)

    transcripts = solve_with_tools(
        talks,
        bound,
        prompts.tokenizer,
        chat=prompts.options.chat,
        style=tools.style,
        max_rounds=tools.max_rounds,
        limits=tools.limits,
        once=once,
    )
    return [_attempt(prompts, talk, found) for talk, found in zip(talks, transcripts, strict=True)]


def _attempt(prompts: Prompts, talk: Conversation, found: Transcript) -> Attempt:
    said = found.messages[len(talk.messages) :]
    written = [_written(message) for message in said if message["role"] == "assistant"]
    return Attempt(
        found.text.strip(),
        sum(len(ids) for ids in prompts.tokenizer(written)["input_ids"]) if written else 0,
        found.stopped,
        found.outcomes,
        "\n".join(_shown(message) for message in said[:-1]),
    )


def _written(message: Message) -> str:
    """What the model itself wrote of an assistant's message: results between its code are not its own."""
    content = _RESULT.sub("", message.get("content") or "")
    return content + "".join(call["function"]["arguments"] for call in message.get("tool_calls", ()))


def _shown(message: Message) -> str:
    """A message of the work for a person."""
    if message["role"] == "tool":
        return f"```output\n{message['content']}\n```"
    calls = [f"```python\n{_code(call['function']['arguments'])}\n```" for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message.get("content"), *calls]))


def _code(arguments: str) -> str:
    """The code of a call; of a malformed one, what it says."""
    try:
        return str(json.loads(arguments)["code"])
    except (ValueError, KeyError, TypeError):
        return arguments
