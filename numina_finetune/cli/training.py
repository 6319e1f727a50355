"""``train``, which is also the command where none is named, and what runs trainings: ``quickstart`` and ``sweep``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from numina_finetune import launch
from numina_finetune.cli import backends
from numina_finetune.cli.groups import CONTEXT, DEFAULT_COMMAND, group
from numina_finetune.cli.options import BF16, CHECKPOINTING, FIELDS, command_of, resolve_config
from numina_finetune.errors import ConfigError

app = group()


def _train(config: str | None, **given: Any) -> int:
    """Fine-tune a model; the same command again resumes."""
    faults: list[str] = []
    origins: dict[str, str] = {}
    run_config = resolve_config(config, given, faults, origins)
    name, reason = launch.choose_backend(run_config)
    launch.prepare_environment(name)

    from numina_finetune.checkpoint.preemption import StopNotice
    from numina_finetune.evaluation import in_loop
    from numina_finetune.train.dry_run import dry_run
    from numina_finetune.train.run import check, train

    with StopNotice(run_config.preemption_grace) as notice:
        try:
            check(run_config, name)
        except ConfigError as error:
            faults += error.problems
        faults += in_loop.faults(run_config)
        if faults:
            raise ConfigError(dict.fromkeys(faults))  # the same dataset twice is the same fault once
        if run_config.metadata_url != "none":
            notice.watch_metadata(run_config.metadata_url, can_migrate=not launch.tpu_attached())
        if os.environ.get("RANK", "0") == "0":
            print(f"backend {name} ({reason})", flush=True)
        if run_config.dry_run:
            return int(dry_run(run_config, backends.factory(name), origins))
        return int(train(run_config, backends.factory(name), notice, in_loop.make_evaluator))


app.command(DEFAULT_COMMAND)(command_of(_train, _train.__doc__, FIELDS, BF16, CHECKPOINTING))


def training_options(words: Sequence[str]) -> dict[str, Any]:
    """The options of a training by name, None where one is not given.

    Raises:
        TyperException: an option that does not exist, or a value of the wrong type.
    """
    train: Any = typer.main.get_command(app)
    given: dict[str, Any] = train.commands[DEFAULT_COMMAND].make_context(DEFAULT_COMMAND, list(words), **CONTEXT).params
    return given


@app.command()
def quickstart(
    output_dir: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("quickstart-run"),
) -> int:
    """Train a tiny model on generated problems, be preempted, resume, evaluate, export: a few minutes on a CPU."""
    launch.prepare_environment("native")
    from numina_finetune.quickstart import run_quickstart

    return run_quickstart(output_dir, backends.factory("native"))


@app.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
def sweep(
    ctx: typer.Context,
    lrs: Annotated[str, typer.Option(help="Learning rates: 1e-5,3e-5, or LOW:HIGH:COUNT, evenly spaced in log.")],
    parallel: Annotated[
        int, typer.Option(help="Trials at a time; how they share cores or GPUs is for you to arrange.")
    ] = 1,
    diverge_factor: Annotated[
        float, typer.Option(help="Stop a trial whose loss stays above so many times its best; 0 = never.")
    ] = 2.0,
    diverge_steps: Annotated[int, typer.Option(help="For so many steps in a row.")] = 20,
) -> int:
    """Train at several learning rates and rank them; every other option goes to train. Given again, it goes on."""
    from numina_finetune.sweep.command import SweepOptions, passed_faults, run_sweep
    from numina_finetune.sweep.divergence import Criteria

    words, faults = list(ctx.args), list[str]()
    given = training_options(words)
    faults += passed_faults(given)
    try:
        base = resolve_config(given.pop("config"), given, faults)
    except ConfigError as error:
        raise ConfigError(dict.fromkeys([*faults, *error.problems])) from error
    options = SweepOptions(lrs, parallel, Criteria(diverge_factor, diverge_steps))
    return int(run_sweep(options, base, words, faults))
