"""``checkpoints``: look at a run's checkpoints, check them, delete old ones."""

from __future__ import annotations

from typing import Annotated

import typer

from numina_finetune import launch
from numina_finetune.cli.groups import RunArgument, group

app = group("Look at a run's checkpoints, check them, delete old ones.")


@app.command("list")
def list_committed(
    run: RunArgument, json: Annotated[bool, typer.Option("--json", help="Print it for machines.")] = False
) -> int:
    """Print steps, sizes, ages, and what is committed; of each run, where RUN holds several."""
    launch.prepare_environment("native")
    from numina_finetune.checkpoint_commands import run_list

    return int(run_list(run, as_json=json))


@app.command("verify")
def verify(
    run: RunArgument, step: Annotated[int | None, typer.Option(help="Only this step's; all if unset.")] = None
) -> int:
    """Read every byte of the committed checkpoints again; exit code 3 if one is not what was committed."""
    launch.prepare_environment("native")
    from numina_finetune.checkpoint_commands import run_verify

    return int(run_verify(run, step))


@app.command("prune")
def prune(
    run: RunArgument,
    keep: Annotated[int, typer.Option(help="Sound checkpoints that stay, the newest ones; the best besides.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would go.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the run seems to be under way.")] = False,
) -> int:
    """Delete old checkpoints and what was never committed."""
    launch.prepare_environment("native")
    from numina_finetune.checkpoint_commands import run_prune

    return int(run_prune(run, keep, yes=yes, force=force))
