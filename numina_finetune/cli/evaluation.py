"""What a model or a run is worth: ``evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import signal
from dataclasses import fields
from typing import Annotated, Any

import typer

from numina_finetune import launch
from numina_finetune.cli import backends
from numina_finetune.cli.groups import RunArgument, group
from numina_finetune.cli.options import field_parameter, with_parameters
from numina_finetune.config import BACKENDS, RunConfig
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.evaluation.options import EvaluateOptions

app = group()


def _evaluate(**given: Any) -> int:
    """Measure how often a model's answers are right; the same command again goes on where it was cut."""
    options = EvaluateOptions.from_mapping(given)
    devices = RunConfig(backend=options.backend)
    name, _ = launch.choose_backend(devices if options.backend in BACKENDS else RunConfig())
    launch.prepare_environment(name)
    if faults := [*launch.faults(name), *options.faults()]:
        raise ConfigError(faults)

    from numina_finetune.checkpoint.preemption import StopNotice
    from numina_finetune.evaluate_command import run_evaluate

    with StopNotice() as notice:
        code = run_evaluate(options, backends.factory(name), lambda: notice.wanted)
        return int(ExitCode.STOPPED if code == ExitCode.PREEMPTED and notice.signal == signal.SIGINT else code)


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
