"""What a model says and is worth: ``generate``, ``evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from numina_finetune import launch
from numina_finetune.cli import backends
from numina_finetune.cli.groups import RunArgument, group
from numina_finetune.cli.options import field_parameter, with_parameters
from numina_finetune.config import BACKENDS, RunConfig
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.evaluation.options import AnswerOptions, EvaluateOptions, GenerateOptions

app = group()


def _evaluate(**given: Any) -> int:
    """Measure how often a model's answers are right; the same command again goes on where it was cut."""
    options = EvaluateOptions.from_mapping(given)
    name = _prepare(options, [])

    from numina_finetune.evaluate_command import run_evaluate

    return _until_stopped(lambda stop: run_evaluate(options, backends.factory(name), stop))


def _generate(**given: Any) -> int:
    """Print what a model answers to prompts, or write it to a file; with --output the same command again goes on."""
    options = GenerateOptions.from_mapping(given)
    faults = []
    if launch.device_count("native") != 1 and (options.prompts == "-" or not (options.prompts or options.prompt)):
        faults.append("standard input reaches only one of several processes: give --prompts FILE")
    name = _prepare(options, faults)
    for handler in logging.getLogger().handlers:  # standard output is the answers'
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)

    from numina_finetune.generate_command import run_generate

    given_text = None if sys.stdin is None or sys.stdin.isatty() else sys.stdin
    return _until_stopped(lambda stop: run_generate(options, backends.factory(name), stop, given_text))


def _prepare(options: AnswerOptions, faults: list[str]) -> str:
    """The backend's name, its environment prepared.

    Raises:
        ConfigError: the given faults, and those of the options.
    """
    devices = RunConfig(backend=options.backend) if options.backend in BACKENDS else RunConfig()
    name, _ = launch.choose_backend(devices)
    launch.prepare_environment(name)
    if faults := [*launch.faults(name, devices), *options.faults(), *faults]:
        raise ConfigError(faults)
    return name


def _until_stopped(run: Callable[[Callable[[], bool]], ExitCode]) -> int:
    """The exit code of what ends early once this process is told to stop."""
    from numina_finetune.checkpoint.preemption import StopNotice

    with StopNotice() as notice:
        code = run(lambda: notice.wanted)
        return int(ExitCode.STOPPED if code == ExitCode.PREEMPTED and notice.signal == signal.SIGINT else code)


app.command("generate")(
    with_parameters(_generate, _generate.__doc__, [field_parameter(f) for f in fields(GenerateOptions)])
)
app.command("evaluate")(
    with_parameters(_evaluate, _evaluate.__doc__, [field_parameter(f) for f in fields(EvaluateOptions)])
)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="Folder or gs://… of an evaluation.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Of another one, on the same problems.")],
    output_dir: Annotated[
        str | None, typer.Option(help="Folder or gs://bucket/prefix for the problems that changed, as a page.")
    ] = None,
) -> int:
    """Compare two evaluations problem by problem: which model is better, and how sure that is."""
    launch.prepare_environment("native")
    from numina_finetune.evaluate_command import run_compare

    return int(run_compare(first, second, output_dir))


@app.command()
def report(
    run: RunArgument,
    output: Annotated[str | None, typer.Option(help="The page; report.html in the run's folder if unset.")] = None,
) -> int:
    """Write one HTML page on a run: curves over all its lives, speed, checkpoints, data, evaluations, outcomes."""
    launch.prepare_environment("native")
    from numina_finetune.run_report.command import run_report

    return int(run_report(run, output))
