"""``spot run``, ``status``, ``logs``, ``stop``, ``clean`` and ``report``: what the command line calls."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.spot.actions import Actions
from numina_finetune.spot.clock import Clock, RealClock
from numina_finetune.spot.cloud import Cloud, Machine
from numina_finetune.spot.gcloud import Gcloud
from numina_finetune.spot.job import SECRETS, SETUP, TRAIN, Job
from numina_finetune.spot.lease import Lease, LeaseHeld, LeaseLost, read_holder
from numina_finetune.spot.ledger import closed_bill
from numina_finetune.spot.machine import Action, State
from numina_finetune.spot.options import (
    SpotOptions,
    bucket_of,
    check_options,
    check_place,
    check_prices,
    job_of,
    policy_of,
    provision_of,
)
from numina_finetune.spot.prices import Prices, load_prices, parse_prices
from numina_finetune.spot.record import STOP, Record, Records
from numina_finetune.spot.report import account, as_table, draw, step_records
from numina_finetune.spot.supervisor import Supervisor
from numina_finetune.spot.worker import STEP
from numina_finetune.spot.workers import LOGS, Workers, folder_command, log_tail, worker_command
from numina_finetune.storage import StorageUnavailable, Store, open_store

OPTIONS = "spot/options.json"
PRICES = "spot/prices.yaml"
PICTURE = "spot/goodput.png"
_FOLLOW_SECONDS = 10.0

Say = Callable[[str], None]


def run(
    options: SpotOptions,
    training: Sequence[str],
    *,
    faults: Sequence[str] = (),
    cloud: Cloud | None = None,
    clock: Clock | None = None,
) -> ExitCode:
    """Supervise a training until it is done; the same command again goes on.

    Args:
        training: the training's own options, without --output-dir and --run-id.
        faults: what the caller found wrong with them.

    Raises:
        ConfigError: all faults that can be seen before anything is asked for.
    """
    check_options(options, training, faults)
    prices = load_prices(Path(options.prices) if options.prices else None)
    check_prices(options, prices)
    if options.dry_run:
        print("\n".join(planned_commands(options, training)))
        return ExitCode.DONE
    cloud = cloud or _cloud(options)
    check_place(options, cloud)
    store = open_store(options.run_url)
    _keep(store, options)
    print(f"numina-finetune spot status {options.run_url}   tells how it stands; spot logs, spot stop", flush=True)
    return _supervise(options, cloud, store, job_of(options, training), prices, clock or RealClock())


def status(url: str, say: Say = print) -> ExitCode:
    """Print state, step, loss, cost, goodput and what comes next."""
    store, options = _opened(url)
    record = _record(store)
    now, prices = RealClock().now(), _stored_prices(store, options)
    machine = record.machine
    say(f"state    {record.state} since {_when(record.since)}" + (f", {record.verdict}" if record.verdict else ""))
    if machine:
        say(f"machine  {machine.name}: {machine.slices} x {machine.accelerator} in {machine.zone}")
    say(f"step     {_newest_step(store, record)}, life {record.life}")
    spent, bill = record.spent, closed_bill(record, now, prices)
    say(f"so far   {spent.preemptions} preemptions, {spent.restarts} crashes and stalls, {spent.refusals} refusals now")
    unpriced = f", {bill.unpriced / 3600:.2f} of them without a known price" if bill.unpriced else ""
    say(f"cost     ${bill.cost:.2f}, {bill.chip_seconds / 3600:.2f} chip-hours{unpriced}")
    say(f"goodput  {account(store).goodput:.1%} of the chip time of ended states")
    say(f"next     {_next(record, now)}")
    if record.reason:
        say(f"reason   {record.reason}")
    found = read_holder(store)
    say(f"lease    {found[0] if found else 'nobody supervises it: give the same spot run command again'}")
    return ExitCode.DONE


def logs(url: str, *, follow: bool = False, say: Say = print, clock: Clock | None = None) -> ExitCode:
    """Print every worker's log, set-ups and trainings in the order of their lives; go on with what comes."""
    store, _ = _opened(url)
    clock, shown = clock or RealClock(), set[str]()
    while True:
        for entry in sorted(store.list(f"{LOGS}/"), key=lambda entry: (entry.updated, entry.name)):
            key = f"{entry.name}#{entry.size}"
            if key in shown:
                continue
            shown.add(key)
            job, place = entry.name.split("/")[2:4]
            for line in store.read(entry.name).decode("utf-8", "replace").splitlines():
                say(f"{job} {place} | {line}")
        if not follow or _record(store).state == State.ENDED:
            return ExitCode.DONE
        clock.sleep(_FOLLOW_SECONDS)


def stop(url: str, *, cloud: Cloud | None = None, clock: Clock | None = None, say: Say = print) -> ExitCode:
    """Have the training save and the machine deleted: by its supervisor, or, where there is none, by this process."""
    store, options = _opened(url)
    clock = clock or RealClock()
    if _record(store).state == State.ENDED:
        say("the run has ended: nothing to stop")
        return ExitCode.DONE
    store.write(STOP, b"{}")
    nothing = Job(("false",), ("false",))  # after a request to stop, nothing is started
    try:
        supervisor = _supervisor(
            options, cloud or _cloud(options), store, nothing, _stored_prices(store, options), clock
        )
        supervisor.ask_to_stop()
        supervisor.run()
    except LeaseHeld as held:
        say(f"asked: {held}")
        say("it saves, deletes the machine and ends; spot status tells how far it is")
    return ExitCode.DONE


def clean(url: str, *, cloud: Cloud | None = None, clock: Clock | None = None, say: Say = print) -> ExitCode:
    """Delete every machine of the run, whatever state it is in; not while it is supervised."""
    store, options = _opened(url)
    cloud, clock = cloud or _cloud(options), clock or RealClock()
    lease = Lease(store, clock)
    try:
        lease.take()
    except LeaseHeld as held:
        raise ConfigError(f"{held}; or use spot stop") from held
    try:
        nobody = Workers(cloud, "", store, lease.keep)
        actions = Actions(cloud, nobody, Job((), ()), policy_of(options), lambda record: None)
        for machine, state in actions.ours():
            say(f"{machine.name} in {machine.zone} is {state}: deleting")
        while not actions.sweep(keep=None):
            clock.sleep(options.poll_seconds)
        say("no machine of this run is left")
        records = Records(store)
        record = records.load()
        if record is not None and record.state != State.ENDED:
            # The next supervisor must not look for what is gone.
            now = clock.now()
            bill = closed_bill(record, now, _stored_prices(store, options))
            ended = dataclasses.replace(
                record, state=State.ABSENT, machine=None, pending=Action.NONE, bill=bill, since=now, line={}
            )
            records.save(ended)
        return ExitCode.DONE
    finally:
        lease.give_back()


def report(url: str, *, say: Say = print) -> ExitCode:
    """Print where the time went, and draw it beside the ledger."""
    store, options = _opened(url)
    result = account(store)
    say(as_table(result, _stored_prices(store, options).source))
    picture = Path(f"{options.run_id}-goodput.png")
    draw(result, picture)
    store.upload(picture, PICTURE)
    say(f"picture: {picture}, {store.address(PICTURE)}")
    return ExitCode.DONE


def planned_commands(options: SpotOptions, training: Sequence[str]) -> list[str]:
    """Every kind of command line of an undisturbed run, in order, with the first target."""
    cloud, policy, job = _cloud(options), policy_of(options), job_of(options, training)
    target = policy.targets[0]
    machine = Machine(f"{policy.prefix}-1", target.zone, target.accelerator, policy.slices)
    home, setup, train = _home(options), f"{SETUP}-1", f"{TRAIN}-1"
    names = sorted([f"{setup}.json", f"{train}.json", "worker.py", *job.scripts, *([SECRETS] if job.secrets else [])])
    files = [*(Path(name) for name in names), *job.files]
    looks = [cloud.list_arguments(zone) for zone in dict.fromkeys(target.zone for target in policy.targets)]

    def on(node: str, command: str) -> Sequence[str]:
        return cloud.run_arguments(node, machine.zone, command, "FOLDER")

    def on_all(*words: str) -> list[Sequence[str]]:
        return [on(node, worker_command(home, *words)) for node in machine.nodes]

    lines = [] if options.allow_cross_region else [cloud.bucket_arguments(bucket_of(options))]
    lines += [*looks, cloud.create_arguments(machine), cloud.describe_arguments(machine)]
    lines += [cloud.node_arguments(node, machine.zone) for node in machine.nodes]
    for node in machine.nodes:
        lines.append(on(node, folder_command(home)))
        lines.append(cloud.copy_arguments(node, machine.zone, files, home))
        lines.append(on(node, worker_command(home, "clean")))
    lines += [*on_all("start", setup), *on_all("status", setup, "-", "TOKEN")]
    lines += [*on_all("start", train), *on_all("status", train, "-", "TOKEN")]
    shown = [shlex.join(["gcloud", *line]) for line in lines]
    last = [cloud.delete_command(machine), *(shlex.join(["gcloud", *look]) for look in looks)]
    return [*shown, *last, f"# on every worker: exec {shlex.join(job.train)}"]


def _supervise(options: SpotOptions, cloud: Cloud, store: Store, job: Job, prices: Prices, clock: Clock) -> ExitCode:
    supervisor = _supervisor(options, cloud, store, job, prices, clock)
    try:
        with _two_interrupts(supervisor):
            code = supervisor.run()
    except KeyboardInterrupt:
        machine = supervisor.record.machine
        print("left as it is: give the same command again to go on", flush=True)
        if machine is not None:
            print(f"or delete the machine: {cloud.delete_command(machine)}", flush=True)
        return ExitCode.STOPPED
    except (LeaseHeld, LeaseLost, StorageUnavailable) as error:
        print(f"numina-finetune: {error}", flush=True)
        return ExitCode.CRASHED
    record = supervisor.record
    print(f"{record.verdict}: {record.reason}", flush=True)
    return code


@contextmanager
def _two_interrupts(supervisor: Supervisor) -> Iterator[None]:
    """The first Ctrl-C saves and deletes; the second leaves everything."""
    asked = False

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("stopping: the training saves, then the machine is deleted; Ctrl-C again leaves both", flush=True)
        supervisor.ask_to_stop()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _supervisor(options: SpotOptions, cloud: Cloud, store: Store, job: Job, prices: Prices, clock: Clock) -> Supervisor:
    def tell(line: str) -> None:
        print(f"{_when(clock.now())} {line}", flush=True)

    return Supervisor(cloud, store, job, policy_of(options), prices, clock, home=_home(options), tell=tell)


def _home(options: SpotOptions) -> str:
    return f"numina-finetune/{policy_of(options).prefix}"


def _cloud(options: SpotOptions) -> Gcloud:
    return Gcloud(options.project, provision_of(options))


def _stored_prices(store: Store, options: SpotOptions) -> Prices:
    """Those of the run: the file that it was given may be on another computer."""
    return parse_prices(store.read(PRICES).decode(), options.prices) if options.prices else load_prices(None)


def _keep(store: Store, options: SpotOptions) -> None:
    """For the other commands, which get the run's place only."""
    if options.prices:
        store.write(PRICES, Path(options.prices).read_bytes())
    store.write(OPTIONS, (json.dumps(dataclasses.asdict(options), indent=1) + "\n").encode())


def _opened(url: str) -> tuple[Store, SpotOptions]:
    store = open_store(url)
    if store.stat(OPTIONS) is None:
        raise ConfigError(f"{url} is no run of spot run: give its place, gs://bucket/prefix/run-id")
    return store, SpotOptions.from_mapping(json.loads(store.read(OPTIONS)))


def _record(store: Store) -> Record:
    record = Records(store).load()
    if record is None:
        raise ConfigError(f"{store.url} has not been begun: run spot run")
    return record


def _newest_step(store: Store, record: Record) -> str:
    """From the log, which comes with every look at the workers; else from the metrics, which come with checkpoints."""
    logged = STEP.findall(log_tail(store, f"{TRAIN}-{record.life}", lines=200).encode())
    if logged:
        step, total, loss = logged[-1]
        return f"{int(step)} of {int(total)}, loss {float(loss):.4f}"
    metric = next(reversed(step_records(store)), None)
    return f"{metric['step']}, loss {metric['loss']:.4f}" if metric else str(record.step)


def _next(record: Record, now: float) -> str:
    if record.pending != Action.NONE:
        return str(record.pending)
    if record.state == State.ABSENT:
        wait = record.not_before - now
        return f"ask for a machine {'now' if wait <= 0 else f'in {wait / 60:.0f} minutes'}"
    return {
        State.ENDED: "nothing",
        State.SETUP: "start the training when every worker is set up",
        State.RUNNING: "watch",
        State.STOPPING: "delete the machine when the training has saved",
    }.get(record.state, "wait for the cloud")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
