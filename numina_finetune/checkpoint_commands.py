"""``numina-finetune checkpoints list``, ``verify`` and ``prune``: what checkpoints a run has, on any machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tqdm import tqdm

from numina_finetune.checkpoint.attempts import ATTEMPTS, OUTCOME, attempt_numbers
from numina_finetune.checkpoint.commit import delete_checkpoint
from numina_finetune.checkpoint.evaluations import Evaluation, Evaluations, best_of, from_manifest
from numina_finetune.checkpoint.layout import CHECKPOINTS, COMMITTED, place_of, prefix_of
from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.checkpoint.reading import (
    Checkpoint,
    Unsound,
    committed,
)
from numina_finetune.errors import CheckpointError, ConfigError, ExitCode
from numina_finetune.storage import Entry, NotFound, Store, open_store
from numina_finetune.train.place import METRICS
from numina_finetune.train.record import RECORD

SEEMS_ALIVE = timedelta(hours=1)
"""A life without an outcome that wrote something so recently is taken to be running."""
_HASHERS = 4
"""Files that ``verify`` reads at a time."""


@dataclass(frozen=True)
class Found:
    """One attempt at a checkpoint, as it lies in storage."""

    step: int
    attempt: int
    entries: Sequence[Entry]
    committed: bool
    manifest: Mapping[str, Any] | None
    """None unless it is committed, and everything is there that was."""
    faults: Sequence[str] = ()

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.attempt

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def updated(self) -> datetime:
        """When its last object was written: of a committed one, when it was committed."""
        return max(entry.updated for entry in self.entries)

    def __str__(self) -> str:
        return f"step {self.step} attempt {self.attempt}"


@dataclass(frozen=True)
class Survey:
    """All that lies below a run's ``checkpoints/``, newest first."""

    store: Store
    found: Sequence[Found]
    evaluations: Evaluations
    newest_attempt: int
    living: str | None
    """Why a life of the run seems to be under way; None where none does."""

    @property
    def sound(self) -> list[Found]:
        return [found for found in self.found if found.manifest is not None]

    @property
    def best(self) -> tuple[int, int] | None:
        return next(iter(best_of([found.place for found in self.sound], self.evaluations)), None)


# --- list -------------------------------------------------------------------------------------------------------------


def run_list(url: str, *, as_json: bool) -> ExitCode:
    """Print what checkpoints a run has, or each run of a place."""
    surveys = [survey(store) for store in _runs(url)]
    rows = {each.store.url: [_row(found, each) for found in each.found] for each in surveys}
    if as_json:
        print(json.dumps([{"run": run, "checkpoints": rows[run]} for run in rows], indent=2))
        return ExitCode.DONE
    for each in surveys:
        print(each.store.url)
        print("\n".join(f"  {line}" for line in _table(rows[each.store.url])))
        for found in each.found:
            print("".join(f"  {found} is damaged: {fault}\n" for fault in found.faults), end="")
        if each.living:
            print(f"  {each.living}")
    return ExitCode.DONE


def survey(store: Store) -> Survey:
    """Look at everything below the run's ``checkpoints/``, without reading the shards."""
    entries: dict[tuple[int, int], list[Entry]] = {}
    for entry in store.list(f"{CHECKPOINTS}/"):
        if place := place_of(entry.name):
            entries.setdefault(place, []).append(entry)
    found = [_found(store, place, entries[place]) for place in sorted(entries, reverse=True)]
    newest = max(attempt_numbers(store), default=0)
    return Survey(store, found, _evaluations(store, found), newest, _living(store, newest, found))


def _found(store: Store, place: tuple[int, int], entries: Sequence[Entry]) -> Found:
    prefix = prefix_of(*place)
    if not any(entry.name == prefix + COMMITTED for entry in entries):
        return Found(*place, entries, committed=False, manifest=None)
    try:
        manifest = Checkpoint(*place, store, prefix).open().manifest
    except Unsound as error:
        return Found(*place, entries, committed=True, manifest=None, faults=error.faults)
    except CheckpointError as error:  # of another format
        return Found(*place, entries, committed=True, manifest=None, faults=error.problems)
    return Found(*place, entries, committed=True, manifest=manifest)


def _evaluations(store: Store, found: Sequence[Found]) -> dict[int, Evaluation]:
    """From the manifests, a newer one's word before an older one's; and what came after the last save, from the log."""
    evaluations: dict[int, Evaluation] = {}
    for each in reversed([each for each in found if each.manifest]):
        assert each.manifest is not None
        evaluations |= from_manifest(each.manifest)
    try:
        log = store.read(METRICS, start=0)  # as a part, since it may be growing: no checksum would hold
    except NotFound:
        return evaluations
    for line in log.decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if "eval_loss" in record or "eval_accuracy" in record:
                evaluations[int(record["step"])] = Evaluation(record.get("eval_loss"), record.get("eval_accuracy"))
        except (ValueError, KeyError, TypeError):  # a line that is being written, or was cut off by a kill
            continue
    return evaluations


def _living(store: Store, attempt: int, found: Sequence[Found]) -> str | None:
    """What tells that the run's newest life is under way: it left no outcome, and wrote something not long ago."""
    own = store.list(f"{ATTEMPTS}/{attempt}/")
    if not own or any(entry.name.endswith(f"/{OUTCOME}") for entry in own):
        return None
    log = store.stat(METRICS)
    written = [entry.updated for entry in [*own, *([log] if log else [])]]
    silent = _now() - max([*written, *(each.updated for each in found if each.attempt == attempt)])
    if silent > SEEMS_ALIVE:
        return None
    return (
        f"attempt {attempt} seems to be running: it has no {OUTCOME}, and its last file was written "
        f"{_duration(silent)} ago"
    )


def _row(found: Found, survey: Survey) -> dict[str, Any]:
    """What ``list`` tells of it; ``--json`` gives it as it is."""
    if found.committed:
        state = "damaged" if found.manifest is None else "committed"
    else:
        state = "unfinished" if survey.living and found.attempt == survey.newest_attempt else "leftover"
    evaluation = survey.evaluations.get(found.step, Evaluation())
    return {
        "step": found.step,
        "attempt": found.attempt,
        "state": state,
        "bytes": found.bytes,
        "written": found.updated.isoformat(),
        "age_seconds": round((_now() - found.updated).total_seconds(), 1),
        "mesh": None if found.manifest is None else found.manifest.get("mesh"),
        "evaluation_loss": evaluation.loss,
        "evaluation_accuracy": evaluation.accuracy,
        "newest": found in survey.sound[:1],
        "best": found.place == survey.best,
        "faults": list(found.faults),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["no checkpoints"]
    lines = [("step", "attempt", "state", "size", "age", "mesh", "eval loss", "accuracy", "")]
    for row in rows:
        loss, accuracy = row["evaluation_loss"], row["evaluation_accuracy"]
        lines.append(
            (
                str(row["step"]),
                str(row["attempt"]),
                row["state"],
                _size(row["bytes"]),
                _duration(timedelta(seconds=row["age_seconds"])),
                _mesh(row["mesh"]),
                "-" if loss is None else f"{loss:.4f}",
                "-" if accuracy is None else f"{accuracy:.1%}",
                ", ".join(name for name in ("newest", "best") if row[name]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = (0, 1, 3, 4, 6)  # columns that line up at their right
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


# --- verify -----------------------------------------------------------------------------------------------------------


def run_verify(url: str, step: int | None) -> ExitCode:
    """Read every byte of the committed checkpoints again, or of those of one step, and print what differs."""
    damaged = 0
    checkpoints = of_step(one_run(url), step)
    for checkpoint in checkpoints:
        name, count = f"step {checkpoint.step} attempt {checkpoint.attempt}", 0
        for fault in _hashed(checkpoint):
            tqdm.write(fault)
            count += 1
        if count and not checkpoint.store.stat(checkpoint.prefix + COMMITTED):
            print(f"{name}: deleted meanwhile, as the run makes room for newer ones")
            continue
        print(f"{name}: {f'DAMAGED, {count} fault(s)' if count else 'sound'}")
        damaged += bool(count)
    print(f"{len(checkpoints)} checkpoint(s) read, {damaged} of them damaged")
    return ExitCode.FAULTS_FOUND if damaged else ExitCode.DONE


def _hashed(checkpoint: Checkpoint) -> Iterator[str]:
    """What differs from what was committed; with a bar on a terminal."""
    try:
        opened = checkpoint.open()
    except Unsound as error:
        yield from error.faults
        return

    def hashed(name: str) -> tuple[str, list[str]]:
        try:
            return name, list(opened.hash_faults(name))
        except OSError as error:  # the disk cannot read it, or this account may not
            return name, [f"{checkpoint.address}/{name} cannot be read: {error.strerror}"]

    total = sum(facts.size for facts in opened.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"step {checkpoint.step}", leave=False, disable=None) as bar:
        for name, faults in in_order(hashed, opened.files, threads=_HASHERS, ahead=_HASHERS):
            bar.update(opened.files[name].size)
            yield from faults


# --- prune -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """What ``prune`` does with a checkpoint, and why."""

    stays: bool
    why: str


def run_prune(url: str, keep: int, *, yes: bool, force: bool) -> ExitCode:
    """Delete all but the newest ``keep`` sound checkpoints and the best one; without ``yes`` only say so.

    Raises:
        ConfigError: ``keep`` is too small, or a life of the run seems to be under way and ``force`` is not given.
    """
    if keep < 1:
        raise ConfigError(f"--keep {keep} is too small: use 1 or more, the newest sound checkpoint always stays")
    seen = survey(one_run(url))
    fates = plan_prune(seen, keep)
    for found in seen.found:
        fate = fates[found.place]
        print(f"{found}: {'stays' if fate.stays else 'delete'} ({_size(found.bytes)}, {fate.why})")
    going = [found for found in seen.found if not fates[found.place].stays]
    told = f"{len(going)} checkpoint(s), {_size(sum(found.bytes for found in going))}"
    if not yes:
        print(f"would delete {told}" + (": add --yes to do it" if going else ""))
        return ExitCode.DONE
    if seen.living and not force:
        raise ConfigError(
            f"{seen.store.url}: nothing was deleted: {seen.living}. It deletes old checkpoints itself "
            "(--save-total-limit): stop it first, or give --force if you know that it has ended"
        )
    for found in going:
        delete_checkpoint(seen.store, found.place, [entry.name for entry in found.entries])
    seen.store.sweep()
    print(f"deleted {told}")
    return ExitCode.DONE


def plan_prune(seen: Survey, keep: int) -> dict[tuple[int, int], Fate]:
    """The fate of everything that was found, by step and attempt.

    Committed ones stay from the newest on until ``keep`` sound ones have been passed (a damaged one among them counts
    for nothing); of the older ones, the best stays. What was never committed goes where an attempt after its own has
    begun: only the newest may still commit.
    """
    rotten = _rotten(seen)
    sound = [found.place for found in seen.sound if found.place not in rotten]
    oldest = sound[keep - 1] if len(sound) >= keep else (0, 0)
    best = best_of(sound, seen.evaluations)

    def fate(found: Found) -> Fate:
        if not found.committed:
            superseded = found.attempt < seen.newest_attempt
            return Fate(not superseded, "never committed" + ("" if superseded else ", but of the newest attempt"))
        if found.place in best:
            return Fate(True, f"the best by evaluation, {seen.evaluations[found.step]}")
        if found.manifest is None or found.place in rotten:
            return Fate(found.place >= oldest, "damaged")
        if found.place < oldest:
            return Fate(False, f"older than the newest {keep}")
        return Fate(True, "the newest sound one" if found.place == sound[0] else "sound")

    return {found.place: fate(found) for found in seen.found}


def _rotten(seen: Survey) -> set[tuple[int, int]]:
    """The newest checkpoints that look sound and are not, up to the first whose every byte is.

    Cloud Storage keeps watch over its bytes, so that what it says of an object holds; on a disk a bit may flip unseen.
    """
    rotten: set[tuple[int, int]] = set()
    if seen.store.url.startswith("gs://"):
        return rotten
    for found in seen.sound:
        if not any(_hashed(_checkpoint(seen.store, found))):
            break
        rotten.add(found.place)
    return rotten


# --- the place --------------------------------------------------------------------------------------------------------


def _runs(url: str) -> list[Store]:
    """The run in that place, or all runs one level below it.

    Raises:
        ConfigError: there is none.
    """
    store = open_store(url)
    if _is_run(store):
        return [store]
    below = [open_store(f"{store.url.rstrip('/')}/{folder}") for folder in store.folders()]
    if runs := [each for each in below if _is_run(each)]:
        return runs
    raise ConfigError(f"{url}: there is no run, nor one below it: give the folder that has the run's {RECORD}")


def one_run(url: str) -> Store:
    """The run in that place, or the only one below it."""
    runs = _runs(url)
    if len(runs) > 1:
        raise ConfigError(f"{url} holds {len(runs)} runs: name one of {', '.join(run.url for run in runs)}")
    return runs[0]


def _is_run(store: Store) -> bool:
    return store.stat(RECORD) is not None or any(place_of(name) for name in store.names(f"{CHECKPOINTS}/"))


def of_step(store: Store, step: int | None) -> list[Checkpoint]:
    """The committed checkpoints, or those of one step, newest first.

    Raises:
        CheckpointError: there is none.
    """
    found = committed(store)
    if not found:
        raise CheckpointError(f"{store.url} has no committed checkpoint")
    wanted = [checkpoint for checkpoint in found if step in (None, checkpoint.step)]
    if not wanted:
        steps = ", ".join(map(str, sorted({checkpoint.step for checkpoint in found})))
        raise CheckpointError(f"--step {step}: no such committed checkpoint in {store.url}: there are steps {steps}")
    return wanted


def best_checkpoint(store: Store) -> Checkpoint:
    """The best of a run's checkpoints, by its evaluations.

    Raises:
        CheckpointError: none was evaluated.
    """
    best = survey(store).best
    if best is None:
        raise CheckpointError(f"{store.url} has no evaluated checkpoint to be the best: name its step, or take newest")
    return Checkpoint(*best, store, prefix_of(*best))


def _checkpoint(store: Store, found: Found) -> Checkpoint:
    return Checkpoint(*found.place, store, prefix_of(*found.place))


# --- words ------------------------------------------------------------------------------------------------------------


def _now() -> datetime:
    return datetime.now(UTC)


def _size(count: int) -> str:
    """Bytes for people."""
    for unit, bytes_ in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_:
            return f"{count / bytes_:.2f} {unit}"
    return f"{count} B"


def _duration(span: timedelta) -> str:
    seconds = max(int(span.total_seconds()), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _mesh(axes: Mapping[str, int] | None) -> str:
    if axes is None:
        return "-"
    return ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one device"
