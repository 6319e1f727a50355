"""``numina-finetune generate``: what a model answers to prompts, printed or as lines of a file."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from numina_finetune.asked_model import AskedModel, find_model
from numina_finetune.config import RunConfig
from numina_finetune.data.chat import ChatOptions
from numina_finetune.data.dataset import tokenizer_hash
from numina_finetune.data.preview import printable
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.errors import ConfigError, ExitCode, all_found
from numina_finetune.evaluation.asked import Question, chat_of, read_questions, tokens_of
from numina_finetune.evaluation.options import GenerateOptions
from numina_finetune.evaluation.prompts import PromptOptions, Prompts
from numina_finetune.evaluation.sandbox import Minimum, require
from numina_finetune.evaluation.solving import Attempt, answer_directly, answer_with_python, tools_of
from numina_finetune.files import write_text
from numina_finetune.train.backend import Backend

MakeBackend = Callable[[RunConfig], Backend]


@dataclass(frozen=True)
class _Task:
    """What is asked, and of whom."""

    model: AskedModel
    questions: list[Question]
    prompts: Prompts
    tokens: list[list[int]]
    """Of each question, after which the model answers."""
    keys: list[str]
    """Of each question: equal where an earlier life has asked the same."""


def run_generate(
    options: GenerateOptions, make_backend: MakeBackend, stop: Callable[[], bool], given: TextIO | None
) -> ExitCode:
    """Answer, or go on; the exit code says whether all prompts are answered.

    Args:
        options: without faults.
        stop: whether to end after the batch at hand.
        given: standard input, if something may come from it.

    Raises:
        ConfigError, DataError, CheckpointError: everything that cannot be asked, before a device is touched.
    """
    task = _found(options, given)
    answers = _Answers(Path(options.output).expanduser()) if options.output else None
    done = answers.matching(task.keys) if answers else 0
    backend = make_backend(task.model.config)
    first, done = backend.process_index == 0, backend.processes.broadcast(done)  # the file is on the first one's host
    if first and answers:
        answers.begin(done)
    _tell(backend, f"{len(task.questions)} prompts, {len(task.questions) - done} to do; {backend.device_description}")
    if done < len(task.questions):
        opened, weights = task.model.open()
        backend.place(opened, task.model.config, weights, trained=False)
    size = max(1, options.batch_size // options.samples)
    for start in range(done, len(task.questions), size):
        if backend.processes.any(stop()):
            remedy = "the same command goes on" if answers else "with --output it could go on"
            _tell(backend, f"stopped at {start} of {len(task.questions)} prompts: {remedy}")
            return ExitCode.PREEMPTED
        batch = range(start, min(start + size, len(task.questions)))
        for number, attempts in zip(batch, _answer(options, task, batch, backend), strict=True):
            if not first:
                continue
            if answers:
                answers.append(_line(task, number, attempts))
            else:
                print("\n".join(_shown(number, attempts, alone=len(task.questions) == 1)), flush=True)
        _tell(backend, f"  {batch[-1] + 1}/{len(task.questions)} prompts")
    return ExitCode.DONE


def _found(options: GenerateOptions, given: TextIO | None) -> _Task:
    """Raises ConfigError: whatever is not there, or cannot be asked; all of it where that can be seen at once."""
    needed: dict[str, Callable[[], Any]] = {
        "model": lambda: find_model(options),
        "questions": lambda: read_questions(options, given),
    }
    if options.tools:
        needed["sandbox"] = lambda: require(Minimum(options.sandbox_minimum))
    found = all_found(needed)
    model, questions = found["model"], found["questions"]
    prompts = _prompts(options, model)
    tokens = tokens_of(questions, prompts, options)
    longest = max(map(len, tokens))
    model.refuse_beyond(longest, options.max_new_tokens, "a shorter prompt")
    settings = options.settings() | model.identity | {"tokenizer": tokenizer_hash(model.tokenizer)}
    for name in ("prompt", "prompts", "output"):  # the tokens say what is asked, wherever they come from
        settings.pop(name, None)
    return _Task(model, questions, prompts, tokens, [_key(settings, ids) for ids in tokens])


def _prompts(options: GenerateOptions, model: AskedModel) -> Prompts:
    chat = ChatOptions(options.chat_family, options.chat_date, options.reasoning_effort)
    how = PromptOptions("raw" if options.raw else "chat", system_prompt=options.system_prompt, chat=chat)
    called = options.tools is not None and options.tir_style == "tool_calls"
    return Prompts(model.tokenizer, how, tools=[PYTHON_TOOL] if called else None)


def _answer(options: GenerateOptions, task: _Task, batch: range, backend: Backend) -> list[list[Attempt]]:
    """``--samples`` attempts at each prompt of the batch.

    Equal prompts share theirs: what is drawn for the second of two in one batch would else depend on the batches.
    """
    decoding = task.model.decoding(options, task.prompts.stop_ids(task.model.generation))
    places = {task.keys[number]: number for number in reversed(batch)}
    numbers = [number for number in sorted(places.values()) for _ in range(options.samples)]
    if options.tools is None:
        asked = [task.tokens[number] for number in numbers]
        attempts = answer_directly(asked, task.prompts, backend.generate, decoding)
    else:
        talks = [chat_of(task.questions[number], task.prompts, options) for number in numbers]
        tools = tools_of(options)
        attempts = answer_with_python(talks, task.prompts, backend.generate, decoding, tools, backend.processes)
    found = {
        task.keys[numbers[start]]: attempts[start : start + options.samples]
        for start in range(0, len(attempts), options.samples)
    }
    return [found[task.keys[number]] for number in batch]


class _Answers:
    """The file of answers, a line a prompt in the prompts' order, so that a life that was cut is a beginning of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def matching(self, keys: Sequence[str]) -> int:
        """How many prompts are answered already.

        Raises:
            ConfigError: the file is of another command.
        """
        if self._path.is_dir() or self._path.suffix != ".jsonl":
            raise ConfigError(f"--output {self._path}: give a file that ends in .jsonl")
        lines = self._whole_lines()
        for number, line in enumerate(lines):
            try:
                key = json.loads(line)["key"]
            except (ValueError, KeyError, TypeError):
                key = None
            if number >= len(keys) or key != keys[number]:
                raise ConfigError(
                    f"--output {self._path}, line {number + 1} is of another command (model, prompts or options "
                    "differ): give another file, or delete it"
                )
        return len(lines)

    def begin(self, done: int) -> None:
        """Keep the first lines, without what a kill left of another."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(self._whole_lines()[:done]))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, durably."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[str]:
        if not self._path.is_file():
            return []
        text = self._path.read_bytes().decode("utf-8", errors="replace")
        return [f"{line}\n" for line in text.split("\n")[:-1]]


def _line(task: _Task, number: int, attempts: Sequence[Attempt]) -> dict[str, Any]:
    question = task.questions[number]
    asked = {"prompt": question} if isinstance(question, str) else {"messages": question}
    return {**asked, "answers": [asdict(attempt) for attempt in attempts], "key": task.keys[number]}


def _shown(number: int, attempts: Sequence[Attempt], *, alone: bool) -> Iterator[str]:
    """For a terminal, or for a pipe: a single answer to a single prompt stands there as it is."""
    for sample, attempt in enumerate(attempts):
        if not alone or len(attempts) > 1:
            yield f"# prompt {number}" + (f", answer {sample}" if len(attempts) > 1 else "")
        text = "\n".join(filter(None, [attempt.work, attempt.text]))
        yield printable(text) if sys.stdout.isatty() else text
        if attempt.stopped != "answered":
            print(f"  prompt {number}: cut ({attempt.stopped})", file=sys.stderr, flush=True)


def _key(settings: dict[str, Any], tokens: Sequence[int]) -> str:
    text = json.dumps([settings, list(tokens)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tell(backend: Backend, line: str) -> None:
    """Beside the answers, which may go into a pipe."""
    if backend.process_index == 0:
        print(line, file=sys.stderr, flush=True)
