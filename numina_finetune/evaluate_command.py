"""``numina-finetune evaluate`` and ``compare``: from the options to the folder of results, and from two to one page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from numina_finetune.asked_model import AskedModel, find_model
from numina_finetune.config import RunConfig
from numina_finetune.data.chat import ChatOptions
from numina_finetune.data.dataset import tokenizer_hash
from numina_finetune.data.tir import PYTHON_TOOL
from numina_finetune.errors import ExitCode, all_found
from numina_finetune.evaluation.compare import compare
from numina_finetune.evaluation.options import EvaluateOptions
from numina_finetune.evaluation.page import html_comparison, markdown_comparison
from numina_finetune.evaluation.prompts import PromptOptions, Prompts
from numina_finetune.evaluation.results import ResultFolder, read_results
from numina_finetune.evaluation.run import progress_line, reports, run_batches, summarise
from numina_finetune.evaluation.sandbox import Minimum, require
from numina_finetune.evaluation.scoring import Figures, Record, figures
from numina_finetune.evaluation.solving import Solve, solve_directly, solve_with_python, tools_of
from numina_finetune.evaluation.tasks import Problem, Problems, chosen, find_task, load_examples, load_problems
from numina_finetune.storage import open_store
from numina_finetune.train.backend import Backend
from numina_finetune.train.provenance import versions

MakeBackend = Callable[[RunConfig], Backend]


def run_evaluate(options: EvaluateOptions, make_backend: MakeBackend, stop: Callable[[], bool]) -> ExitCode:
    """Evaluate, or go on; the exit code says whether all problems are done.

    Args:
        options: without faults.
        stop: whether to end after the batch at hand.

    Raises:
        ConfigError, DataError, CheckpointError: everything that is not there, before a device is touched.
    """
    found = evaluate(options, make_backend, stop)
    return ExitCode.PREEMPTED if found is None else ExitCode.DONE


def evaluate(
    options: EvaluateOptions, make_backend: MakeBackend, stop: Callable[[], bool] = lambda: False
) -> Figures | None:
    """One evaluation into its folder.

    Args:
        options: without faults.

    Returns:
        The headline figures; None if it was to stop before its end.
    """
    model, task = _all_of(options)
    prompts = _prompts(options, model, task.examples)
    longest = max(len(prompts.ids(problem.question)) for problem in task.asked.problems)
    model.refuse_beyond(longest, options.max_new_tokens, "fewer --shots")
    settings = _settings(options, model, task)
    folder = ResultFolder(options.output_dir)
    folder.refuse_other(settings)
    backend = make_backend(model.config)
    say = print if backend.process_index == 0 else _silent
    done = backend.processes.broadcast(folder.begin(settings, versions()) if backend.process_index == 0 else None)
    left = len(task.asked.problems) - len(done)
    say(f"{task.asked.task}: {len(task.asked.problems)} problems, {left} to do; {backend.device_description}")
    if left:
        opened, weights = model.open()
        backend.place(opened, model.config, weights, trained=False)
    together = list(done)

    def record(graded: Sequence[Record]) -> None:
        together.extend(graded)
        if backend.process_index == 0:
            folder.append(graded)
        say(progress_line(together, task.asked), flush=True)

    records = run_batches(
        task.asked,
        _solve(options, model, prompts, backend),
        done=done,
        record=record,
        samples=options.samples,
        rows=options.batch_size,
        stop=lambda: backend.processes.any(stop()),
    )
    if records is None:
        if backend.process_index == 0:
            folder.publish()
        say(f"stopped at {len(together)} of {len(task.asked.problems)} problems: the same command goes on")
        return None
    summary = summarise(task.asked, records, settings)
    if backend.process_index == 0:
        folder.finish(summary, reports(summary, records))
    measured = figures(records, task.asked.style)
    say(f"{measured.line}\n{backend.summary()}\nthe report is {options.output_dir.rstrip('/')}/report.html", flush=True)
    return measured


def run_compare(first: str, second: str, output_dir: str | None) -> ExitCode:
    """Print what two evaluations say about two models; with a folder, write it there too.

    Raises:
        ConfigError: one of them is no finished evaluation, or they are not on the same problems.
    """
    found = compare(read_results(first), read_results(second))
    print(found.line)
    if output_dir:
        store = open_store(output_dir)
        store.write("comparison.md", markdown_comparison(found).encode())
        store.write("comparison.html", html_comparison(found).encode())
        store.write_json("comparison.json", found.to_mapping())
        print(f"the problems that changed are in {output_dir.rstrip('/')}/comparison.html")
    return ExitCode.DONE


@dataclass(frozen=True)
class _Asked:
    """What is asked, and what is shown before."""

    asked: Problems
    examples: list[Problem]


def _all_of(options: EvaluateOptions) -> tuple[AskedModel, _Asked]:
    """What the options name, found.

    Raises:
        ConfigError: everything that is not there.
    """
    needed: dict[str, Callable[[], Any]] = {"model": lambda: find_model(options), "task": lambda: _load(options)}
    if options.tools:
        needed["sandbox"] = lambda: require(Minimum(options.sandbox_minimum))
    found = all_found(needed)
    return found["model"], found["task"]


def _load(options: EvaluateOptions) -> _Asked:
    task = find_task(options.task, options.question_field, options.answer_field, options.answer_style)
    everything = load_problems(task)
    examples = load_examples(task, options.shots_file, everything.problems, options.shots, options.seed)
    problems = chosen(everything.problems, options.max_problems, options.seed)
    return _Asked(replace(everything, problems=problems), examples)


def _prompts(options: EvaluateOptions, model: AskedModel, examples: Sequence[Problem]) -> Prompts:
    chat = ChatOptions(options.chat_family, options.chat_date, options.reasoning_effort)
    how = PromptOptions(options.prompt, options.instruction, options.system_prompt, chat)
    called = options.tools is not None and options.tir_style == "tool_calls"
    return Prompts(model.tokenizer, how, examples, [PYTHON_TOOL] if called else None)


def _solve(options: EvaluateOptions, model: AskedModel, prompts: Prompts, backend: Backend) -> Solve:
    decoding = model.decoding(options, prompts.stop_ids(model.generation))
    if options.tools is None:
        return solve_directly(prompts, backend.generate, decoding)
    return solve_with_python(prompts, backend.generate, decoding, tools_of(options), backend.processes)


def _settings(options: EvaluateOptions, model: AskedModel, task: _Asked) -> dict[str, Any]:
    """What two lives of one evaluation have in common."""
    return {
        **options.settings(),
        **model.identity,
        "tokenizer": tokenizer_hash(model.tokenizer),
        "answer_style": task.asked.style,
        "problems": _digest(task.asked.problems),
        "examples": _digest(task.examples),
    }


def _digest(problems: Sequence[Problem]) -> str:
    text = json.dumps([asdict(problem) for problem in problems])
    return f"{len(problems)}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _silent(*_: object, **__: object) -> None:
    """What other processes than the first say."""
