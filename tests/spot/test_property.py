"""A thousand runs in a hostile cloud: every one ends, for the right reason, and leaves no machine behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

from numina_finetune.spot.fake import Behaviour, Fault
from numina_finetune.spot.fake_hosts import Script
from numina_finetune.spot.policy import Policy, Target
from tests.spot.support import World

RUNS = 1000
SEED = int(os.environ.get("NUMINA_SPOT_SEED", "20261101"))
_LOSSES = ("preempt", "kill", "one", "vanish", "sick", "fail", "refuse", "quota", "suspend")
_TARGETS = (Target("v6e-8", "us-east5-b"), Target("v6e-8", "us-east5-a"), Target("v5litepod-16", "us-east5-a"))


def hostile_world(rng: random.Random) -> World:
    """Faults of all kinds, alone and together."""
    bad = rng.random() < 0.3  # the training itself is at fault
    script = Script(
        total_steps=rng.randint(20, 300),
        step_seconds=rng.uniform(5, 60),
        start_seconds=rng.uniform(20, 600),
        save_every=rng.choice([5, 20, 50]),
        crash_at=[rng.randint(1, 150) for _ in range(rng.randint(1, 4))] if bad else [],
        stall_at=[rng.randint(1, 150) for _ in range(rng.randint(0, 2))] if bad else [],
        refuse=rng.random() < 0.03,
        silent_exit=rng.random() < 0.1,
        failing_set_ups=rng.choice([0, 0, 0, 1, 3]) if bad else 0,
    )
    behaviour = Behaviour(
        queue_seconds=rng.uniform(0, 1800),
        provision_seconds=rng.uniform(10, 900),
        delete_seconds=rng.uniform(1, 900),
        notice_seconds=rng.choice([5.0, 30.0]),
        suspend_seconds=rng.uniform(1, 300),
        flaky_reads=rng.choice([0, 0.05, 0.3]),
        flaky_runs=rng.choice([0, 0.05, 0.2]),
        lost_answers=rng.choice([0, 0.1, 0.5]),
        stock={"us-east5-b": rng.choice([0, 1])} if rng.random() < 0.3 else {},
    )
    kinds = (*_LOSSES, "unreachable") if bad else _LOSSES
    faults = [
        Fault(rng.choice(kinds), rng.expovariate(1 / 2500)) if rng.random() < 0.8 else None
        for _ in range(rng.randint(0, 12))
    ]
    targets = _TARGETS[: rng.randint(1, 3)] if not behaviour.stock else _TARGETS
    policy = Policy("nf-test", targets, slices=rng.choice([1, 1, 2]))
    if rng.random() < 0.1:
        policy = Policy("nf-test", targets, max_hours=rng.uniform(0.1, 3), max_cost=None)
    world = World(script, behaviour, faults, policy, seed=rng.getrandbits(30))
    return world


def deaths(rng: random.Random) -> Iterator[tuple[int, bool]]:
    """Of the supervisors."""
    for _ in range(rng.choice([0, 0, 1, 3, 8])):
        yield rng.randint(1, 40), rng.random() < 0.5


def live(seed: int) -> None:
    rng = random.Random(seed)
    world = hostile_world(rng)
    script = world.script
    faulty = bool(script.crash_at or script.stall_at or script.failing_set_ups) or any(
        fault is not None and fault.kind == "unreachable" for fault in world.faults
    )
    stop_at = rng.uniform(0, 20_000) if rng.random() < 0.1 else None
    if stop_at is not None:
        world.stop_after(stop_at)
    world.run(deaths(rng))
    record = world.final_record()
    assert record.state == "ENDED"
    assert world.cloud.machines() == [], "a machine is left"
    assert world.cloud.most_at_once <= 1, "two machines at a time"
    allowed = {"done"}
    allowed |= {"configuration"} if script.refuse else set()
    allowed |= {"stopped"} if stop_at is not None else set()
    allowed |= {"limit"} if world.policy.max_hours is not None else set()
    allowed |= {"failed"} if faulty else set()
    assert record.verdict in allowed, record
    if script.refuse:
        assert record.verdict != "done"
    if record.verdict == "done":
        assert world.simulation.saved == script.total_steps
    if record.verdict == "failed":
        assert "crash" in record.reason or "stall" in record.reason
    assert [line["number"] for line in world.ledger()] == list(range(1, record.number + 1)), "the ledger has gaps"


def test_a_thousand_runs_end_for_the_right_reason_and_leave_no_machine() -> None:
    seeds = random.Random(SEED)
    for number in range(RUNS):
        seed = seeds.getrandbits(40)
        try:
            live(seed)
        except BaseException as error:
            raise AssertionError(f"run {number} fails: live({seed}) ({type(error).__name__}: {error})") from error
