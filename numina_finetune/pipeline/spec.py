"""A pipeline as its YAML file says it: steps, their options, and the outputs of other steps that these name.

``${step.output}`` anywhere in an option is the address of another step's output, and makes this step depend on that
one; nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from numina_finetune.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_STEP_KEYS = ("name", "kind", "options")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Reference:
    """An output of another step."""

    step: str
    output: str

    def __str__(self) -> str:
        return f"${{{self.step}.{self.output}}}"


@dataclass(frozen=True)
class StepSpec:
    """One step, its options as they are written."""

    name: str
    kind: str
    options: Mapping[str, Any]

    @property
    def references(self) -> tuple[Reference, ...]:
        """The outputs of other steps that its options name, each once."""
        return tuple(dict.fromkeys(_references(self.options)))


@dataclass(frozen=True)
class PipelineSpec:
    """The steps, in an order in which each comes after those that it depends on."""

    name: str
    steps: tuple[StepSpec, ...]


def substituted(value: Any, address: Callable[[Reference], str]) -> Any:
    """Plain data with each reference replaced by what ``address`` gives for it."""
    if isinstance(value, Mapping):
        return {name: substituted(each, address) for name, each in value.items()}
    if isinstance(value, list):
        return [substituted(each, address) for each in value]
    if isinstance(value, str):
        return _REFERENCE.sub(lambda found: address(_reference(found[1])), value)
    return value


def load_pipeline(path: str, kinds: Sequence[str]) -> PipelineSpec:
    """Read a pipeline's file.

    Args:
        kinds: of steps that there are.

    Raises:
        ConfigError: it cannot be read, or everything that is wrong with its form and its references.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        written = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(written, Mapping):
        raise ConfigError(f"{path} holds {type(written).__name__}: it needs a mapping with name and steps")
    faults = [
        f"{path}: {name!r} is unknown: use one of name, defaults, steps"
        for name in written
        if name not in ("name", "defaults", "steps")
    ]
    name = written.get("name")
    if not is_name(name):
        faults.append(f"{path}: name is {name!r}: it names a folder, so use letters, digits, - and _")
    defaults = _defaults(written.get("defaults") or {}, kinds, path, faults)
    steps = _steps(written.get("steps"), defaults, kinds, path, faults)
    faults += _reference_faults(steps, path)
    if faults:
        raise ConfigError(faults)
    return PipelineSpec(str(name), _ordered(steps, path))


def _defaults(written: Any, kinds: Sequence[str], path: str, faults: list[str]) -> dict[str, dict[str, Any]]:
    if not isinstance(written, Mapping):
        faults.append(f"{path}: defaults is {written!r}: it needs a mapping from kinds of steps to options")
        return {}
    found = {}
    for kind, options in written.items():
        if kind not in kinds:
            faults.append(f"{path}, defaults: {kind!r} is no kind of step: use one of {', '.join(kinds)}")
        elif not isinstance(options, Mapping):
            faults.append(f"{path}, defaults: {kind} is {options!r}: it needs a mapping of options")
        else:
            found[kind] = _named(options)
    return found


def _steps(
    written: Any, defaults: Mapping[str, dict[str, Any]], kinds: Sequence[str], path: str, faults: list[str]
) -> list[StepSpec]:
    if not isinstance(written, list) or not written:
        faults.append(f"{path}: steps is {written!r}: it needs a list with at least one step")
        return []
    steps: list[StepSpec] = []
    for number, entry in enumerate(written, 1):
        place = f"{path}, step {number}"
        if not isinstance(entry, Mapping):
            faults.append(f"{place} is {entry!r}: it needs name, kind and options")
            continue
        name, kind, options = entry.get("name"), entry.get("kind"), entry.get("options") or {}
        found = [f"{key!r} is unknown: use name, kind and options" for key in entry if key not in _STEP_KEYS]
        if not is_name(name):
            found.append(f"name is {name!r}: it names a folder, so use letters, digits, - and _")
        elif name in [step.name for step in steps]:
            found.append(f"there is another step {name}: give it another name")
        if kind not in kinds:
            found.append(f"kind is {kind!r}: use one of {', '.join(kinds)}")
        if not isinstance(options, Mapping):
            found.append(f"options is {options!r}: it needs a mapping of option names")
        faults += [f"{place}: {fault}" for fault in found]
        if not found:
            steps.append(StepSpec(str(name), str(kind), {**defaults.get(str(kind), {}), **_named(options)}))
    return steps


def _reference_faults(steps: Sequence[StepSpec], path: str) -> list[str]:
    names = [step.name for step in steps]
    return [
        f"{path}, step {step.name}: {reference} names no step: there are {', '.join(names)}"
        for step in steps
        for reference in step.references
        if reference.step not in names
    ]


def _ordered(steps: Sequence[StepSpec], path: str) -> tuple[StepSpec, ...]:
    """As they are written, except that each comes after those that it depends on."""
    by_name = {step.name: step for step in steps}
    sorter = TopologicalSorter({step.name: [reference.step for reference in step.references] for step in steps})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError(
            f"{path}: steps wait for one another ({circle}): leave one of these references out"
        ) from error
    order: list[StepSpec] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        first = next(name for name in by_name if name in ready)
        ready.remove(first)
        order.append(by_name[first])
        sorter.done(first)
    return tuple(order)


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _references(each)
    elif isinstance(value, str):
        yield from (_reference(found) for found in _REFERENCE.findall(value))


def _reference(text: str) -> Reference:
    step, _, output = text.strip().partition(".")
    return Reference(step, output)


def _named(options: Mapping[Any, Any]) -> dict[str, Any]:
    """With the names of options as files have them, whichever way they are spelled."""
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def is_name(name: Any) -> bool:
    """Whether it can name a folder."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
