"""A supervised run in a simulated world: the fake cloud, a model of a training, a store in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import IO, Any

import google_crc32c

from numina_finetune.spot.cloud import Machine
from numina_finetune.spot.fake import Behaviour, FakeClock, FakeCloud, Fault
from numina_finetune.spot.fake_hosts import Script, SimulatedHost, SimulatedMachine, Simulation
from numina_finetune.spot.job import Job
from numina_finetune.spot.lease import LEASE_SECONDS, Lease
from numina_finetune.spot.ledger import read_ledger
from numina_finetune.spot.policy import Policy, Target
from numina_finetune.spot.prices import Prices
from numina_finetune.spot.record import STOP, Record, Records
from numina_finetune.spot.supervisor import Supervisor
from numina_finetune.storage import Entry, NotFound, Store

JOB = Job(("bash", "setup.sh"), ("train",), secrets={"HF_TOKEN": "hf_do_not_tell"})
PRICES = Prices({"v6e": {"us-east5": 1.5}}, "test, 2026-11-01")
EAST = Target("v6e-8", "us-east5-b")


_THEN = datetime(2026, 11, 1, tzinfo=UTC)


def crc32c_of(data: bytes) -> str:
    return bytes(google_crc32c.Checksum(data).digest()).hex()


class MemoryStore(Store):
    """The semantics of the real ones as far as supervisors use them, for thousands of runs in a minute."""

    def __init__(self, url: str = "gs://memory/run") -> None:
        super().__init__(url, 1 << 20)
        self._objects: dict[str, tuple[int, bytes]] = {}
        self._writes = 0

    def list(self, prefix: str = "") -> Sequence[Entry]:
        return [self._entry(name) for name in sorted(self._objects) if name.startswith(prefix)]

    def stat(self, name: str, *, generation: int | None = None) -> Entry | None:
        if name not in self._objects or generation not in (None, self._objects[name][0]):
            return None
        return self._entry(name)

    def read(
        self, name: str, *, generation: int | None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        if self.stat(name, generation=generation) is None:
            raise NotFound(name)
        return self._objects[name][1][start:end]

    def folders(self) -> Sequence[str]:
        return sorted({name.split("/")[0] for name in self._objects if "/" in name})

    def sweep(self) -> None:
        """Nothing is ever left unfinished."""

    def put(
        self,
        name: str,
        open_source: Callable[[], IO[bytes]],
        *,
        size: int,
        checksum: str,
        if_generation: int | None = None,
    ) -> Entry:
        present = self._objects.get(name, (0, b""))[0]
        if if_generation not in (None, present):
            raise self._in_the_way(name, if_generation)
        self._writes += 1
        self._objects[name] = (self._writes, open_source().read())
        return self._entry(name)

    def delete(self, name: str, *, if_generation: int | None = None) -> None:
        if name in self._objects and if_generation not in (None, self._objects[name][0]):
            raise self._in_the_way(name, if_generation)
        self._objects.pop(name, None)

    def _entry(self, name: str) -> Entry:
        generation, data = self._objects[name]
        return Entry(name, len(data), crc32c_of(data), generation, _THEN)


class Killed(BaseException):
    """As SIGKILL: nothing that follows it happens."""


class MortalStore(MemoryStore):
    """A supervisor's way to the store, on which it dies at a given write: before it, or right after."""

    def __init__(self, store: Store, dies_at: int, *, after: bool) -> None:
        super().__init__(store.url)
        self._store, self._left, self._after, self._dead = store, dies_at, after, False

    def list(self, prefix: str = "") -> Sequence[Entry]:
        self._breathe()
        return self._store.list(prefix)

    def stat(self, name: str, *, generation: int | None = None) -> Entry | None:
        self._breathe()
        return self._store.stat(name, generation=generation)

    def read(
        self, name: str, *, generation: int | None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        self._breathe()
        return self._store.read(name, generation=generation, start=start, end=end)

    def put(
        self,
        name: str,
        open_source: Callable[[], IO[bytes]],
        *,
        size: int,
        checksum: str,
        if_generation: int | None = None,
    ) -> Entry:
        self._breathe()
        self._left -= 1
        self._dead = self._left <= 0
        if self._dead and not self._after:
            raise Killed
        entry = self._store.put(name, open_source, size=size, checksum=checksum, if_generation=if_generation)
        self._breathe()
        return entry

    def delete(self, name: str, *, if_generation: int | None = None) -> None:
        self._breathe()
        self._store.delete(name, if_generation=if_generation)

    def _breathe(self) -> None:
        if self._dead:
            raise Killed


class BoundedClock(FakeClock):
    """Fails a run that does not come to an end."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        assert self.now() - FakeClock().now() < 120 * 24 * 3600, "the run does not end"


@dataclass
class World:
    """Everything around a supervisor, which may come and go."""

    script: Script = field(default_factory=Script)
    behaviour: Behaviour = field(default_factory=Behaviour)
    faults: Sequence[Fault | None] = ()
    policy: Policy = field(default_factory=lambda: Policy("nf-test", (EAST,)))
    seed: int = 0
    store: Store = field(default_factory=lambda: MemoryStore())

    def __post_init__(self) -> None:
        self.clock: FakeClock = BoundedClock()
        self.simulation = Simulation(self.clock, self.store, self.script)
        self.told: list[str] = []
        self.deaths = 0
        self._machines: dict[str, SimulatedMachine] = {}
        self.cloud = FakeCloud(
            self.clock, self._host, behaviour=self.behaviour, faults=self.faults, rng=random.Random(self.seed)
        )

    def supervisor(self, wrap: Callable[[Store], Store] = lambda store: store) -> Supervisor:
        """A new one; ``wrap`` may put something between it and the store."""
        store = wrap(self.store)
        return Supervisor(
            self.cloud,
            store,
            JOB,
            self.policy,
            PRICES,
            self.clock,
            home="numina/test",
            rng=random.Random(self.seed + 1),
            lease=Lease(store, self.clock),
            tell=self.told.append,
        )

    def run(self, deaths: Iterator[tuple[int, bool]] = iter(())) -> int:  # noqa: B008
        """Supervise to the end, by as many supervisors as it takes; the last one's exit code.

        Args:
            deaths: of each supervisor but the last: at which write it dies, and whether right after it.
        """
        for dies_at, after in deaths:
            store = MortalStore(self.store, dies_at, after=after)
            try:
                return self.supervisor(lambda _, store=store: store).run()  # type: ignore[misc]
            except Killed:
                self.deaths += 1
                self.clock.sleep(LEASE_SECONDS + 1)
        return self.supervisor().run()

    def stop_after(self, seconds: float) -> None:
        """Let the user ask for the end, from another computer, when so much time has passed."""
        sleep, when = self.clock.sleep, self.clock.now() + seconds

        def sleeping(duration: float) -> None:
            sleep(duration)
            if self.clock.now() > when:
                self.store.write(STOP, b"{}")
                self.clock.sleep = sleep  # type: ignore[method-assign]

        self.clock.sleep = sleeping  # type: ignore[method-assign]

    @property
    def states(self) -> list[str]:
        """The states that the run went through, from the ledger."""
        return [line["to"] for line in read_ledger(self.store)]

    def final_record(self) -> Record:
        record = Records(self.store).load()
        assert record is not None
        return record

    def ledger(self) -> Sequence[dict[str, Any]]:
        return read_ledger(self.store)

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in read_ledger(self.store)]

    def _host(self, machine: Machine, node: int, worker: int) -> SimulatedHost:
        simulated = self._machines.setdefault(machine.name, SimulatedMachine(self.simulation))
        return simulated.host(leader=(node, worker) == (0, 0))


def policy(**changes: object) -> Policy:
    """The tests' own with some of it changed."""
    return replace(Policy("nf-test", (EAST,)), **changes)  # type: ignore[arg-type]
