"""What ``generate`` is to answer: prompts from the command line, a file or standard input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from numina_finetune.data.conversation import Conversation, Message
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.data.tool_calls import validate_messages
from numina_finetune.errors import ConfigError, DataError, UserError
from numina_finetune.evaluation.options import GenerateOptions
from numina_finetune.evaluation.prompts import Prompts

STANDARD_INPUT = "-"
_MOST_FAULTS = 5
"""Lines of a file that are told to be wrong."""

_ANSWER = {"role": "assistant", "content": "…"}
"""In the place of what is to be generated: a chat is checked as training's are, which have answers."""

Question = str | list[Message]
"""A text, or a chat up to where the model is to answer."""


def read_questions(options: GenerateOptions, given: TextIO | None) -> list[Question]:
    """What is asked, in order.

    Args:
        given: standard input, where something may come from; None where nobody is to be waited for.

    Raises:
        ConfigError: nothing is asked, or the file cannot be read.
        DataError: lines that are no prompts.
    """
    if options.prompt:
        questions: list[Question] = list(options.prompt)
    elif options.prompts is None:
        questions = [given.read().rstrip("\n")] if given is not None else []
    elif options.prompts == STANDARD_INPUT:
        questions = _lines(given.read() if given is not None else "")
    else:
        questions = _of_file(Path(options.prompts).expanduser())
    if not any(questions):
        raise ConfigError(
            f"--prompts {options.prompts} holds no prompt"
            if options.prompts
            else "nothing is asked: give --prompt, --prompts FILE, or text on standard input"
        )
    if faults := [f"prompt {number} is empty" for number, one in enumerate(questions) if not one]:
        raise DataError(faults[:_MOST_FAULTS])
    return questions


def tokens_of(questions: Sequence[Question], prompts: Prompts, options: GenerateOptions) -> list[list[int]]:
    """The tokens after which the model answers each question.

    Raises:
        DataError: a question cannot be asked so; the first few.
    """
    faults: list[str] = []
    found: list[list[int]] = []
    for number, question in enumerate(questions):
        try:
            if isinstance(question, str):
                found.append(prompts.ids(question))
            elif options.raw:
                raise DataError("a chat has no place in --raw: give texts, or leave it out")
            else:
                found.append(prompts.chat_ids(chat_of(question, prompts, options)))
        except DataError as error:
            faults += [f"prompt {number}: {problem}" for problem in error.problems]
    if faults:
        raise DataError(faults[:_MOST_FAULTS])
    return found


def chat_of(question: Question, prompts: Prompts, options: GenerateOptions) -> Conversation:
    """The chat up to where the model answers; ``--system-prompt`` stands before those that have no system message."""
    if isinstance(question, str):
        return prompts.conversation(question)
    system = options.system_prompt if question[0]["role"] not in ("system", "developer") else None
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    called = options.tools is not None and options.tir_style == "tool_calls"
    return Conversation([*before, *question], [PYTHON_TOOL] if called else None)


def _of_file(path: Path) -> list[Question]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}") from error
    if path.suffix == ".txt":
        return _lines(text)
    if path.suffix != ".jsonl":
        raise ConfigError(f"--prompts {path}: give .txt (one prompt a line) or .jsonl (prompt or messages)")
    faults: list[str] = []
    rows = list(_rows(text, faults))
    if faults:
        raise DataError([f"--prompts {path}, {fault}" for fault in faults[:_MOST_FAULTS]])
    return rows


def _lines(text: str) -> list[Question]:
    return [line for line in text.splitlines() if line.strip()]


def _rows(text: str, faults: list[str]) -> Iterator[Question]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield _question(json.loads(line))
        except ValueError as error:
            faults.append(f"line {number}: no JSON ({error})")
        except UserError as error:
            faults += [f"line {number}: {problem}" for problem in error.problems]


def _question(row: Any) -> Question:
    """Raises DataError: the row asks nothing, or what cannot be answered here."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise DataError("it needs an object with either prompt (text) or messages (a chat)")
    if row.get("tools"):
        raise DataError("it brings tools of its own: the only one that is run here is --tools python")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError(f"prompt is {row['prompt']!r}: it needs a text")
        return row["prompt"]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages is {messages!r}: it needs a list, the last one to be answered")
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        raise DataError("messages end with the assistant's answer: end them where it is to answer")
    return validate_messages([*messages, _ANSWER])[:-1]
