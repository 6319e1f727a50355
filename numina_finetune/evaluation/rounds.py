"""Solving with the tool ``python``: the model writes, its code is run, it reads the result and writes on.

Two styles, those of training (``--tir-style``). ``tool_calls``: each call ends a turn, and its answer is a tool
message. ``text``: one turn, in which ```` ```python ```` blocks are followed by ```` ```output ```` blocks; generation
stops behind the code, and goes on behind the result. All open problems take each step together.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from numina_finetune.data.chat import ChatOptions, Renderer, renderer
from numina_finetune.data.conversation import Conversation, Message
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.errors import DataError
from numina_finetune.evaluation.sandbox import Execution, Limits, Sandbox, require, run_all
from numina_finetune.evaluation.turns import TurnReader, code_of
from numina_finetune.train.backend import Ended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Generate = Callable[[Sequence[Sequence[int]], Ended | None], list[list[int]]]
"""New tokens for each prompt; ``Backend.generate`` with its ``Decoding`` bound."""
Executions = list[list[Execution]]
"""Of each problem that asked for some, in order."""
RunOnce = Callable[[Callable[[], Executions]], Executions]

ANSWERED, MAX_ROUNDS, LENGTH, MALFORMED_CALL = "answered", "max_rounds", "length", "malformed call"
MALFORMED = "malformed"
"""The outcome of a round whose call could not be read."""
OPEN_PROBLEMS = 256
"""Problems in the works at a time; each may keep an interpreter: three processes, some 5 MB."""


@dataclass(frozen=True)
class Transcript:
    """How a problem went."""

    messages: list[Message]
    """The whole conversation, the prompt's messages first."""
    text: str
    """What the model said last (style ``tool_calls``), or its whole turn with the results in it (``text``)."""
    outcomes: tuple[str, ...]
    """Of each round: the ``Outcome`` of its execution, or ``malformed``."""
    stopped: str
    """``answered``; ``max_rounds``: the model wanted one round more; ``length``: its turn was cut; ``malformed call``:
    its last round went to a call that cannot be read, or it wrote what the chat layout cannot show it again."""

    @property
    def rounds(self) -> int:
        """Calls that were answered."""
        return len(self.outcomes)


def solve_with_tools(
    conversations: Sequence[Conversation],
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: ChatOptions,
    style: str,
    max_rounds: int,
    limits: Limits,
    once: RunOnce = lambda work: work(),
) -> list[Transcript]:
    """Let a model solve problems, with a Python interpreter for each.

    Args:
        conversations: the problems; each ends where the model is to write. Style ``tool_calls`` offers the tool.
        style: ``tool_calls`` or ``text``.
        max_rounds: calls that are answered for each problem.
        once: how code is run for all processes of a run together, which must go on with the same results: by one of
            them, say, which tells the others.

    Raises:
        ConfigError: the machine protects less than ``limits.minimum``, or the model's calls cannot be read.
        DataError: a conversation cannot be rendered.
        ValueError: the style is unknown.
    """
    if style not in _STYLES:
        raise ValueError(f"style {style!r} is unknown: use one of {', '.join(_STYLES)}")
    require(limits.minimum)
    layout = renderer(tokenizer, chat)
    reader = TurnReader(tokenizer, layout.family.name, tools=style == "tool_calls")
    setting = _Setting(layout, reader, max_rounds)
    problems = [_STYLES[style](talk, Sandbox(limits), setting) for talk in conversations]
    waiting, working = list(reversed(problems)), list[_Problem]()
    with ExitStack() as stack:
        for problem in problems:
            stack.enter_context(problem.sandbox)
        while waiting or working:
            while waiting and len(working) < OPEN_PROBLEMS:
                working.append(waiting.pop())
            _advance(working, generate, once)
            for problem in working:
                if problem.stopped:
                    problem.sandbox.close()
            working = [problem for problem in working if not problem.stopped]
    return [problem.transcript() for problem in problems]


class Request(NamedTuple):
    """What the model asks for: code to run, or what it is answered instead."""

    code: str | None
    refusal: str = ""


class _Setting(NamedTuple):
    """What all problems share."""

    layout: Renderer
    reader: TurnReader
    max_rounds: int


class _Problem(ABC):
    """One conversation in the works."""

    ended: Ended | None = None
    """What ends a row besides stop tokens; that of any problem is that of all."""

    def __init__(self, talk: Conversation, sandbox: Sandbox, setting: _Setting) -> None:
        self.sandbox = sandbox
        self.stopped = ""
        self.begun = False
        """Whether the model has written anything."""
        self.requests: list[Request] = []
        """Of the last turn, and not answered yet."""
        self._talk = talk
        self._layout, self._reader, self._max_rounds = setting
        self._outcomes: list[str] = []

    @abstractmethod
    def prompt(self) -> list[int]:
        """After which the model writes on.

        Raises:
            DataError: the layout cannot show what the model wrote.
        """

    @abstractmethod
    def take(self, tokens: list[int]) -> None:
        """What the model wrote."""

    @abstractmethod
    def show(self, result: str) -> None:
        """The result of a request to the model."""

    @abstractmethod
    def transcript(self) -> Transcript: ...

    @property
    def code(self) -> list[str]:
        return [request.code for request in self.requests if request.code is not None]

    def answer(self, executions: Sequence[Execution]) -> None:
        """Answer the requests.

        Args:
            executions: of ``code``.
        """
        results = iter(executions)
        for request in self.requests:
            execution = None if request.code is None else next(results)
            self._outcomes.append(MALFORMED if execution is None else str(execution.outcome))
            self.show(request.refusal if execution is None else execution.output)
        self.requests = []

    def _ask(self, requests: Sequence[Request]) -> None:
        """Ask, or end if that is more than the rounds that are left."""
        if len(self._outcomes) + len(requests) <= self._max_rounds:
            self.requests = list(requests)
        else:
            self.stopped = MALFORMED_CALL if self._outcomes[-1:] == [MALFORMED] else MAX_ROUNDS


class _Calls(_Problem):
    """Style ``tool_calls``."""

    def __init__(self, talk: Conversation, sandbox: Sandbox, setting: _Setting) -> None:
        super().__init__(talk, sandbox, setting)
        self._messages = list(talk.messages)
        self._open: list[str] = []  # ids of calls that are not answered
        self._calls = 0

    def prompt(self) -> list[int]:
        return self._layout.prompt(Conversation(self._messages, self._talk.tools or [PYTHON_TOOL]))

    def take(self, tokens: list[int]) -> None:
        turn = self._reader.read(tokens)
        message = turn.message(self._calls + 1)
        self._messages.append(message)
        self._calls += len(turn.calls)
        self._open = [call["id"] for call in message.get("tool_calls", ())]
        if not turn.ended:
            self.stopped = LENGTH
        elif not turn.calls:
            self.stopped = ANSWERED
        else:
            self._ask([Request(*code_of(call)) for call in turn.calls])

    def show(self, result: str) -> None:
        content = result.removesuffix("\n") if result.strip("\n") else result
        self._messages.append({"role": "tool", "tool_call_id": self._open.pop(0), "content": content})

    def transcript(self) -> Transcript:
        said = [message.get("content", "") for message in self._messages if message["role"] == "assistant"]
        return Transcript(self._messages, said[-1] if said else "", tuple(self._outcomes), self.stopped)


class _Text(_Problem):
    """Style ``text``."""

    def __init__(self, talk: Conversation, sandbox: Sandbox, setting: _Setting) -> None:
        super().__init__(talk, sandbox, setting)
        self._turn: Message = {"role": "assistant", "content": ""}
        self.ended = self._has_block

    def prompt(self) -> list[int]:
        if not self._turn["content"]:
            return self._layout.prompt(self._talk)
        chunk = self._layout.chunk([Conversation([*self._talk.messages, self._turn], self._talk.tools)])
        if chunk.errors:
            raise chunk.errors[0]
        end = int(np.flatnonzero(chunk.turn_ends)[-1])  # the turn goes on instead
        return [int(token) for token in chunk.input_ids[:end]]

    def take(self, tokens: list[int]) -> None:
        said = self._turn["content"]
        text, ended, reasoning = self._reader.text(tokens)
        if reasoning and not said:
            self._turn["reasoning_content"] = reasoning
        block = code_block(text, complete=ended)
        if block is None:
            self._turn["content"] = said + text
            self.stopped = ANSWERED if ended else LENGTH
            return
        code, end = block
        self._turn["content"] = said + text[:end]
        self._ask([Request(code)])

    def show(self, result: str) -> None:
        said = f"{self._turn['content']}\n{_OUTPUT}"
        shown = said + result + ("\n" if result and not result.endswith("\n") else "") + "```\n"
        self._turn["content"] = shown
        self._turn["no_loss"] = [*self._turn.get("no_loss", ()), (len(said), len(shown))]

    def transcript(self) -> Transcript:
        said = {key: value for key, value in self._turn.items() if key != "no_loss"}
        return Transcript([*self._talk.messages, said], said["content"], tuple(self._outcomes), self.stopped)

    def _has_block(self, tokens: list[int]) -> bool:
        return code_block(self._reader.text(tokens)[0], complete=False) is not None


_STYLES: dict[str, type[_Problem]] = {"tool_calls": _Calls, "text": _Text}

_OPENING = re.compile(r"```python[ \t\r]*\n")
_CLOSING = re.compile(r"\n```[ \t\r]*(?:\n|\Z)")
_OUTPUT = "```output\n"


def code_block(text: str, *, complete: bool) -> tuple[str, int] | None:
    """The first python block of ``text``: its code, and where its closing fence ends; None while it is open.

    It is closed once the model has written what follows: the line that opens the output block, or anything else.

    Args:
        complete: whether nothing more will follow.
    """
    opening = _OPENING.search(text)
    closing = _CLOSING.search(text, opening.end() - 1) if opening else None
    if opening is None or closing is None:
        return None
    after = text[closing.end() :].lstrip()
    if _OUTPUT.startswith(after) and after != _OUTPUT and not complete:
        return None
    return text[opening.end() : closing.start() + 1], closing.start() + len("\n```")


def _advance(working: Sequence[_Problem], generate: Generate, once: RunOnce) -> None:
    """One turn of all problems, and the answers to what they ask for."""
    ready: list[_Problem] = []
    prompts: list[list[int]] = []
    for problem in working:
        try:
            prompts.append(problem.prompt())
            ready.append(problem)
        except DataError:
            if not problem.begun:
                raise  # the conversation was so when it came
            problem.stopped = MALFORMED_CALL
    if not ready:
        return
    for problem, tokens in zip(ready, generate(prompts, ready[0].ended), strict=True):
        problem.begun = True
        problem.take(tokens)
    asking = [problem for problem in ready if problem.requests]
    executions = once(lambda: run_all([(problem.sandbox, problem.code) for problem in asking])) if asking else []
    for problem, results in zip(asking, executions, strict=True):
        problem.answer(results)
