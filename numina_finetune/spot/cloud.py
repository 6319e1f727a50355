"""What the supervisor asks of a cloud: queued resources, their nodes, and the workers on them.

Two implementations: `numina_finetune.spot.gcloud` for Google Cloud, `numina_finetune.spot.fake` for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol


class CloudError(Exception):
    """The cloud did not do what was asked."""


class Transient(CloudError):
    """Network, server or rate-limit faults, and time limits: the same call may work later.

    A call that changes something may have been carried out all the same.
    """


class StockOut(CloudError):
    """The zone has no machine of this kind to give now."""


class QuotaExceeded(CloudError):
    """This project may not have so many; another zone may have its own quota."""


class PermissionDenied(CloudError):
    """This account may not do that, or nobody is logged in; no retry helps."""


class InvalidRequest(CloudError):
    """The request can never work as it stands: an unknown type, zone or runtime version."""


class NotFound(CloudError):
    """There is no such queued resource or node."""


class AlreadyExists(CloudError):
    """A queued resource of this name exists."""


class QueuedState(StrEnum):
    """States of a queued resource, by the service's own names."""

    CREATING = "CREATING"
    ACCEPTED = "ACCEPTED"
    WAITING_FOR_RESOURCES = "WAITING_FOR_RESOURCES"
    PROVISIONING = "PROVISIONING"
    ACTIVE = "ACTIVE"
    SUSPENDING = "SUSPENDING"
    SUSPENDED = "SUSPENDED"
    FAILED = "FAILED"
    DELETING = "DELETING"
    UNKNOWN = "UNKNOWN"
    """A name that is not known here."""

    @classmethod
    def _missing_(cls, value: object) -> QueuedState:
        return cls.UNKNOWN


class Health(StrEnum):
    """Of a node: what matters is whether training can go on there."""

    SOUND = "sound"
    UNKNOWN = "unknown"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True)
class Machine:
    """A queued resource as it is asked for: ``slices`` nodes of one accelerator type in one zone."""

    name: str
    zone: str
    accelerator: str
    """Such as ``v6e-8``."""
    slices: int = 1

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, one a slice, as the service gives them."""
        return (self.name,) if self.slices == 1 else tuple(f"{self.name}-{index}" for index in range(self.slices))


@dataclass(frozen=True)
class Queued:
    """What the service says of a queued resource."""

    name: str
    state: QueuedState
    error: str = ""
    """Of a FAILED one: the service's reason."""


@dataclass(frozen=True)
class Node:
    """What the service says of a node."""

    name: str
    state: str
    """READY is the only one in which it can be used."""
    health: Health = Health.SOUND
    addresses: tuple[str, ...] = ()
    """Internal address of each worker."""


@dataclass(frozen=True)
class Provision:
    """Options of creation that are the same for every machine of a run."""

    runtime_version: str = ""
    """The image; chosen by the accelerator if empty."""
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    """No external addresses; ssh goes by the internal ones."""
    service_account: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class Cloud(Protocol):
    """One project of a cloud. Every method may raise `Transient` and `PermissionDenied`."""

    def create(self, machine: Machine) -> None:
        """Ask for a spot machine; returns before there is one.

        Raises:
            AlreadyExists, StockOut, QuotaExceeded, InvalidRequest.
        """

    def describe(self, machine: Machine) -> Queued:
        """Raises: NotFound."""

    def delete(self, machine: Machine) -> None:
        """Ask for the end of the queued resource and its nodes; returns before they are gone.

        Raises:
            NotFound: it is gone already.
        """

    def list(self, zone: str) -> Sequence[Queued]:
        """The project's queued resources in the zone."""

    def describe_node(self, node: str, zone: str) -> Node:
        """Raises: NotFound."""

    def run(self, node: str, zone: str, command: str) -> Mapping[int, str]:
        """Run a shell command on every worker of the node.

        Returns:
            What each worker wrote to its standard output, by worker; those that could not be reached are missing.

        Raises:
            NotFound: no such node.
            Transient: no worker could be reached.
        """

    def copy(self, node: str, zone: str, files: Sequence[Path], folder: str) -> None:
        """Copy files into a folder (relative to the home folder, present) on every worker of the node.

        Raises:
            NotFound: no such node.
            Transient: not all workers have all files.
        """

    def bucket_location(self, bucket: str) -> str:
        """The bucket's location, such as ``US-EAST5`` or ``US``.

        Raises:
            NotFound: no such bucket.
        """

    def delete_command(self, machine: Machine) -> str:
        """The command line with which a person deletes it."""
