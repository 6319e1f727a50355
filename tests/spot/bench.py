"""A supervised run whose machines are folders of this computer: what is started, signalled and killed is real."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from numina_finetune.spot.clock import RealClock
from numina_finetune.spot.cloud import Machine
from numina_finetune.spot.fake import Behaviour, FakeCloud, Fault
from numina_finetune.spot.fake_hosts import LocalHost
from numina_finetune.spot.job import Job
from numina_finetune.spot.machine import State
from numina_finetune.spot.policy import Policy, Target
from numina_finetune.spot.record import Record, Records
from numina_finetune.spot.supervisor import Supervisor
from numina_finetune.storage import open_store
from tests.conftest import environment
from tests.gcs import Gcs
from tests.spot.support import PRICES

HOME = "numina/my-run"
SAVE = r"^POST .*/checkpoints/.*/state/"
"""What the bucket hears while a checkpoint is stored."""


@dataclass(frozen=True)
class Strike:
    """What befalls a machine, and when: after so many steps of its training, or during its ``set-up`` or a ``save``."""

    kind: str
    moment: int | str


@dataclass
class Bench:
    """The run, its machines, and what befalls them.

    Attributes:
        url: the run's place.
        faults: of the machines, in order; of those that are given to the fake cloud itself.
        strikes: the others, by the machine's number.
        fits: environment of each worker, besides what every one has.
        service: the bucket's, where the run is in one.
    """

    folder: Path
    job: Job
    url: str
    faults: Sequence[Fault | None] = ()
    strikes: Mapping[int, Strike] = field(default_factory=dict)
    accelerator: str = "v6e-8"
    zones: Sequence[str] = ("us-east5-b",)
    notice_seconds: float = 1.5
    poll_seconds: float = 0.1
    grace_seconds: float = 1.0
    stall_seconds: float = 120.0
    fits: Sequence[Mapping[str, str]] = ({},)
    service: Gcs | None = None

    def __post_init__(self) -> None:
        self.hosts: list[LocalHost] = []
        self.store, self.told = open_store(self.url), list[str]()
        self.clock = _StrikingClock(self)
        behaviour = Behaviour(
            queue_seconds=0.05,
            provision_seconds=0.1,
            delete_seconds=0.2,
            notice_seconds=self.notice_seconds,
            suspend_seconds=0.3,
        )
        self.cloud = FakeCloud(self.clock, self._host, behaviour=behaviour, faults=self.faults)
        self._ports: dict[str, str] = {}

    def supervisor(self) -> Supervisor:
        policy = Policy(
            "nf-my-run",
            [Target(self.accelerator, zone) for zone in self.zones],
            poll_seconds=self.poll_seconds,
            grace_seconds=self.grace_seconds,
            stall_seconds=self.stall_seconds,
            stop_seconds=60.0,
            backoff_seconds=0.1,
        )
        return Supervisor(
            self.cloud, self.store, self.job, policy, PRICES, self.clock, home=HOME, tell=self.told.append
        )

    @property
    def record(self) -> Record:
        record = Records(self.store).load()
        assert record is not None
        return record

    def processes(self) -> list[int]:
        return [process for host in self.hosts for process in host.processes()]

    def expected_trace(self, machines: int, *, refused: int = 0) -> list[str]:
        """So many machines, each deleted before the next one is asked for; one was refused, so the zone changed."""
        trace = []
        for number in range(1, machines + 1):
            zone = self.zones[-1] if refused and number > refused else self.zones[0]
            trace.append(f"create nf-my-run-{number} {self.accelerator} {zone}")
            trace += [f"delete nf-my-run-{number}"] if number != refused else []
        return trace

    def step(self, record: Record) -> int | None:
        """The newest step that the present training has logged."""
        machine = record.machine
        assert machine is not None
        beat = self._home(machine, 0, 0) / HOME / "jobs" / f"train-{record.life}" / "heartbeat"
        if not beat.exists():
            return None
        step: int | None = json.loads(beat.read_text()).get("step")
        return step

    def _home(self, machine: Machine, node: int, worker: int) -> Path:
        return self.folder / "hosts" / f"{machine.name}-{node}-{worker}"

    def _host(self, machine: Machine, node: int, worker: int) -> LocalHost:
        home = self._home(machine, node, worker)
        own = {"NUMINA_SPOT_BEAT": "0.1", "NUMINA_SPOT_TPU_LOCK": str(self.folder / "lock"), "RANK_HERE": str(worker)}
        peers = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._ports.setdefault(machine.name, _free_port())}
        host = LocalHost(home, environment(**own, **peers, **self.fits[worker % len(self.fits)], TMPDIR=str(home)))
        self.hosts.append(host)
        return host


class _StrikingClock(RealClock):
    """The wall clock; whoever sleeps gives the strikes their chance."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._struck: set[int] = set()
        self._first_step: dict[int, int] = {}
        self._heard: dict[int, int] = {}

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        bench = self._bench
        record = Records(bench.store).load()
        if record is None or record.machine is None or record.machines in self._struck:
            return
        strike = bench.strikes.get(record.machines)
        if strike is not None and self._is_due(strike, record):
            self._struck.add(record.machines)
            bench.cloud.befall(record.machine.name, strike.kind)

    def _is_due(self, strike: Strike, record: Record) -> bool:
        if strike.moment == "set-up":
            return record.state == State.SETUP
        if record.state != State.RUNNING:
            return False
        if strike.moment == "save":
            return self._saves(record)
        step = self._bench.step(record)
        if step is None:
            return False
        return step >= self._first_step.setdefault(record.life, step) + int(strike.moment)

    def _saves(self, record: Record) -> bool:
        """Whether a checkpoint of this life is on its way to the bucket, which is slow to take it."""
        service = self._bench.service
        assert service is not None
        if record.life not in self._heard:
            self._heard[record.life] = len(service.requests)
            service.fault("delay", SAVE, seconds=2.0)
        return any(re.search(SAVE, request) for request in service.requests[self._heard[record.life] :])


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
