"""What the cloud says of a machine, as the supervisor needs to know it."""

from __future__ import annotations

from dataclasses import dataclass

from numina_finetune.spot.cloud import (
    Cloud,
    Health,
    InvalidRequest,
    Machine,
    Node,
    NotFound,
    PermissionDenied,
    QueuedState,
    Transient,
)

READY = "READY"
_WAITING = (QueuedState.CREATING, QueuedState.ACCEPTED, QueuedState.WAITING_FOR_RESOURCES)
_LEAVING = (QueuedState.SUSPENDING, QueuedState.SUSPENDED, QueuedState.DELETING)


@dataclass(frozen=True)
class View:
    """One look at a machine.

    Attributes:
        stage: ``absent``, ``waiting``, ``provisioning``, ``active``, ``failed`` or ``leaving``; ``unknown`` where it
            could not be seen.
        error: of a failed one.
        nodes: of an active one, those that exist.
        missing: names of its nodes that do not exist.
    """

    stage: str
    error: str = ""
    nodes: tuple[Node, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Every node can be used."""
        return self.stage == "active" and not self.missing and all(node.state == READY for node in self.nodes)

    @property
    def sick(self) -> bool:
        """Some node is said to be unhealthy, which may pass."""
        return self.stage == "active" and any(node.health == Health.UNHEALTHY for node in self.nodes)

    @property
    def lost(self) -> bool:
        """As it looks to one who has seen every node ready: a node that is not READY any more will not come back."""
        return self.stage in ("absent", "failed", "leaving") or (self.stage == "active" and not self.ready)

    @property
    def what(self) -> str:
        """The reason in words."""
        if self.missing:
            return f"node {', '.join(self.missing)} is gone"
        bad = [f"node {node.name} is {node.state}" for node in self.nodes if node.state != READY]
        sick = [f"node {node.name} is unhealthy" for node in self.nodes if node.health == Health.UNHEALTHY]
        return "; ".join([*bad, *sick]) or f"the queued resource is {self.stage}: {self.error}".removesuffix(": ")


UNSEEN = View("unknown")


def look(cloud: Cloud, machine: Machine) -> View:
    """One look; faults of the network or of one's login make it `UNSEEN`, never a machine that is gone."""
    try:
        return _look(cloud, machine)
    except (Transient, PermissionDenied, InvalidRequest) as error:
        return View("unknown", str(error))


def _look(cloud: Cloud, machine: Machine) -> View:
    try:
        queued = cloud.describe(machine)
    except NotFound:
        return View("absent")
    if queued.state == QueuedState.FAILED:
        return View("failed", queued.error)
    if queued.state in _LEAVING:
        return View("leaving", str(queued.state))
    if queued.state in _WAITING:
        return View("waiting")
    if queued.state == QueuedState.PROVISIONING:
        return View("provisioning")
    if queued.state != QueuedState.ACTIVE:
        return UNSEEN
    nodes, missing = [], []
    for name in machine.nodes:
        try:
            nodes.append(cloud.describe_node(name, machine.zone))
        except NotFound:
            missing.append(name)
    return View("active", nodes=tuple(nodes), missing=tuple(missing))


def is_gone(cloud: Cloud, machine: Machine) -> bool:
    """Whether neither the queued resource nor any of its nodes exists; False where that cannot be seen."""
    try:
        if _look(cloud, machine).stage != "absent":
            return False
        for name in machine.nodes:
            try:
                cloud.describe_node(name, machine.zone)
            except NotFound:
                continue
            return False
    except (Transient, PermissionDenied, InvalidRequest):
        return False
    return True
