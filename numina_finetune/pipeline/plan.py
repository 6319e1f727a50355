"""The steps of a pipeline in their places: each folder is named by a hash of all that makes the step's result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numina_finetune.errors import ConfigError
from numina_finetune.pipeline.spec import PipelineSpec, Reference, StepSpec, substituted
from numina_finetune.pipeline.works import Export, Location, Train, Work, work_of

_UNKNOWN = "unknown"
"""Stands for the key of a step whose options are wrong."""


@dataclass(frozen=True)
class Step:
    """A step with all that is known before it runs."""

    name: str
    kind: str
    key: str
    location: Location
    options: Mapping[str, Any]
    """With the addresses of other steps' outputs."""
    work: Work
    needs: tuple[str, ...]
    """Names of the steps that it depends on."""

    @property
    def outputs(self) -> dict[str, str]:
        """Addresses, by name."""
        return {name: f"{self.location.url}/{where}".rstrip("/") for name, where in self.work.outputs.items()}


def plan_steps(spec: PipelineSpec, root: str, path: str, faults: list[str]) -> list[Step]:
    """The steps in order.

    Args:
        root: the pipeline's place.
        path: of its file, for messages.
        faults: takes everything that is wrong. A step whose options are none of its command is left out, and with it
            those that need it.
    """
    steps: dict[str, Step] = {}
    for each in spec.steps:
        where = f"{path}, step {each.name}"
        faults += _output_faults(each, steps, where)
        try:
            key = _key(each, steps, root, where)
        except ConfigError as error:
            faults += error.problems
            continue
        location = Location(root, f"{each.name}-{key}")
        options = substituted(each.options, _addresses(steps))
        work = work_of(each.kind, options, location, where)
        faults += [f"{where}: {fault}" for fault in work.faults()]
        needs = tuple(dict.fromkeys(reference.step for reference in each.references))
        if all(needed in steps for needed in needs):
            steps[each.name] = Step(each.name, each.kind, key, location, options, work, needs)
    faults += _export_faults(spec.steps, steps, path)
    return list(steps.values())


def before_others(step: StepSpec, spec: PipelineSpec, steps: Mapping[str, Step], done: Sequence[str]) -> Work:
    """The step's work as it can be checked before the steps that it depends on have run.

    A model that is not there yet is stood in for by the one that its training begins from: it has the same
    architecture and tokenizer. The place is one where nothing is, so that no stand-in is compared with a record.

    Args:
        steps: all of them, by name.
        done: names of those that have left their outputs.
    """
    by_name = {each.name: each for each in spec.steps}
    pending: list[Reference] = []

    def stand_in(reference: Reference) -> str:
        needed, own = by_name[reference.step], steps[reference.step].outputs[reference.output]
        origin = needed.options.get({"train": "model_name", "export": "run"}.get(needed.kind, ""))
        if needed.name in done or origin is None:
            return own
        pending.append(reference)
        return str(substituted(origin, stand_in))

    options = substituted(step.options, stand_in)
    if not pending:
        return steps[step.name].work
    location = steps[step.name].location
    return work_of(step.kind, options, Location(location.root, f"{location.folder}.check"), step.name)


def _key(step: StepSpec, steps: Mapping[str, Step], root: str, where: str) -> str:
    """The hash of all that makes the step's result.

    Raises:
        ConfigError: its options are not its command's.
    """
    named = substituted(step.options, lambda reference: f"{_folder(reference, steps)}/{reference.output}")
    work = work_of(step.kind, named, Location(root, step.name), where)
    inputs = {
        "kind": step.kind,
        "options": work.identity(),
        "files": work.files(),
        "steps": sorted({_folder(reference, steps) for reference in step.references}),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]


def _folder(reference: Reference, steps: Mapping[str, Step]) -> str:
    step = steps.get(reference.step)
    return step.location.folder if step else f"{reference.step}-{_UNKNOWN}"


def _addresses(steps: Mapping[str, Step]) -> Callable[[Reference], str]:
    def address(reference: Reference) -> str:
        step = steps.get(reference.step)
        return (step.outputs if step else {}).get(reference.output, f"{_folder(reference, steps)}/{reference.output}")

    return address


def _output_faults(step: StepSpec, steps: Mapping[str, Step], where: str) -> list[str]:
    return [
        f"{where}: {reference}: step {reference.step} leaves {', '.join(steps[reference.step].outputs)}"
        for reference in step.references
        if reference.step in steps and reference.output not in steps[reference.step].outputs
    ]


def _export_faults(specs: Sequence[StepSpec], steps: Mapping[str, Step], path: str) -> list[str]:
    """Adapters that a run of the pipeline does not have."""
    faults = []
    for spec in specs:
        work = steps[spec.name].work if spec.name in steps else None
        if not isinstance(work, Export) or work.lora_export is None:
            continue
        for reference in spec.references:
            trained = steps[reference.step].work if reference.step in steps else None
            if isinstance(trained, Train) and not trained.config.lora_rank:
                faults.append(
                    f"{path}, step {spec.name}: --lora-export {work.lora_export}: {reference.step} trains no adapters: "
                    "leave the option out"
                )
    return faults
