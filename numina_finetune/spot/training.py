"""The command that the workers run: checked before a machine is asked for, and made fit for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from numina_finetune.checks import config_faults
from numina_finetune.config import RunConfig
from numina_finetune.data.sources import parse_source_name
from numina_finetune.option_fields import flag

CONFIG, PIPELINE = "training.yaml", "pipeline.yaml"
"""The names on the workers of the file that ``--config`` gives, and of a pipeline's."""


def training_faults(config: RunConfig, *, in_image: bool) -> list[str]:
    """What is wrong with the training's options, or cannot work on a worker.

    Args:
        in_image: it runs in a container, which may hold files that are not here.
    """
    faults = config_faults(config)
    if config.dry_run:
        faults.append("--dry-run among the training's options would train nothing: give it before the --")
    return faults if in_image else [*faults, *here_faults(named_things(config))]


def here_faults(named: Sequence[tuple[str, str]]) -> list[str]:
    """The options that name something on this computer.

    Args:
        named: options, and what each names.
    """
    return [
        f"{option} {name} is of this computer, which the workers do not see: use a hub name"
        for option, name in named
        if _is_here(name)
    ]


def with_shipped_config(training: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command as the workers can run it, and the text of the file that has to lie beside it, by name."""
    words, files = list(training), dict[str, str]()
    if words[:1] == ["run"]:
        files[PIPELINE] = Path(words[1]).read_text(encoding="utf-8")
        words[1] = PIPELINE
        return words, files
    for index, word in enumerate(words):
        name, equals, path = word.partition("=")
        if name != "--config":
            continue
        if equals:
            words[index] = f"--config={CONFIG}"
        elif index + 1 < len(words):
            path, words[index + 1] = words[index + 1], CONFIG
        files[CONFIG] = Path(path).read_text(encoding="utf-8")
    return words, files


def named_things(config: RunConfig) -> list[tuple[str, str]]:
    """Each option that may name a file or folder, and what it names."""
    found = [("--dataset-name", source.name) for source in config.datasets]
    found += [(flag(name), getattr(config, name)) for name in ("model_name", "tokenizer_name", "eval_dataset_name")]
    found += [("--against", name) for name in config.against]
    return [(option, name) for option, name in found if name]


def _is_here(name: str) -> bool:
    return name.startswith((".", "/", "~")) or any(Path(part).exists() for part in (name, parse_source_name(name)[0]))
