"""The options of ``spot run``, and what follows from them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numina_finetune.errors import ConfigError
from numina_finetune.spot.budgets import Budgets
from numina_finetune.spot.cloud import Cloud, CloudError, NotFound, Provision
from numina_finetune.spot.job import MEGASCALE, SECRETS, Job
from numina_finetune.spot.policy import Policy, Target, machine_prefix
from numina_finetune.spot.prices import Prices
from numina_finetune.spot.shapes import region_of, same_place, shape_of
from numina_finetune.spot.training import with_shipped_config

SECRET_NAMES = ("HF_TOKEN", "WANDB_API_KEY")
"""Handed on to the workers where the supervisor has them."""
_UV = "uv==0.13.8"
_OWNED = ("--output-dir", "--run-id")
_MOST_SLICES = 99


def option(default: Any, help: str, group: str) -> Any:
    """A field that is also a command-line option, which help shows under ``group``."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class SpotOptions:
    """What ``spot run`` was asked for."""

    output_dir: str = option("", "gs://bucket/prefix that holds the run's own folder.", "Run")
    run_id: str = option("", "Name of the run; a hash of what makes it this run if unset.", "Run")
    project: str = option("", "Google Cloud project.", "Machine")
    zones: str = option("", "Zones to try, in this order, comma-separated, such as us-east5-b,us-east5-a.", "Machine")
    tpu: str = option("v6e-8", "Types to try, in this order, comma-separated, such as v6e-8,v5litepod-8.", "Machine")
    num_slices: int = option(1, "Slices of that type, joined by the data-centre network.", "Machine")
    allow_cross_region: bool = option(
        False, "Also use zones outside the bucket's region (traffic costs, and time).", "Machine"
    )
    wheel: str = option("", "This package as a wheel; make one with: pip wheel --no-deps --wheel-dir dist .", "Workers")
    constraints: str = option("constraints.txt", "Versions to install on the workers.", "Workers")
    docker_image: str = option("", "Instead of --wheel: an image by digest, name@sha256:…", "Workers")
    runtime_version: str = option("", "Image of the TPU VMs; the type's own if unset.", "Machine")
    network: str = option("", "VPC network.", "Machine")
    subnetwork: str = option("", "Its subnetwork.", "Machine")
    internal_ips: bool = option(False, "No external addresses; run the supervisor inside the network.", "Machine")
    service_account: str = option("", "Account of the TPU VMs; it needs the bucket.", "Machine")
    env: tuple[str, ...] = option((), "NAME=VALUE for the workers; may be repeated. No secrets here.", "Workers")
    secret_env: tuple[str, ...] = option(
        (),
        f"Variable of yours to hand on by a private file; may be repeated. Always: {', '.join(SECRET_NAMES)}.",
        "Workers",
    )
    max_crashes: int = option(3, "Crashes without progress in between that end the run.", "Limits")
    max_stalls: int = option(3, "The same of stalls.", "Limits")
    stall_minutes: float = option(
        30.0, "Without a heartbeat or a step, start-up included, that make a stall.", "Limits"
    )
    queue_minutes: float = option(
        60.0, "In the queue before the next zone or type is tried, if there is one.", "Limits"
    )
    poll_seconds: float = option(30.0, "Between two looks.", "Limits")
    max_hours: float | None = option(None, "Hours of machine time after which the run is stopped.", "Limits")
    max_cost: float | None = option(None, "Dollars after which the run is stopped.", "Limits")
    prices: str = option("", "YAML file of your prices for a chip and an hour.", "Limits")
    dry_run: bool = option(False, "Print every command that would be run, and run none.", "Run")

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> SpotOptions:
        """Of values by name; lists become tuples, so that the result can be compared."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return SpotOptions(**plain)

    @property
    def run_url(self) -> str:
        return f"{self.output_dir.rstrip('/')}/{self.run_id}"


def check_options(options: SpotOptions, training: Sequence[str], faults: Sequence[str] = ()) -> None:
    """Refuse what cannot work.

    Args:
        faults: what is known to be wrong besides.

    Raises:
        ConfigError: all of it at once.
    """
    if found := [*_faults(options, training), *faults]:
        raise ConfigError(dict.fromkeys(found))


def check_prices(options: SpotOptions, prices: Prices) -> None:
    """Raises: ConfigError: --max-cost with a target whose price is not known."""
    unknown = [
        f"{target.accelerator} in {target.zone}"
        for target in targets(options)
        if options.max_cost is not None and prices.of(target.accelerator, target.zone) is None
    ]
    if unknown:
        raise ConfigError(
            f"--max-cost {options.max_cost:g}, but no price is known of {', '.join(unknown)}: give --prices, or "
            "--max-hours instead"
        )


def check_place(options: SpotOptions, cloud: Cloud) -> None:
    """Refuse zones far from the bucket.

    Raises:
        ConfigError: naming them; or there is no such bucket, or it cannot be asked.
    """
    if options.allow_cross_region or not options.output_dir.startswith("gs://"):
        return
    bucket = bucket_of(options)
    try:
        location = cloud.bucket_location(bucket)
    except NotFound as error:
        raise ConfigError(f"--output-dir {options.output_dir}: there is no bucket {bucket}") from error
    except CloudError as error:
        raise ConfigError(
            f"--output-dir {options.output_dir}: its location cannot be seen ({error}): give --allow-cross-region to "
            "go on without"
        ) from error
    far = [zone for zone in _split(options.zones) if not same_place(zone, location)]
    if far:
        raise ConfigError(
            f"--zones {','.join(far)} lie outside {location}, where gs://{bucket} is: checkpoints would cross regions; "
            "leave them out, or give --allow-cross-region"
        )


def bucket_of(options: SpotOptions) -> str:
    """The name of the run's bucket."""
    return options.output_dir.removeprefix("gs://").split("/", 1)[0]


def targets(options: SpotOptions) -> list[Target]:
    """Every type in every zone, the preferred type everywhere first."""
    return [Target(tpu, zone) for tpu in _split(options.tpu) for zone in _split(options.zones)]


def policy_of(options: SpotOptions) -> Policy:
    """What the supervisor goes by."""
    return Policy(
        prefix=machine_prefix(options.run_url),
        targets=targets(options),
        slices=options.num_slices,
        budgets=Budgets(options.max_crashes, options.max_stalls),
        poll_seconds=options.poll_seconds,
        queue_seconds=options.queue_minutes * 60,
        stall_seconds=options.stall_minutes * 60,
        max_hours=options.max_hours,
        max_cost=options.max_cost,
    )


def provision_of(options: SpotOptions) -> Provision:
    """How machines are made."""
    return Provision(
        runtime_version=options.runtime_version,
        network=options.network,
        subnetwork=options.subnetwork,
        internal_ips=options.internal_ips,
        service_account=options.service_account,
        labels={"numina-finetune": machine_prefix(options.run_url)},
    )


def job_of(options: SpotOptions, training: Sequence[str], environment: Mapping[str, str] = os.environ) -> Job:
    """What runs on the workers.

    Args:
        environment: the supervisor's, from which the secrets are taken.
    """
    arguments = (*training, "--output-dir", options.output_dir, "--run-id", options.run_id)
    names = dict.fromkeys([*SECRET_NAMES, *options.secret_env])
    secrets = {name: environment[name] for name in names if environment.get(name)}
    variables = dict(pair.split("=", 1) for pair in options.env)
    if options.docker_image:
        return _docker_job(options, arguments, variables, secrets)
    wheel, constraints = Path(options.wheel), Path(options.constraints)
    words, config = with_shipped_config(arguments)
    return Job(
        setup=("bash", "setup.sh"),
        train=("venv/bin/numina-finetune", *words),
        files=(wheel, constraints),
        scripts={"setup.sh": _setup_script(wheel.name, constraints.name), **config},
        environment={"PJRT_DEVICE": "TPU", **variables},
        secrets=secrets,
    )


def _docker_job(
    options: SpotOptions, arguments: Sequence[str], variables: Mapping[str, str], secrets: Mapping[str, str]
) -> Job:
    name = machine_prefix(options.run_url)
    words, config = with_shipped_config(arguments)
    docker = (
        *("exec", "sudo", "docker", "run", "--rm", "--name", name, "--privileged", "--net=host"),
        *("--stop-timeout", "300", "--env", "PJRT_DEVICE=TPU"),
        *(word for pair in options.env for word in ("--env", pair)),
        *(("--env-file", SECRETS) if secrets else ()),
    )
    # What only the worker knows, put in by its shell: sudo hands no variables on.
    known = [f'--env {slice_name}="${slice_name}"' for slice_name in MEGASCALE if options.num_slices > 1]
    known += [f'--volume "$PWD/{file}:/work/{file}:ro" --workdir /work' for file in config]
    return Job(
        setup=("bash", "setup.sh"),
        train=("bash", "-c", " ".join([shlex.join(docker), *known, shlex.join([options.docker_image, *words])])),
        # A container outlives the client that started it.
        scripts={
            "setup.sh": f"sudo docker rm --force {name} || true\nsudo docker pull {options.docker_image}\n",
            **config,
        },
        environment=variables,
        secrets=secrets,
    )


def _setup_script(wheel: str, constraints: str) -> str:
    """Install what was shipped, unless it is installed already."""
    return f"""set -euo pipefail
wanted=$(cat '{wheel}' '{constraints}' | sha256sum)
if [ -f venv/installed ] && [ "$(cat venv/installed)" = "$wanted" ]; then
    echo 'already installed'
    exit 0
fi
rm -rf venv
export PIP_BREAK_SYSTEM_PACKAGES=1  # newer systems refuse even what goes to the user's own folder
python3 -m pip install --quiet --user '{_UV}'
uv="$(python3 -m site --user-base)/bin/uv"
"$uv" venv --quiet --python 3.11 venv
"$uv" pip install --quiet --python venv/bin/python --constraint '{constraints}' "./{wheel}[tpu,train]"
echo "$wanted" > venv/installed
"""


def _faults(options: SpotOptions, training: Sequence[str]) -> list[str]:
    found = []
    for name, what in (
        ("output_dir", "gs://bucket/prefix"),
        ("run_id", "a name for the run"),
        ("project", "the Google Cloud project"),
        ("zones", "zones such as us-east5-b"),
    ):
        if not getattr(options, name):
            found.append(f"--{name.replace('_', '-')} is missing: give {what}")
    found += [
        f"{owned} stands among the training's options: give it before the --, to the supervisor, which passes it on"
        for owned in _OWNED
        if any(word == owned or word.startswith(f"{owned}=") for word in (w.replace("_", "-") for w in training))
    ]
    for check in (
        *((region_of, zone) for zone in _split(options.zones)),
        *((shape_of, t) for t in _split(options.tpu)),
    ):
        try:
            check[0](check[1])
        except ConfigError as error:
            found += error.problems
    if not 1 <= options.num_slices <= _MOST_SLICES:
        found.append(f"--num-slices {options.num_slices} is out of range: use 1 to {_MOST_SLICES}")
    if options.docker_image and "@sha256:" not in options.docker_image:
        found.append(f"--docker-image {options.docker_image}: a tag may move: name the image by its digest, @sha256:…")
    if bool(options.docker_image) == bool(options.wheel):
        found.append("give either --wheel or --docker-image")
    elif options.wheel:
        for name in ("wheel", "constraints"):
            if not Path(getattr(options, name)).is_file():
                found.append(f"--{name} {getattr(options, name)} is no file")
    found += [f"--env {pair}: write it as NAME=VALUE" for pair in options.env if "=" not in pair]
    found += [
        f"--env {pair.split('=')[0]}=… would stand in command lines: use --secret-env {pair.split('=')[0]}"
        for pair in options.env
        if pair.split("=")[0] in (*SECRET_NAMES, *options.secret_env)
    ]
    found += [
        f"--secret-env {name} is not set here: set it, or leave it out"
        for name in options.secret_env
        if not os.environ.get(name)
    ]
    for name in (
        "max_crashes",
        "max_stalls",
        "stall_minutes",
        "queue_minutes",
        "poll_seconds",
        "max_hours",
        "max_cost",
    ):
        value = getattr(options, name)
        if value is not None and not value > 0:
            found.append(f"--{name.replace('_', '-')} {value:g} is too small: use more than 0")
    return found


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
