"""What all groups of commands share: how their options are spelled, and the arguments that several take."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

DEFAULT_COMMAND = "train"

CONTEXT = {
    # Hugging Face users type --max_steps as often as --max-steps.
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, or gs://bucket/prefix/run-id.")]


class DefaultCommandGroup(TyperGroup):
    """``numina-finetune --dataset-name …`` means ``numina-finetune train --dataset-name …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help", "-h", "--version"):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


def group(help: str | None = None) -> typer.Typer:
    """A group of commands; one without help stands among the others at the top."""
    return typer.Typer(help=help, context_settings=CONTEXT)
