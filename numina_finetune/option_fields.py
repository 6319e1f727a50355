"""Fields of a dataclass as options: what each is called on the command line and in YAML, and its values read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import yaml

from numina_finetune.errors import ConfigError


def option(default: Any, help: str, group: str, *, identity: bool = True, alias: str | None = None) -> Any:
    """A field that is also a command-line option; two lives of one run may differ where ``identity`` is false.

    Args:
        alias: another name for it, on the command line and in YAML.
    """
    return field(default=default, metadata={"help": help, "group": group, "identity": identity, "alias": alias})


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def words_of(options: Any, *, without: Sequence[str] = ()) -> list[str]:
    """The command-line options that make ``options`` of the defaults.

    Args:
        options: a dataclass whose fields are options.
        without: fields that are none, or not to be said.
    """
    words = []
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name in without or value == option.default:
            continue
        if isinstance(value, bool):
            words.append(flag(option.name) if value else "--no-" + flag(option.name).removeprefix("--"))
        else:
            words.append(f"{flag(option.name)}={value}")
    return words


def values_of(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values in a file's mapping for a dataclass of options.

    Raises:
        ConfigError: unknown names, or values of the wrong type, all at once.
    """
    faults: list[str] = []
    values = typed_values(cls, mapping, where, faults)
    if faults:
        raise ConfigError(faults)
    return values


def load_yaml(path: str) -> dict[str, Any]:
    """The mapping in a run's YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"--config {path} holds {type(mapping).__name__}: it needs a mapping of option names")
    return mapping


def field_name(cls: type, name: str) -> str:
    """The field that a name of the YAML means, its other spellings included; the name itself if there is none."""
    name = str(name).replace("-", "_")
    aliases = {f.metadata["alias"]: f.name for f in fields(cls) if f.metadata.get("alias")}
    return aliases.get(name, name)


def typed_values(cls: type, mapping: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """Values of ``mapping`` converted to the types of ``cls``'s fields; what does not fit goes into ``faults``."""
    known = {f.name: f for f in fields(cls) if f.name != "datasets"}
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        name = field_name(cls, name)
        if name not in known:
            faults.append(f"{where}: {name!r} is unknown: use one of {', '.join(sorted(known))}")
            continue
        try:
            values[name] = _convert(str(known[name].type), value)
        except (TypeError, ValueError, OverflowError):
            faults.append(f"{where}: {name} is {value!r}: it needs {known[name].type}")
    return values


def _convert(annotation: str, value: Any) -> Any:
    kind = annotation.removesuffix(" | None")
    if value is None:
        if kind == annotation:
            raise TypeError
        return None
    if kind == "bool":
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind == "int":
        if isinstance(value, bool) or int(value) != value:
            raise TypeError
        return int(value)
    if kind == "float":
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # YAML reads 1e-5 as text
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise TypeError
        return tuple(value)
    if not isinstance(value, str):
        raise TypeError
    return value
