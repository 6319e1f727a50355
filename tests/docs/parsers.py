"""Commands of the documentation, read by the parsers of the programs that they name; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from numina_finetune import cli
from numina_finetune.checks import config_faults
from numina_finetune.cli.groups import CONTEXT, DEFAULT_COMMAND
from numina_finetune.cli.options import resolve_config
from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.evaluation.options import EvaluateOptions, GenerateOptions
from tests.conftest import ROOT

WRAPPERS = {"lr_sweep.py": ["sweep"], "spot_supervisor.py": ["spot", "run"]}
"""Scripts that are other names of a command."""


@cache
def tree() -> Any:
    return typer.main.get_command(cli.app)


def walk(command: Any) -> Iterator[Any]:
    """The command, and all below it."""
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from walk(child)


@cache
def options() -> frozenset[str]:
    """Every option of every command of ``numina-finetune``, as help spells it."""
    return frozenset(
        spelling
        for command in walk(tree())
        for parameter in command.params
        for spelling in (*parameter.opts, *parameter.secondary_opts)
    ) | {"--help"}


def faults_of(words: Sequence[str]) -> list[str]:
    """What is wrong with a command; a program that is not known here is a fault too."""
    program, arguments = Path(words[0]).name, list(words[1:])
    if program in ("python", "python3.11"):
        return _faults_of_python(arguments)
    if program in ("accelerate", "torchrun"):
        return _faults_of_launcher(program, arguments)
    if program == "numina-finetune":
        return faults_of_ours(arguments)
    return [] if program in OTHERS else [f"{program} is no program that the documentation is known to use"]


OTHERS = {
    "cd",
    "docker",
    "echo",
    "export",
    "gcloud",
    "git",
    "hf",
    "kubectl",
    "ls",
    "mkdir",
    "pip",
    "pytest",
    "sky",
    "source",
    "ssh-add",
    "tensorboard",
    "vllm",
    "wandb",
    "xpk",
}
"""Programs of others, whose commands bash alone has to understand."""


def faults_of_ours(arguments: list[str]) -> list[str]:
    """What is wrong with ``numina-finetune …``: its options, their values, and those of the training that it wraps.

    ``…`` among the words stands for options of the reader's, which are whatever is missing.
    """
    if "…" in arguments:
        given = [word for word in arguments if word != "…"]
        return [fault for fault in faults_of_ours(given) if " is missing: " not in fault]
    command, name = tree(), "numina-finetune"
    if arguments in (["--help"], ["--version"]):
        return []
    if not arguments or arguments[0] not in command.commands:
        arguments = [DEFAULT_COMMAND, *arguments]
    while hasattr(command, "commands"):
        if not arguments or arguments[0] not in command.commands:
            return [f"{name} {' '.join(arguments[:1])} is no command: use one of {', '.join(command.commands)}"]
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
        command = command.commands[name.rpartition(" ")[2]]
    if "--help" in arguments:
        return []
    try:
        context = command.make_context(name, list(arguments), **CONTEXT)
    except TyperException as error:
        return [f"{name}: {error.format_message()}"]
    return _VALUES.get(name.removeprefix("numina-finetune "), lambda _: [])(context)


def _of_training(context: Any) -> list[str]:
    faults: list[str] = []
    config = _config(dict(context.params), faults)
    return [*faults, *config_faults(config)]


def _of_data(context: Any) -> list[str]:
    """Of a command that takes some of a training's options: its values, and what is missing of all but those."""
    faults: list[str] = []
    config = _config(dict(context.params), faults)
    known = replace(config, model_name=config.model_name or "m", output_dir=config.output_dir or "o")
    return [*faults, *(fault for fault in config_faults(known) if not fault.startswith("--dataset-name is missing"))]


def _of_evaluation(context: Any) -> list[str]:
    return EvaluateOptions.from_mapping(context.params).faults()


def _of_generation(context: Any) -> list[str]:
    return GenerateOptions.from_mapping(context.params).faults()


def _of_sweep(context: Any) -> list[str]:
    return faults_of_ours(["train", *context.args, "--output-dir", "o"])


def _of_spot(context: Any) -> list[str]:
    place = context.params["output_dir"] or ""
    own = [] if place.startswith("gs://") else [f"--output-dir {place} is no bucket"]
    training = context.params["training"] or []
    if training[:1] == ["run"]:  # a pipeline
        return [*own, *faults_of_ours([*training, "--output-dir", "gs://b/p"])]
    return [*own, *faults_of_ours(["train", *training, "--output-dir", "gs://b/p"])]


_VALUES: dict[str, Callable[[Any], list[str]]] = {
    "train": _of_training,
    "plan": _of_data,
    "doctor": _of_data,
    "data prepare": _of_data,
    "data preview": _of_data,
    "data report": _of_data,
    "data check": _of_data,
    "evaluate": _of_evaluation,
    "generate": _of_generation,
    "sweep": _of_sweep,
    "spot run": _of_spot,
}


def _config(given: dict[str, Any], faults: list[str]) -> RunConfig:
    """The run's settings; a file that the checkout does not have is the reader's own, and may say anything."""
    path = given.pop("config")
    own = path is not None and not path.startswith("configs/")
    names = {*RunConfig.__dataclass_fields__, *_source_options(), "bf16", "gradient_checkpointing"}
    values = {name: given.get(name) for name in names - {"datasets"}}
    if own:
        values |= {"dataset_name": values["dataset_name"] or ["d"], "model_name": values["model_name"] or "m"}
        values["output_dir"] = values["output_dir"] or "o"
    try:
        return resolve_config(None if own or path is None else str(ROOT / path), values, faults)
    except ConfigError as error:
        faults += error.problems
        return RunConfig()


def _source_options() -> set[str]:
    return {parameter.name for parameter in tree().commands["train"].params if parameter.multiple}


def _faults_of_python(arguments: list[str]) -> list[str]:
    if arguments[:1] == ["-m"]:
        ours = arguments[1] == "numina_finetune"
        return faults_of_ours(arguments[2:]) if ours else faults_of([arguments[1], *arguments[2:]])
    script, rest = ROOT / arguments[0], arguments[1:]
    if not script.is_file():
        return [f"{arguments[0]} is not there"]
    if script.name in WRAPPERS:
        return faults_of_ours([*WRAPPERS[script.name], *rest])
    known = script.read_text(encoding="utf-8")
    if script.name == "bootstrap.py":
        return [] if rest and f'"{rest[0]}": ' in known else [f"{arguments[0]} knows no {rest[:1]}"]
    return [f"{arguments[0]} has no {word}" for word in rest if word.startswith("--") and f'"{word}"' not in known]


def _faults_of_launcher(program: str, arguments: list[str]) -> list[str]:
    """What is wrong with ``accelerate launch …`` or ``torchrun …``, and with the training that it starts."""
    if program == "accelerate":
        if arguments[:1] != ["launch"]:
            return []
        from accelerate.commands.launch import launch_command_parser

        parser, arguments = launch_command_parser(), arguments[1:]
    else:
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit:
        return [f"{program} does not understand {' '.join(arguments)}"]
    found = []
    config = getattr(parsed, "config_file", None)
    if config and not (ROOT / config).is_file():
        found.append(f"{config} is not there")
    if not re.fullmatch(r"numina[-_]finetune", parsed.training_script):
        return [*found, f"{program} starts {parsed.training_script}, which is not ours"]
    return [*found, *faults_of_ours(list(parsed.training_script_args))]
