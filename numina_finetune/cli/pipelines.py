"""``run``: several commands as one pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from numina_finetune import launch
from numina_finetune.cli.groups import group

app = group()


@app.command("run")
def run_pipeline(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="YAML file of the pipeline.")],
    output_dir: Annotated[
        str, typer.Option(help="Folder or gs://bucket/prefix that holds the pipeline's own folder.")
    ] = "runs",
    run_id: Annotated[str | None, typer.Option(help="Name of that folder; the file's name entry if unset.")] = None,
    only: Annotated[str | None, typer.Option(help="The one step to run.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print how the steps stand, and run none.")] = False,
) -> int:
    """Run the steps of a pipeline that are not done yet; the same command again goes on where it was cut."""
    launch.prepare_environment("native")
    from numina_finetune.pipeline import command

    return int(command.run_pipeline(command.RunOptions(pipeline, output_dir, run_id, only, listed)))
