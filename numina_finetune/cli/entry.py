"""``numina-finetune``: its commands put together, and what becomes of a process that runs one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from numina_finetune import __version__, launch
from numina_finetune.cli import checkpoints, data, evaluation, machine, models, pipelines, spot, training
from numina_finetune.cli.groups import CONTEXT, DefaultCommandGroup
from numina_finetune.errors import ExitCode, UserError

app = typer.Typer(
    cls=DefaultCommandGroup,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
    help=(
        "Fine-tune language models for mathematics on TPUs, GPUs and CPUs. "
        "Without a command: train, whose options `numina-finetune train --help` lists."
    ),
)
for _commands in (training.app, pipelines.app, evaluation.app, models.app, machine.app):
    app.add_typer(_commands)
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(spot.app, name="spot")


def main() -> None:
    """Entry point of the console script, of ``python -m numina_finetune``, and of the launchers' scripts."""
    launch.stop_with_launcher()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("numina_finetune").setLevel(logging.INFO)
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; a user's fault is one message, never a traceback."""
    try:
        code = app(args=list(arguments), prog_name="numina-finetune", standalone_mode=False)
        return int(code or 0)
    except UserError as error:
        print(f"numina-finetune: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    except TyperException as error:  # an option that does not exist, or a value of the wrong type
        print(f"numina-finetune: {error.format_message()} (see --help)", file=sys.stderr, flush=True)
        return int(ExitCode.CONFIGURATION)
    except KeyboardInterrupt:
        return int(ExitCode.STOPPED)
    except typer.Exit as stop:
        return int(stop.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"numina-finetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before any command."""
