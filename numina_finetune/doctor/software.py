"""Whether the installed packages are those that this one needs, by its own metadata."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from numina_finetune.doctor.findings import Finding, fault, note, ok

PACKAGE = "numina_finetune"
_NAMED = ("torch", "torch_xla", "transformers", "accelerate", "datasets")
"""Whose versions are told where all is well."""


def check_software(*, on_tpu: bool, package: str = PACKAGE) -> Iterator[Finding]:
    """Compare every requirement with what is installed; where there is a TPU, those of its extra too."""
    try:
        wanted = requirements(package, {"", "tpu"} if on_tpu else {""})
    except metadata.PackageNotFoundError:
        yield note(
            "packages", "numina_finetune itself is not installed, so that its requirements are not known",
            "pip install -e . in its checkout",
        )  # fmt: skip
        return
    faults = [found for requirement in wanted if (found := _fault_of(requirement)) is not None]
    yield from faults
    if not faults:
        told = ", ".join(f"{name} {metadata.version(name)}" for name in _NAMED if _installed(name))
        yield ok("packages", f"{len(wanted)} as required: {told}")


def requirements(package: str, extras: set[str]) -> list[Requirement]:
    """What an installed package requires here, and what its extras add; extras of what it requires are followed.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    found = []
    for text in metadata.requires(package) or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            found.append(requirement)
            if requirement.extras and _installed(requirement.name):  # torch_xla[tpu] names its libtpu
                found += requirements(requirement.name, set(requirement.extras))
    return found


def _fault_of(requirement: Requirement) -> Finding | None:
    installed = _installed(requirement.name)
    remedy = f"pip install --constraint constraints.txt '{requirement.name}{requirement.specifier}'"
    if installed is None:
        return fault("packages", f"{requirement.name} is not installed, {requirement} is needed", remedy)
    if not requirement.specifier.contains(installed, prereleases=True):
        return fault("packages", f"{requirement.name} is {installed}, {requirement.specifier} is needed", remedy)
    return None


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
