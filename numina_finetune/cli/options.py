"""How the command line's options are made of the fields of ``RunConfig``, and become one again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from numina_finetune.config import FORMATS, RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.model_defaults import with_model_defaults
from numina_finetune.option_fields import field_name, flag, load_yaml

SOURCE_OPTIONS: dict[str, tuple[str, type, str]] = {
    "dataset_name": ("name", str, "Hub name, folder, .jsonl/.parquet file or synthetic-gsm8k; name[split] works."),
    "dataset_config": ("config", str, "Configuration of a hub dataset, such as main."),
    "dataset_split": ("split", str, "Split to train on; train if unset."),
    "dataset_revision": ("revision", str, "Branch, tag or commit of a hub dataset."),
    "dataset_weight": ("weight", float, "Share of the rows; all in proportion to their size if unset."),
    "dataset_max_samples": ("max_samples", int, "At most so many samples of the dataset, chosen by the seed."),
    "format": ("format", str, f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}."),
    "messages_field": ("messages_field", str, "Column of the chat messages."),
    "question_field": ("question_field", str, "Column of the question."),
    "answer_field": ("answer_field", str, "Column of the answer."),
    "tool_calls_field": ("tool_calls_field", str, "Column of OpenAI tool calls, made before the answer."),
    "tool_name_field": ("tool_name_field", str, "Column of the called tools' names."),
    "tool_input_field": ("tool_input_field", str, "Column of the tools' inputs."),
    "tool_output_field": ("tool_output_field", str, "Column of the tools' outputs."),
}
"""Options that are given once, or once for each --dataset-name: the SourceConfig field, its type, and help."""


GIVEN, OF_FILE, OF_MODEL = "given", "of --config", "usual for this model"
"""Where an option's value comes from; the others have their defaults."""


def resolve_config(
    yaml_path: str | None, given: dict[str, Any], faults: list[str], origins: dict[str, str] | None = None
) -> RunConfig:
    """The YAML's values, overridden by the options that were given.

    Args:
        faults: takes the contradictions that the result cannot show, so that they are told with all others.
        origins: takes where each field comes from that has no default value.

    Raises:
        ConfigError: unknown names, or values of the wrong type.
    """
    of_file = load_yaml(yaml_path) if yaml_path else {}
    source_options = {name: given.pop(name) for name in SOURCE_OPTIONS}
    bf16, checkpointing = given.pop("bf16", None), given.pop("gradient_checkpointing", None)
    told = {name: value for name, value in given.items() if value not in (None, [])}
    if bf16 is not None:
        wanted = "bf16" if bf16 else "fp32"
        other = {**of_file, **told}.get("precision", wanted)
        if other != wanted:
            faults.append(f"--{'' if bf16 else 'no-'}bf16 and --precision {other} contradict each other: keep one")
        told["precision"] = wanted
    if checkpointing is not None:
        if "remat" in told:
            faults.append(
                f"--{'' if checkpointing else 'no-'}gradient-checkpointing and --remat {told['remat']} both say what "
                "is computed again: keep one"
            )
        else:
            told["remat"] = "full" if checkpointing else "none"
    sources = _sources(source_options, faults)
    if sources:
        told["datasets"] = sources
    mapping = {**of_file, **told}
    if yaml_path is None:  # a file says all of it
        mapping = with_model_defaults(mapping)
    if origins is not None:
        for label, layer in ((OF_MODEL, mapping), (OF_FILE, of_file), (GIVEN, told)):
            origins |= {field_name(RunConfig, name): label for name in layer}
    try:
        return RunConfig.from_mapping(mapping, yaml_path or "the command line")
    except ConfigError as error:
        raise ConfigError([*faults, *error.problems]) from error


def _sources(options: dict[str, list[Any] | None], faults: list[str]) -> list[dict[str, Any]]:
    """One mapping for each --dataset-name; other options apply to all, or to each in turn."""
    names = options["dataset_name"] or []
    sources: list[dict[str, Any]] = [{"name": name} for name in names]
    for option, (column, _, _) in SOURCE_OPTIONS.items():
        values = options[option] or []
        if option == "dataset_name" or not values:
            continue
        if not names:
            faults.append(f"{flag(option)} {values[0]} belongs to a --dataset-name, and there is none: add one")
        elif len(values) not in (1, len(names)):
            faults.append(
                f"{flag(option)} is given {len(values)} times for {len(names)} datasets: "
                "give it once, or once for each --dataset-name"
            )
        else:
            for source, value in zip(sources, values * (len(names) if len(values) == 1 else 1), strict=True):
                source[column] = value
    return sources


def command_of(
    run: Callable[..., int], doc: str | None, chosen: Sequence[Field[Any]], *more: Any
) -> Callable[..., int]:
    """``run(yaml path, **options)`` with one option for each chosen field, so that no option is written down twice."""
    parameters = [
        parameter("config", str, "YAML file with the same names; options given here win.", "Run"),
        *(parameter(name, kind, text, "Data", repeated=True) for name, (_, kind, text) in SOURCE_OPTIONS.items()),
        *(field_parameter(f) for f in chosen),
        *more,
    ]

    return with_parameters(run, doc, parameters)


def with_parameters(
    run: Callable[..., int], doc: str | None, parameters: Sequence[inspect.Parameter]
) -> Callable[..., int]:
    """``run`` with a signature that Typer can read the options from."""

    def command(**options: Any) -> int:
        return run(**options)

    command.__doc__ = doc
    command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def field_parameter(f: Field[Any]) -> inspect.Parameter:
    kinds = {"str": str, "int": int, "float": float, "bool": bool, "tuple[str, ...]": str}
    kind = kinds[str(f.type).removesuffix(" | None")]
    default = f.default if f.default is not MISSING else None
    text = f.metadata["help"] + (f" [default: {default}]" if default not in (None, "", ()) else "")
    repeated, alias = str(f.type).startswith("tuple"), f.metadata.get("alias")
    return parameter(f.name, kind, text, f.metadata["group"], repeated=repeated, alias=alias)


def parameter(
    name: str, kind: type, text: str, group: str, *, repeated: bool = False, alias: str | None = None
) -> inspect.Parameter:
    """An option that is None unless given, so that a YAML value is only overridden on purpose."""
    spelling = flag(name)
    spellings = [f"{spelling}/--no-{spelling.removeprefix('--')}" if kind is bool else spelling]
    spellings += [flag(alias)] if alias else []
    shown = text.replace("[", r"\[")  # square brackets are markup to Typer's help
    option = typer.Option(*spellings, help=shown, rich_help_panel=group, show_default=False)
    annotation: Any = list[kind] | None if repeated else kind | None  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


FIELDS = [f for f in fields(RunConfig) if f.name != "datasets"]
"""Those that are an option each; those of a dataset are ``SOURCE_OPTIONS``."""
BF16 = parameter("bf16", bool, "--bf16 is --precision bf16, --no-bf16 is --precision fp32.", "Model")
CHECKPOINTING = parameter(
    "gradient_checkpointing",
    bool,
    "--gradient-checkpointing is --remat full, --no-gradient-checkpointing is --remat none.",
    "Optimisation",
)
