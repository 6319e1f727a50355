"""A cloud that behaves like the real one over time, for tests: slow, short of stock, and not to be trusted.

What happens is scheduled on an injected clock; the workers are hosts of `numina_finetune.spot.fake_hosts`: simulated
ones, or folders on this computer in which the job really runs.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from numina_finetune.spot.clock import Clock
from numina_finetune.spot.cloud import (
    AlreadyExists,
    Health,
    Machine,
    Node,
    NotFound,
    Queued,
    QueuedState,
    QuotaExceeded,
    Transient,
)
from numina_finetune.spot.gcloud_errors import typed
from numina_finetune.spot.shapes import shape_of

NO_STOCK = 'There is no more capacity in the zone "{zone}"; you can try in another zone'


class FakeClock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


class Host(Protocol):
    """One worker."""

    def execute(self, command: str) -> str:
        """Run a shell command; its standard output."""

    def put(self, files: Sequence[Path], folder: str) -> None:
        """Copy files into a folder below the home folder."""

    def terminate(self, when: float) -> None:
        """The notice of a preemption: SIGTERM to everything, at the time ``when``."""

    def kill(self, when: float) -> None:
        """The end of the machine: SIGKILL to everything."""


@dataclass(frozen=True)
class Fault:
    """What befalls one machine.

    Attributes:
        kind: ``preempt`` (notice, then gone), ``kill`` (gone at once), ``one`` (one worker gone, without notice),
            ``vanish`` (nodes not found, the queued resource says ACTIVE), ``sick`` (unhealthy until deleted),
            ``fail`` (never provisioned: FAILED), ``refuse`` (creation refused for lack of stock),
            ``quota`` (refused for lack of quota), ``suspend`` (while provisioning), ``unreachable`` (no ssh any more).
        after: seconds after the machine became ready; of one that never does, after its creation.
    """

    kind: str
    after: float = 0.0


@dataclass
class Behaviour:
    """How the cloud is today; seconds."""

    queue_seconds: float = 60.0
    provision_seconds: float = 120.0
    delete_seconds: float = 60.0
    notice_seconds: float = 30.0
    suspend_seconds: float = 90.0
    """From the loss of the nodes to SUSPENDED."""
    flaky_reads: float = 0.0
    """Share of the reads that fail."""
    flaky_runs: float = 0.0
    """Share of the calls to workers that fail."""
    lost_answers: float = 0.0
    """Share of the creations and deletions that are carried out without an answer."""
    stock: Mapping[str, int] = field(default_factory=dict)
    """Machines that a zone can give at a time; any number where it is not named."""


@dataclass
class _Entry:
    machine: Machine
    state: QueuedState
    hosts: list[list[Host]] = field(default_factory=list)
    """By node."""
    node_states: dict[str, str] = field(default_factory=dict)
    health: Health = Health.SOUND
    error: str = ""
    reachable: bool = True
    gone_hosts: set[tuple[int, int]] = field(default_factory=set)


class FakeCloud:
    """Implements `numina_finetune.spot.cloud.Cloud`.

    Attributes:
        trace: every creation and deletion that was asked for, in order.
        most_at_once: machines that existed at the same time, at most.
    """

    def __init__(
        self,
        clock: Clock,
        make_host: Callable[[Machine, int, int], Host],
        *,
        behaviour: Behaviour | None = None,
        faults: Sequence[Fault | None] = (),
        rng: random.Random | None = None,
        location: str = "US",
    ) -> None:
        """Args:
        faults: of the first, second, … machine; None: nothing befalls it.
        """
        self._clock, self._make_host, self._location = clock, make_host, location
        self.behaviour, self._rng = behaviour or Behaviour(), rng or random.Random(0)
        self._faults = list(faults)
        self._entries: dict[str, _Entry] = {}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = self._scheduled = 0
        self._happening: float | None = None
        self.trace: list[str] = []
        self.most_at_once = 0

    # --- what tests look at and do ---------------------------------------------------------------------------------

    def machines(self) -> list[str]:
        """Names of the queued resources that exist."""
        self._catch_up()
        return sorted(self._entries)

    def befall(self, name: str, kind: str) -> None:
        """Let a fault happen to a machine now."""
        self._strike(self._entries[name], kind)

    # --- the Cloud protocol ----------------------------------------------------------------------------------------

    def create(self, machine: Machine) -> None:
        self._catch_up()
        if machine.name in self._entries:
            raise AlreadyExists(f"{machine.name} already exists")
        self.trace.append(f"create {machine.name} {machine.accelerator} {machine.zone}")
        fault = self._faults[self._asked] if self._asked < len(self._faults) else None
        self._asked += 1
        used = sum(entry.machine.zone == machine.zone for entry in self._entries.values())
        if (fault and fault.kind == "refuse") or used >= self.behaviour.stock.get(machine.zone, used + 1):
            raise typed(NO_STOCK.format(zone=machine.zone))
        if fault and fault.kind == "quota":
            raise QuotaExceeded(f"Quota 'TPUPerProjectPerZone' exhausted. Limit 0 in zone {machine.zone}")
        self._entries[machine.name] = entry = _Entry(machine, QueuedState.ACCEPTED)
        self.most_at_once = max(self.most_at_once, len(self._entries))
        self._schedule_birth(entry, fault)
        self._maybe_lose_answer()

    def describe(self, machine: Machine) -> Queued:
        entry = self._seen(machine.name)
        return Queued(machine.name, entry.state, entry.error)

    def delete(self, machine: Machine) -> None:
        self._catch_up()
        entry = self._entries.get(machine.name)
        if entry is None:
            raise NotFound(f"{machine.name} was not found")
        self.trace.append(f"delete {machine.name}")
        if entry.state != QueuedState.DELETING:
            entry.state = QueuedState.DELETING
            self._after(self.behaviour.delete_seconds, lambda: self._remove(entry))
        self._maybe_lose_answer()

    def describe_node(self, node: str, zone: str) -> Node:
        self._read()
        for entry in self._entries.values():
            if node in entry.node_states:
                workers = shape_of(entry.machine.accelerator).hosts
                addresses = tuple(f"10.0.0.{worker + 2}" for worker in range(workers))
                return Node(node, entry.node_states[node], entry.health, addresses)
        raise NotFound(f"{node} was not found in {zone}")

    def run(self, node: str, zone: str, command: str) -> Mapping[int, str]:
        entry, index = self._connected(node)
        answers = {}
        for worker, host in enumerate(entry.hosts[index]):
            if (index, worker) in entry.gone_hosts or self._rng.random() < self.behaviour.flaky_runs:
                continue
            answers[worker] = host.execute(command)
        if not answers:
            raise Transient(f"{node}: exited with return code [255]")
        return answers

    def copy(self, node: str, zone: str, files: Sequence[Path], folder: str) -> None:
        entry, index = self._connected(node)
        if self._rng.random() < self.behaviour.flaky_runs or entry.gone_hosts:
            raise Transient(f"{node}: exited with return code [255]")
        for host in entry.hosts[index]:
            host.put(files, folder)

    def bucket_location(self, bucket: str) -> str:
        return self._location

    def delete_command(self, machine: Machine) -> str:
        return f"fake delete {machine.name} --zone={machine.zone}"

    # --- time ------------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Let everything happen that was to happen by now, in order."""
        while self._agenda and self._agenda[0][0] <= self._clock.now():
            self._happening, _, happen = heapq.heappop(self._agenda)
            happen()
        self._happening = None

    def _now(self) -> float:
        """During what was scheduled, the time it was scheduled for."""
        return self._clock.now() if self._happening is None else self._happening

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        self._scheduled += 1
        heapq.heappush(self._agenda, (self._now() + seconds, self._scheduled, happen))

    def _schedule_birth(self, entry: _Entry, fault: Fault | None) -> None:
        today = self.behaviour
        if fault and fault.kind in ("fail", "suspend"):
            self._after(fault.after, lambda: self._strike(entry, fault.kind))
            return

        def wait() -> None:
            entry.state = QueuedState.PROVISIONING
            self._after(today.provision_seconds, lambda: self._if_alive(entry, ready))

        def ready() -> None:
            entry.state = QueuedState.ACTIVE
            workers = shape_of(entry.machine.accelerator).hosts
            entry.hosts = [
                [self._make_host(entry.machine, node, worker) for worker in range(workers)]
                for node in range(entry.machine.slices)
            ]
            entry.node_states = dict.fromkeys(entry.machine.nodes, "READY")
            if fault and fault.kind not in ("refuse", "quota"):
                self._after(fault.after, lambda: self._if_alive(entry, lambda: self._strike(entry, fault.kind)))

        entry.state = QueuedState.WAITING_FOR_RESOURCES
        self._after(today.queue_seconds, lambda: self._if_alive(entry, wait))

    def _strike(self, entry: _Entry, kind: str) -> None:
        today = self.behaviour
        if kind == "preempt":
            for host in self._hosts(entry):
                host.terminate(self._now())
            self._after(today.notice_seconds, lambda: self._if_alive(entry, lambda: self._lose_nodes(entry)))
        elif kind == "kill":
            self._lose_nodes(entry)
        elif kind == "one":
            place = (self._rng.randrange(len(entry.hosts)), self._rng.randrange(len(entry.hosts[0])))
            entry.gone_hosts.add(place)
            entry.hosts[place[0]][place[1]].kill(self._now())
            self._after(today.suspend_seconds, lambda: self._if_alive(entry, lambda: self._lose_nodes(entry)))
        elif kind == "vanish":
            for host in self._hosts(entry):
                host.kill(self._now())
            entry.node_states.clear()
        elif kind == "sick":
            entry.health = Health.UNHEALTHY
        elif kind == "unreachable":
            entry.reachable = False
        elif kind == "fail":
            entry.state, entry.error = QueuedState.FAILED, NO_STOCK.format(zone=entry.machine.zone)
        elif kind == "suspend":
            entry.state = QueuedState.SUSPENDED
        else:
            raise ValueError(kind)

    def _lose_nodes(self, entry: _Entry) -> None:
        """The nodes go; PREEMPTED shows sometimes only, and the queued resource follows later."""
        for host in self._hosts(entry):
            host.kill(self._now())
        if self._rng.random() < 0.5:
            entry.node_states = dict.fromkeys(entry.node_states, "PREEMPTED")
        else:
            entry.node_states.clear()
        entry.state = QueuedState.SUSPENDING

        def suspended() -> None:
            entry.node_states.clear()
            entry.state = QueuedState.SUSPENDED

        self._after(self.behaviour.suspend_seconds, lambda: self._if_alive(entry, suspended))

    def _remove(self, entry: _Entry) -> None:
        for host in self._hosts(entry):
            host.kill(self._now())
        self._entries.pop(entry.machine.name, None)

    def _if_alive(self, entry: _Entry, happen: Callable[[], None]) -> None:
        if self._entries.get(entry.machine.name) is entry and entry.state != QueuedState.DELETING:
            happen()

    # --- faults of single calls ------------------------------------------------------------------------------------

    def _hosts(self, entry: _Entry) -> Iterator[Host]:
        return itertools.chain.from_iterable(entry.hosts)

    def _read(self) -> None:
        self._catch_up()
        if self._rng.random() < self.behaviour.flaky_reads:
            raise Transient("UNAVAILABLE: The service is currently unavailable")

    def _seen(self, name: str) -> _Entry:
        self._read()
        if name not in self._entries:
            raise NotFound(f"{name} was not found")
        return self._entries[name]

    def _connected(self, node: str) -> tuple[_Entry, int]:
        self._catch_up()
        for entry in self._entries.values():
            if node in entry.node_states:
                if not entry.reachable or entry.node_states[node] != "READY":
                    raise Transient(f"{node}: exited with return code [255]")
                return entry, entry.machine.nodes.index(node)
        raise NotFound(f"{node} was not found")

    def _maybe_lose_answer(self) -> None:
        if self._rng.random() < self.behaviour.lost_answers:
            raise Transient("took too long")

    def list(self, zone: str) -> Sequence[Queued]:
        self._read()
        return [Queued(e.machine.name, e.state) for e in self._entries.values() if e.machine.zone == zone]
