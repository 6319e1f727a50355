"""Google Cloud through the ``gcloud`` command: JSON read back, a time limit on every call."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numina_finetune.spot.cloud import (
    Health,
    InvalidRequest,
    Machine,
    Node,
    Provision,
    Queued,
    QueuedState,
    Transient,
)
from numina_finetune.spot.gcloud_errors import typed
from numina_finetune.spot.shapes import shape_of

_TPUS = ("compute", "tpus")
_READ_ATTEMPTS = 3
_HEALTH = {"HEALTHY": Health.SOUND, "": Health.UNKNOWN, "HEALTH_UNSPECIFIED": Health.UNKNOWN}
"""All others (TIMEOUT, UNHEALTHY_TENSORFLOW, UNHEALTHY_MAINTENANCE) are unhealthy."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which a call is given up; all of them well below the lease's."""

    read: float = 60.0
    change: float = 120.0
    connect: float = 180.0
    """Of ssh and scp: gcloud itself tries ten times to connect."""
    pause: float = 5.0
    """Between two attempts of a read."""


class Gcloud:
    """The queued resources of one project; implements `numina_finetune.spot.cloud.Cloud`."""

    def __init__(
        self,
        project: str,
        provision: Provision | None = None,
        *,
        limits: Limits | None = None,
        executable: str = "gcloud",
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Args:
        tell: takes every command line before it is run.
        """
        self._project, self._provision = project, provision or Provision()
        self._limits, self._executable, self._tell = limits or Limits(), executable, tell

    def create(self, machine: Machine) -> None:
        self._call(self.create_arguments(machine), self._limits.change)

    def describe(self, machine: Machine) -> Queued:
        return _queued(json.loads(self._retried(self.describe_arguments(machine))))

    def delete(self, machine: Machine) -> None:
        self._call(self._delete_arguments(machine), self._limits.change)

    def list(self, zone: str) -> Sequence[Queued]:
        return [_queued(entry) for entry in json.loads(self._retried(self.list_arguments(zone)))]

    def describe_node(self, node: str, zone: str) -> Node:
        found = json.loads(self._retried(self.node_arguments(node, zone)))
        endpoints = found.get("networkEndpoints") or []
        return Node(
            node,
            str(found.get("state", "")),
            _HEALTH.get(str(found.get("health", "")), Health.UNHEALTHY),
            tuple(str(endpoint.get("ipAddress", "")) for endpoint in endpoints),
        )

    def run(self, node: str, zone: str, command: str) -> Mapping[int, str]:
        with tempfile.TemporaryDirectory(prefix="numina-spot-") as folder:
            # One file a worker: their lines would mix on one standard output.
            arguments = self.run_arguments(node, zone, command, folder)
            try:
                self._call(arguments, self._limits.connect)
            except (Transient, InvalidRequest):
                # Some workers may have answered; whoever did not is missing from the result.
                answers = _answers(Path(folder))
                if not answers:
                    raise
                return answers
            return _answers(Path(folder))

    def copy(self, node: str, zone: str, files: Sequence[Path], folder: str) -> None:
        self._call(self.copy_arguments(node, zone, files, folder), self._limits.connect)

    def bucket_location(self, bucket: str) -> str:
        found = json.loads(self._retried(self.bucket_arguments(bucket)))
        return str(found.get("location") or found["metadata"]["location"])

    def delete_command(self, machine: Machine) -> str:
        return shlex.join([self._executable, *self._delete_arguments(machine)])

    # --- command lines ---------------------------------------------------------------------------------------------

    def create_arguments(self, machine: Machine) -> Sequence[str]:
        """Of the call that asks for a machine."""
        wish = self._provision
        several = machine.slices > 1
        arguments = [
            *(*_TPUS, "queued-resources", "create", machine.name),
            *((f"--node-count={machine.slices}", f"--node-prefix={machine.name}") if several else ()),
            *(() if several else (f"--node-id={machine.name}",)),
            *(f"--zone={machine.zone}", f"--project={self._project}"),
            f"--accelerator-type={machine.accelerator}",
            f"--runtime-version={wish.runtime_version or shape_of(machine.accelerator).image}",
            "--spot",
        ]
        for name, value in (("network", wish.network), ("subnetwork", wish.subnetwork)):
            arguments += [f"--{name}={value}"] if value else []
        arguments += ["--internal-ips"] if wish.internal_ips else []
        arguments += [f"--service-account={wish.service_account}"] if wish.service_account else []
        if wish.labels:
            arguments.append("--labels=" + ",".join(f"{key}={value}" for key, value in sorted(wish.labels.items())))
        return [*arguments, "--async", "--quiet", "--format=json"]

    def describe_arguments(self, machine: Machine) -> Sequence[str]:
        """Of the look at a queued resource."""
        return self._look("queued-resources", "describe", machine.name, f"--zone={machine.zone}")

    def list_arguments(self, zone: str) -> Sequence[str]:
        """Of the look at a whole zone."""
        return self._look("queued-resources", "list", f"--zone={zone}")

    def node_arguments(self, node: str, zone: str) -> Sequence[str]:
        """Of the look at a node."""
        return self._look("tpu-vm", "describe", node, f"--zone={zone}")

    def bucket_arguments(self, bucket: str) -> Sequence[str]:
        """Of the look at a bucket."""
        return ["storage", "buckets", "describe", f"gs://{bucket}", f"--project={self._project}", "--format=json"]

    def _look(self, *arguments: str) -> Sequence[str]:
        return [*_TPUS, *arguments, f"--project={self._project}", "--format=json"]

    def _delete_arguments(self, machine: Machine) -> Sequence[str]:
        place = (f"--zone={machine.zone}", f"--project={self._project}")
        # Without --force, only a resource whose nodes are gone can be deleted.
        return [*_TPUS, "queued-resources", "delete", machine.name, *place, "--force", "--async", "--quiet"]

    def run_arguments(self, node: str, zone: str, command: str, folder: str) -> Sequence[str]:
        """Of the call that runs a command on every worker; each worker's output goes to ``{folder}/{worker}.log``."""
        return [
            *(*_TPUS, "tpu-vm", "ssh", node, f"--zone={zone}", f"--project={self._project}"),
            *self._connection,
            f"--command={command}",
            f"--output-directory={folder}",
        ]

    def copy_arguments(self, node: str, zone: str, files: Sequence[Path], folder: str) -> Sequence[str]:
        """Of the call that copies files to every worker."""
        place = (f"--zone={zone}", f"--project={self._project}")
        return [*_TPUS, "tpu-vm", "scp", *map(str, files), f"{node}:{folder}/", *place, *self._connection]

    @property
    def _connection(self) -> Sequence[str]:
        # A machine of the same name may have had another host key.
        internal = ("--internal-ip",) if self._provision.internal_ips else ()
        return ["--worker=all", *internal, "--strict-host-key-checking=no", "--quiet"]

    # --- calls -----------------------------------------------------------------------------------------------------

    def _retried(self, arguments: Sequence[str]) -> str:
        """Standard output of a call that changes nothing, so that it may be made again."""
        for attempt in range(1, _READ_ATTEMPTS + 1):
            try:
                return self._call(arguments, self._limits.read)
            except Transient:
                if attempt == _READ_ATTEMPTS:
                    raise
                time.sleep(self._limits.pause * attempt)
        raise AssertionError

    def _call(self, arguments: Sequence[str], limit: float) -> str:
        command = [self._executable, *arguments]
        self._tell(shlex.join(command))
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
                start_new_session=True,  # the user's Ctrl-C is the supervisor's alone
            )
        except subprocess.TimeoutExpired as error:
            raise Transient(f"gcloud {' '.join(arguments[:5])} took more than {limit:g} s") from error
        except FileNotFoundError as error:
            raise InvalidRequest(
                f"{self._executable} is not installed: install the Google Cloud CLI, or give its path"
            ) from error
        if done.returncode:
            raise typed(done.stderr or done.stdout or f"gcloud ended with {done.returncode} and said nothing")
        return done.stdout


def _queued(found: Mapping[str, Any]) -> Queued:
    state = found.get("state") or {}
    error = ((state.get("failedData") or {}).get("error") or {}).get("message", "")
    return Queued(str(found["name"]).rsplit("/", 1)[-1], QueuedState(str(state.get("state", ""))), str(error))


def _answers(folder: Path) -> Mapping[int, str]:
    files = {int(path.stem): path for path in folder.glob("*.log") if path.stem.isdigit()}
    return {worker: path.read_text(encoding="utf-8", errors="replace") for worker, path in sorted(files.items())}
