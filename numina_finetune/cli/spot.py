"""``spot``: keep a training on spot TPUs alive until it is done."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from numina_finetune.cli.groups import RunArgument, group
from numina_finetune.cli.options import field_parameter, resolve_config, with_parameters
from numina_finetune.cli.training import training_options
from numina_finetune.errors import ConfigError
from numina_finetune.spot.options import SpotOptions

app = group("Keep a training on spot TPUs alive until it is done.")


def _spot_run(training: list[str] | None, **given: Any) -> int:
    """Keep a training on spot TPUs alive until it is done; its own options stand after --. Given again, it goes on."""
    from numina_finetune.spot import commands

    options = SpotOptions.from_mapping({name: value for name, value in given.items() if value is not None})
    words = training or []
    options, faults = _checked_training(options, words)
    return int(commands.run(options, words, faults=faults))


def _checked_training(options: SpotOptions, words: list[str]) -> tuple[SpotOptions, list[str]]:
    """The options with the run's name, and what is wrong with the training's: before a machine costs anything."""
    from numina_finetune.spot.training import training_faults

    faults: list[str] = []
    if options.output_dir and not options.output_dir.startswith("gs://"):
        faults.append(
            f"--output-dir {options.output_dir} is of this computer: give gs://bucket/prefix, which the workers see too"
        )
    if words[:1] == ["run"]:
        from numina_finetune.pipeline.supervised import checked_pipeline

        named, wrong = checked_pipeline(options, words)
        return named, [*faults, *wrong]
    try:
        given = training_options(words)
        config = resolve_config(given.pop("config"), given, faults)
    except TyperException as error:
        return options, [*faults, f"after --: {error.format_message()}"]
    except ConfigError as error:
        return options, [*faults, *error.problems]
    config = replace(config, output_dir=options.output_dir or ".", run_id=options.run_id or None)
    named = replace(options, run_id=config.resolved_run_id)
    return named, [*faults, *training_faults(config, in_image=bool(options.docker_image))]


_TRAINING = inspect.Parameter(
    "training",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- TRAINING OPTIONS",
            help="As for train, without --output-dir and --run-id; or: run PIPELINE.yaml.",
        ),
    ],
)
app.command("run")(
    with_parameters(_spot_run, _spot_run.__doc__, [_TRAINING, *(field_parameter(f) for f in fields(SpotOptions))])
)


@app.command("status")
def status(run: RunArgument) -> int:
    """Print state, machine, step, loss, cost so far, goodput, what comes next, and who supervises."""
    from numina_finetune.spot import commands

    return int(commands.status(run))


@app.command("logs")
def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
) -> int:
    """Print every worker's log, set-ups and trainings in the order of their lives."""
    from numina_finetune.spot import commands

    return int(commands.logs(run, follow=follow))


@app.command("stop")
def stop(run: RunArgument) -> int:
    """Have the training save, then delete the machine; with and without a living supervisor."""
    from numina_finetune.spot import commands

    return int(commands.stop(run))


@app.command("clean")
def clean(run: RunArgument) -> int:
    """Delete every machine of the run, whatever state it is in."""
    from numina_finetune.spot import commands

    return int(commands.clean(run))


@app.command("report")
def report(run: RunArgument) -> int:
    """Print where the machine time went and what a million tokens cost; draw it too."""
    from numina_finetune.spot import commands

    return int(commands.report(run))
