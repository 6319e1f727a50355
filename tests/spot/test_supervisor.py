"""What a supervisor does about each fault; the fake cloud is hostile, the training is a model of one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.errors import ExitCode
from numina_finetune.spot.budgets import Budgets
from numina_finetune.spot.fake import Behaviour, Fault
from numina_finetune.spot.fake_hosts import Script
from numina_finetune.spot.gcloud_errors import typed
from numina_finetune.spot.lease import LEASE, LEASE_SECONDS, Lease, LeaseHeld, LeaseLost
from numina_finetune.spot.machine import State, as_markdown
from numina_finetune.spot.policy import Target
from numina_finetune.storage import open_store
from tests.conftest import ROOT
from tests.gcs import gcs
from tests.spot.support import JOB, World, policy

WEST = Target("v6e-8", "us-east5-a")
SMALLER = Target("v5litepod-16", "us-east5-b")


def test_an_undisturbed_run_asks_for_one_machine_and_deletes_it() -> None:
    world = World()
    assert world.run() == ExitCode.DONE
    assert world.cloud.trace == ["create nf-test-1 v6e-8 us-east5-b", "delete nf-test-1"]
    assert world.states == ["REQUESTED", "PROVISIONING", "ACTIVE", "SETUP", "RUNNING", "DONE", "ENDED"]


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        (Fault("preempt", 1000), "preempted"),
        (Fault("kill", 1000), "preempted"),
        (Fault("one", 1000), "preempted"),
        (Fault("vanish", 1000), "preempted"),
        (Fault("sick", 1000), "preempted"),
        (Fault("preempt", 40), "lost"),
        (Fault("kill", 40), "lost"),
        (Fault("suspend", 30), "lost"),
        (Fault("fail", 30), "refused"),
        (Fault("refuse"), "refused"),
        (Fault("quota"), "refused"),
        (Fault("unreachable", 1000), "stalled"),
    ],
    ids=lambda value: f"{value.kind}@{value.after:.0f}" if isinstance(value, Fault) else value,
)
def test_whatever_becomes_of_a_machine_it_is_deleted_and_the_run_goes_on_with_the_next(
    fault: Fault, event: str
) -> None:
    world = World(faults=[fault])
    assert world.run() == ExitCode.DONE
    assert event in world.events
    assert [line.split()[1] for line in world.cloud.trace if line.startswith("create")] == ["nf-test-1", "nf-test-2"]
    assert (world.cloud.machines(), world.cloud.most_at_once) == ([], 1)
    assert world.final_record().spent.crashes == 0, "no fault of the machine is charged as a crash"


def test_a_training_that_exits_0_on_a_preemption_is_not_done() -> None:
    world = World(Script(silent_exit=True), faults=[Fault("preempt", 1000)])
    assert world.run() == ExitCode.DONE
    assert "PREEMPTED" in world.states
    assert world.simulation.saved == 200


def test_a_crash_restarts_on_the_same_machine_and_is_forgotten_after_progress() -> None:
    world = World(Script(crash_at=[50, 90, 130, 170]))
    assert world.run() == ExitCode.DONE
    assert world.cloud.trace == ["create nf-test-1 v6e-8 us-east5-b", "delete nf-test-1", *world.cloud.trace[2:]]
    assert world.final_record().spent.restarts == 4


def test_the_same_step_crashing_twice_ends_the_run_with_the_reason() -> None:
    world = World(Script(crash_at=[50, 50]))
    assert world.run() == ExitCode.CRASHED
    assert "step 50 crashed twice: ValueError: simulated" in world.final_record().reason
    assert world.cloud.machines() == []


def test_crashes_without_progress_in_between_are_counted() -> None:
    world = World(Script(crash_at=[5, 6, 7], save_every=20), policy=policy(budgets=Budgets(max_crashes=3)))
    assert world.run() == ExitCode.CRASHED
    assert "3 crashes in a row" in world.final_record().reason


def test_a_configuration_error_ends_the_run_at_once() -> None:
    world = World(Script(refuse=True))
    assert world.run() == ExitCode.CONFIGURATION
    assert world.cloud.trace == ["create nf-test-1 v6e-8 us-east5-b", "delete nf-test-1"]
    assert "--mesh is wrong" in world.final_record().reason


def test_a_set_up_that_fails_is_charged_and_told() -> None:
    world = World(Script(failing_set_ups=3))
    assert world.run() == ExitCode.CRASHED
    assert "the set-up failed" in world.final_record().reason
    assert world.simulation.lives == 0


def test_a_run_that_makes_no_step_is_restarted_and_counted_apart() -> None:
    world = World(Script(stall_at=[70]))
    assert world.run() == ExitCode.DONE
    assert "STALLED" in world.states
    assert (world.final_record().spent.crashes, world.final_record().spent.restarts) == (0, 1)


def test_a_stock_out_goes_round_the_targets_at_once_and_then_waits_longer_each_round() -> None:
    targets = (Target("v6e-8", "us-east5-b"), WEST)
    world = World(faults=[Fault("refuse")] * 6, policy=policy(targets=targets))
    assert world.run() == ExitCode.DONE
    zones = [line.split()[3] for line in world.cloud.trace if line.startswith("create")]
    assert zones == ["us-east5-b", "us-east5-a"] * 3 + ["us-east5-b"]
    waits = [line["seconds"] for line in world.ledger() if line["event"] == "due"]
    assert waits[0] == waits[1] == waits[3] == 0
    assert 30 <= waits[2] < waits[4] < waits[6] <= 12 * 60
    assert world.final_record().spent.preemptions == 0


def test_a_zone_that_never_has_the_type_is_not_asked_again() -> None:
    world = World(policy=policy(targets=(SMALLER, WEST)), faults=[Fault("kill", 1500), Fault("kill", 1500)])
    create = world.cloud.create

    def refuse(machine):  # type: ignore[no-untyped-def]
        if machine.accelerator == SMALLER.accelerator:
            world.cloud.trace.append(f"create {machine.name} refused")
            raise typed("INVALID_ARGUMENT: the accelerator v5litepod-16 was not found in zone us-east5-b")
        create(machine)

    world.cloud.create = refuse  # type: ignore[method-assign]
    assert world.run() == ExitCode.DONE
    assert sum("refused" in line for line in world.cloud.trace) == 1


def test_the_limits_on_hours_and_cost_save_and_delete() -> None:
    world = World(policy=policy(max_cost=6.0))
    assert world.run() == ExitCode.CRASHED
    record = world.final_record()
    assert record.verdict == "limit"
    assert 6.0 <= record.bill.cost < 7.5
    assert world.simulation.saved > 0
    assert "STOPPING" in world.states
    hours = World(policy=policy(max_hours=0.5))
    hours.run()
    assert hours.final_record().verdict == "limit"


def test_a_stop_saves_first_and_then_deletes_and_the_next_run_goes_on_from_there() -> None:
    world = World()
    supervisor = world.supervisor()
    sleep = world.clock.sleep
    world.clock.sleep = lambda seconds: (sleep(seconds), world.simulation.saved and supervisor.ask_to_stop())[0]  # type: ignore[method-assign]
    assert supervisor.run() == ExitCode.STOPPED
    world.clock.sleep = sleep  # type: ignore[method-assign]
    assert world.states[-3:] == ["STOPPING", "STOPPED", "ENDED"]
    assert world.cloud.machines() == []
    assert 20 <= world.simulation.saved < 200
    assert world.run() == ExitCode.DONE
    assert world.simulation.saved == 200
    assert world.run() == ExitCode.DONE, "a run that is done stays done"
    assert sum(line.startswith("create") for line in world.cloud.trace) == 2


@pytest.mark.parametrize("seconds", [0, 100, 230, 330, 1000])
def test_a_stop_from_elsewhere_is_heard_in_every_state(seconds: float) -> None:
    world = World()
    world.stop_after(seconds)
    assert world.run() == ExitCode.STOPPED
    assert world.cloud.machines() == []


# --- a supervisor that dies, and two of them -----------------------------------------------------------------------


_LOSSES = (Fault("preempt", 900), Fault("refuse"), Fault("kill", 700))
_WAITING = {State.REQUESTED, State.PROVISIONING, State.ACTIVE, State.SETUP}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("script", "faults", "stop", "codes", "states"),
    [
        (
            {"crash_at": (70,)},
            _LOSSES,
            None,
            {ExitCode.DONE},
            {State.ABSENT, *_WAITING, State.RUNNING, State.PREEMPTED, State.REFUSED, State.DONE, State.ENDED},
        ),
        ({"crash_at": (50, 55), "stall_at": (70,)}, (), None, {ExitCode.DONE}, {State.CRASHED, State.STALLED}),
        ({"refuse": True}, (), None, {ExitCode.CONFIGURATION}, {*_WAITING, State.FAILED}),
        # One that is killed after the very end and started again goes on: its user has seen the end.
        ({}, (), 900.0, {ExitCode.STOPPED, ExitCode.DONE}, {State.RUNNING, State.STOPPING, State.STOPPED}),
    ],
    ids=["lost machines", "crashes and stalls", "configuration error", "stop"],
)
def test_a_supervisor_killed_at_any_write_loses_no_run_and_makes_no_second_machine(
    script: dict[str, Any],
    faults: Sequence[Fault],
    stop: float | None,
    codes: set[ExitCode],
    states: set[State],
    after: bool,
) -> None:
    died_in: set[str] = set()
    for dies_at in itertools.count(1):
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in script.items()}
        world = World(Script(total_steps=100, **lists), faults=faults)
        if stop is not None:
            world.stop_after(stop)
        code = world.run(iter([(dies_at, after)]))
        assert code in codes, dies_at
        assert world.cloud.machines() == [] and world.cloud.most_at_once <= 1, dies_at
        assert code != ExitCode.DONE or world.simulation.saved == 100
        numbers = [line["number"] for line in world.ledger()]
        assert numbers == list(range(1, len(numbers) + 1)), "every change is in the ledger, once"
        died_in.update(line.split()[3].strip(",") for line in world.told if line.startswith("going on with"))
        if world.deaths == 0:
            break
    assert died_in >= states


def test_a_run_is_supervised_through_cloud_storage_with_its_faults() -> None:
    with gcs() as service:
        world = World(Script(total_steps=60), faults=[Fault("preempt", 900)], store=open_store(f"{service.url}/runs/a"))
        for pattern in ("record.json", "lease.json", "ledger.jsonl"):
            service.fault("lose_answer", f"POST .*{pattern}", times=2)
            service.fault(503, f"GET .*{pattern}", times=2)
        assert world.run(iter([(12, True)])) == ExitCode.DONE
        assert (world.cloud.machines(), world.cloud.most_at_once) == ([], 1)
        assert world.final_record().spent.preemptions == 1


def test_of_two_supervisors_one_works_and_the_other_says_who_does() -> None:
    world = World()
    first, second = world.supervisor(), world.supervisor()
    sleep = world.clock.sleep
    refusals: list[str] = []

    def interfere(seconds: float) -> None:
        sleep(seconds)
        with pytest.raises(LeaseHeld) as told:
            second.run()
        refusals.append(str(told.value))

    world.clock.sleep = interfere  # type: ignore[method-assign]
    assert first.run() == ExitCode.DONE
    assert f"process {os.getpid()} on {socket.gethostname()}" in refusals[0]
    assert world.cloud.trace == ["create nf-test-1 v6e-8 us-east5-b", "delete nf-test-1"]


def test_a_supervisor_that_slept_through_its_lease_does_nothing_more() -> None:
    world = World()
    late = world.supervisor()
    sleep = world.clock.sleep

    def oversleep(seconds: float) -> None:
        """The first one's computer is closed for an hour; meanwhile another supervisor finishes the run."""
        world.clock.sleep = sleep  # type: ignore[method-assign]
        sleep(LEASE_SECONDS + 1)
        assert world.supervisor().run() == ExitCode.DONE

    world.clock.sleep = oversleep  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        late.run()
    assert world.cloud.most_at_once == 1
    assert world.final_record().verdict == "done"


def test_the_lease_of_a_dead_process_of_this_host_is_free_at_once(tmp_path: Path) -> None:
    world = World()
    Lease(world.store, world.clock).take()
    with pytest.raises(LeaseHeld):
        Lease(world.store, world.clock).take()
    holder = json.loads(world.store.read(LEASE))
    world.store.write(LEASE, json.dumps({**holder, "born": "1"}).encode())
    Lease(world.store, world.clock).take()


def test_many_that_want_the_lease_at_once_get_it_once(tmp_path: Path) -> None:
    world, taken = World(), []

    def want() -> None:
        with contextlib.suppress(LeaseHeld):
            Lease(open_store(tmp_path), world.clock).take()
            taken.append(True)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [True]


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_no_secret_is_told_or_stored() -> None:
    world = World(faults=[Fault("preempt", 900)])
    world.run()
    (secret,) = JOB.secrets.values()
    assert secret not in repr(JOB)
    assert all(secret not in line for line in world.told)
    assert all(secret.encode() not in world.store.read(entry.name) for entry in world.store.list())


def test_the_ledger_counts_chip_seconds_and_cost_only_while_there_is_a_machine() -> None:
    world = World(faults=[Fault("preempt", 900)])
    world.run()
    lines, bill = world.ledger(), world.final_record().bill
    assert all(line["chip_seconds"] == 0 for line in lines if line["from"] in ("ABSENT", "REQUESTED", "PROVISIONING"))
    assert sum(line["chip_seconds"] for line in lines) == pytest.approx(bill.chip_seconds)
    assert bill.cost == pytest.approx(bill.chip_seconds / 3600 * 1.5)


def test_an_unknown_price_gives_chip_seconds_and_no_dollars() -> None:
    world = World(policy=policy(targets=(Target("v5p-8", "us-east5-a"),)))
    world.run()
    bill = world.final_record().bill
    assert (bill.cost, bill.unpriced) == (0.0, bill.chip_seconds)
    assert all(line["dollars_per_chip_hour"] is None for line in world.ledger() if line["machine"])


def test_flaky_reads_alone_cost_nothing() -> None:
    world = World(behaviour=Behaviour(flaky_reads=0.4, flaky_runs=0.1))
    assert world.run() == ExitCode.DONE
    assert world.cloud.trace == ["create nf-test-1 v6e-8 us-east5-b", "delete nf-test-1"]


def test_the_table_in_the_documentation_is_the_table_in_the_code() -> None:
    assert as_markdown() in (ROOT / "docs" / "spot.md").read_text(encoding="utf-8")
