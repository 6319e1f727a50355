"""What one asks before a run: does it fit (``plan``), and is this machine ready (``doctor``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numina_finetune import launch
from numina_finetune.cli.groups import group
from numina_finetune.cli.options import BF16, CHECKPOINTING, FIELDS, command_of, parameter, resolve_config
from numina_finetune.errors import ConfigError

app = group()


def _plan(
    config: str | None,
    tpu: str | None,
    json: bool | None,
    max_compilations: int | None,
    prices: str | None,
    region: str | None,
    **given: Any,
) -> int:
    """Compile the training step for a TPU without a TPU: does it fit, what does it cost; exit code 3 if it does not."""
    launch.prepare_environment("native")
    faults: list[str] = []
    run_config = resolve_config(config, given, faults)
    from numina_finetune.plan.command import Request, run_plan

    asked = Request(
        tpu or "",
        as_json=bool(json),
        max_compilations=max_compilations,
        prices=Path(prices) if prices else None,
        region=region,
    )
    return int(run_plan(run_config, asked, faults))


def _doctor(config: str | None, zone: str | None, json: bool | None, **given: Any) -> int:
    """Look for what would stand in a run's way on this machine, each with its fix; exit code 3 if there is any."""
    launch.prepare_environment("native")
    faults: list[str] = []
    run_config = resolve_config(config, given, faults)
    if faults:
        raise ConfigError(faults)
    from numina_finetune.doctor.command import run_doctor

    return int(run_doctor(run_config, zone=zone, as_json=bool(json)))


_PLAN_OPTIONS = (
    parameter("tpu", str, "Type of the slice, such as v5litepod-8, v6e-16, v5p-128, v4-8.", "Plan"),
    parameter("json", bool, "Print it for machines.", "Plan"),
    parameter("max_compilations", int, "Compilations for the advice; 1 = none of it. [default: 8]", "Plan"),
    parameter("prices", str, "YAML with `date` and `prices`: family -> region -> dollars a chip and hour.", "Plan"),
    parameter("region", str, "Where it would run; the cheapest one if unset.", "Plan"),
)
app.command("plan")(command_of(_plan, _plan.__doc__, FIELDS, BF16, *_PLAN_OPTIONS))


_DOCTOR_OPTIONS = (
    parameter("zone", str, "Zone of the machines that will train, such as us-east5-b; this one's if unset.", "Doctor"),
    parameter("json", bool, "Print it for machines.", "Doctor"),
)
app.command("doctor")(command_of(_doctor, _doctor.__doc__, FIELDS, BF16, CHECKPOINTING, *_DOCTOR_OPTIONS))
