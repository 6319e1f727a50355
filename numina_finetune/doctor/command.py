"""All checks, one after another, and what they come to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from numina_finetune.config import RunConfig
from numina_finetune.doctor.devices import Machine, check_devices, tpu_chips
from numina_finetune.doctor.findings import Finding, Level
from numina_finetune.doctor.hub import check_hub
from numina_finetune.doctor.places import check_place, zone_of_machine
from numina_finetune.doctor.room import check_room
from numina_finetune.doctor.software import check_software
from numina_finetune.errors import ExitCode


def run_doctor(config: RunConfig, *, zone: str | None, as_json: bool) -> ExitCode:
    """Print what each check found as soon as it has; the exit code tells whether there are faults.

    Args:
        zone: of the machines that will train; None = this one's.
    """
    found = []
    for finding in findings(config, zone):
        found.append(finding)
        if not as_json:
            print(finding.line(), flush=True)
    faults = sum(finding.level is Level.FAULT for finding in found)
    if as_json:
        print(json.dumps({"faults": faults, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        print(f"{faults} fault{'' if faults == 1 else 's'}" if faults else "nothing stands in the way")
    return ExitCode.FAULTS_FOUND if faults else ExitCode.DONE


def findings(config: RunConfig, zone: str | None) -> Iterator[Finding]:
    """What there is to say; checks whose option is not given have nothing."""
    yield from check_software(on_tpu=bool(tpu_chips(Machine())))
    yield from check_devices(config)
    if config.output_dir:
        yield from check_place(config.output_dir, zone or zone_of_machine(config.metadata_url))
    yield from check_hub(config)
    if config.model_name:
        yield from check_room(config)
