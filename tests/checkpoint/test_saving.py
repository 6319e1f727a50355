"""Saves that come back as they were, whatever happens to them on the way; and which of them stay."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from numina_finetune.checkpoint.attempts import open_attempt
from numina_finetune.checkpoint.reading import committed, drop_unsound, faults_of
from numina_finetune.errors import CheckpointError, ConfigError
from numina_finetune.storage import StorageError, Store, open_store
from tests.gcs import Gcs

pytestmark = pytest.mark.usefixtures("native_here")


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="numina_finetune")
    return caplog


def begin(*arguments: object, **options: object):  # type: ignore[no-untyped-def]  # accelerate is imported late
    from tests.checkpoint.owner import begin

    return begin(*arguments, **options)  # type: ignore[arg-type]


def steps(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in committed(store)]


def resume(store: Store) -> int:
    """A new life that loads the newest sound checkpoint; the step that its whole state is of."""
    life = begin(store)
    checkpoint = life.checkpoints.load(drop_unsound(committed(store)))
    assert life.owner.is_at(checkpoint.step)
    assert life.progress.step == checkpoint.step
    return int(checkpoint.step)


def test_a_saved_state_comes_back_in_a_new_life(store: Store) -> None:
    life = begin(store)
    assert life.save(7)
    assert life.checkpoints.committed_step == 7
    assert resume(store) == 7
    assert faults_of(committed(store)[0]) == []


def test_training_may_change_the_state_as_soon_as_save_returns(service: Gcs, cloud: Store) -> None:
    slow = service.fault("delay", r"^PUT .*/state/|^POST .*/state/", seconds=1.5)
    life = begin(cloud)
    began = time.monotonic()
    life.save(7, wait=False)
    stall = time.monotonic() - began
    life.step(8)
    assert life.checkpoints.finish()
    assert slow.times == 0 and stall < 1.0 < 1.5 <= time.monotonic() - began
    assert resume(cloud) == 7
    (saved,) = life.checkpoints.drain()
    assert saved.stall_seconds < 1.0 and saved.total_seconds >= 1.5
    assert saved.bytes == sum(entry.size for entry in cloud.list("checkpoints/") if _counts(entry.name))


def _counts(name: str) -> bool:
    return not name.endswith(("MANIFEST.json", "COMMITTED"))


def test_a_save_waits_for_the_one_before(service: Gcs, cloud: Store, told: pytest.LogCaptureFixture) -> None:
    service.fault("delay", r"step-00000001/.*/state/", seconds=1.5)
    life = begin(cloud)
    life.save(1, wait=False)
    began = time.monotonic()
    life.save(2, wait=False)
    assert time.monotonic() - began > 1.0
    assert "for the checkpoint of step 1 to be stored" in told.text
    assert steps(cloud)[-1] == 1  # committed before the second one began
    life.checkpoints.finish()
    assert steps(cloud) == [2, 1]


def test_without_async_save_a_save_is_committed_on_return(store: Store) -> None:
    begin(store, asynchronous=False).save(3, wait=False)
    assert steps(store) == [3]


def test_what_must_be_durable_with_the_checkpoint_is_so_before_it_is_committed(store: Store) -> None:
    seen = []
    begin(store, before_commit=lambda: seen.append(steps(store))).save(4)
    assert seen == [[]]
    assert steps(store) == [4]


# --- damage ----------------------------------------------------------------------------------------------------------


def files_of_newest(store: Store) -> list[str]:
    newest = committed(store)[0]
    return list(store.names(newest.prefix))


def flip(store: Store, name: str) -> None:
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    store.write(name, bytes(data))


def test_a_flipped_bit_in_any_file_is_seen_and_the_checkpoint_before_is_taken(
    store: Store, told: pytest.LogCaptureFixture
) -> None:
    life = begin(store)
    life.save(1)
    life.save(2)
    names = files_of_newest(store)
    assert {name.rpartition("/")[2] for name in names} >= {"MANIFEST.json", "COMMITTED", "host-00000.json"}
    for name in names:
        sound = store.read(name)
        flip(store, name)
        told.clear()
        assert resume(store) == 1, name
        assert "checkpoint of step 2 is damaged, falling back" in told.text
        assert name.rpartition("/")[2] in told.text
        assert faults_of(committed(store)[0]) != []
        store.write(name, sound)  # a copy with the same bytes counts as the same
        assert faults_of(committed(store)[0]) == []


def test_bits_that_turn_over_unseen_by_the_file_system_are_seen_when_they_are_read(
    disk: Store, told: pytest.LogCaptureFixture
) -> None:
    life = begin(disk)
    life.save(1)
    life.save(2)
    for name in files_of_newest(disk):
        path = Path(disk.url) / name
        sound, facts = path.read_bytes(), path.stat()
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert len(faults_of(committed(disk)[0])) == 1, name
        assert resume(disk) == 1, name
        path.write_bytes(sound)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert resume(disk) == 2


def test_a_missing_file_is_named_and_the_checkpoint_before_is_taken(
    store: Store, told: pytest.LogCaptureFixture
) -> None:
    life = begin(store)
    life.save(1)
    life.save(2)
    (name,) = [name for name in files_of_newest(store) if "/state/" in name]
    store.delete(name)
    assert resume(store) == 1
    assert f"{store.address(name)} is missing" in told.text


def test_where_no_checkpoint_is_sound_the_run_is_refused_and_every_fault_named(store: Store) -> None:
    life = begin(store)
    life.save(1)
    life.save(2)
    shards = [name for name in store.names("checkpoints/") if "/state/" in name]
    for name in shards:
        flip(store, name)
    with pytest.raises(CheckpointError) as refusal:
        drop_unsound(committed(store))
    assert all(store.address(name) in str(refusal.value) for name in shards)
    assert "no sound checkpoint is left" in str(refusal.value)


def test_a_checkpoint_of_another_model_is_refused_with_both_shapes(store: Store) -> None:
    begin(store).save(1)
    with pytest.raises(CheckpointError, match=r"model\.norm is torch\.float32 \[32\] in the checkpoint.*\[33\] in the"):
        begin(store, shapes={"norm": (33,)}).checkpoints.load(committed(store))
    with pytest.raises(CheckpointError, match=r"the model has model\.lora"):
        begin(store, shapes={"lora": (2,)}).checkpoints.load(committed(store))


def test_a_run_folder_may_be_copied(disk: Store, tmp_path: Path) -> None:
    """The copies' times are others, which are a local object's generations: the bytes count."""
    begin(disk).save(5)
    copy = tmp_path / "copy"
    for name in disk.names():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(disk.read(name))
    assert resume(open_store(copy)) == 5


# --- storage that misbehaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pattern", "times"),
    [
        (503, "", 4),
        (429, "/state/", 3),
        ("drop", "PUT .*/state/", 2),
        ("lose_answer", "PUT .*/state/", 2),
        ("lose_answer", "POST .*done/host", 1),
        ("lose_answer", "POST .*MANIFEST.json", 1),
        ("lose_answer", "POST .*COMMITTED", 1),
        ("keep_less", "PUT .*/state/", 2),
        (410, r"PUT .*/state/", 1),
    ],
)
def test_passing_faults_of_the_service_cost_time_only(
    service: Gcs, cloud: Store, kind: int | str, pattern: str, times: int
) -> None:
    life = begin(cloud, shapes={"big": (300, 10_000), "small": (3,)})
    fault = service.fault(kind, pattern, times=times)
    assert life.save(1)
    assert fault.times == 0
    assert steps(cloud) == [1]
    assert faults_of(committed(cloud)[0]) == []


def test_bytes_that_are_damaged_on_their_way_there_never_become_a_checkpoint(service: Gcs, cloud: Store) -> None:
    life = begin(cloud)
    life.save(1)
    service.fault("corrupt_sent", r"step-00000002/.*/state/", times=100)
    with pytest.raises((StorageError, ConfigError), match=r"checkpoint of step 2 .*step-00000002/attempt-1/state/"):
        life.save(2)
    assert resume(cloud) == 1


@pytest.mark.parametrize("kind", ["corrupt", "drop", 503])
def test_bytes_that_are_damaged_on_their_way_back_are_fetched_again(service: Gcs, cloud: Store, kind: str) -> None:
    begin(cloud).save(1)
    fault = service.fault(kind, r"GET .*/state/.*alt=media", times=2)
    assert resume(cloud) == 1
    assert fault.times == 0


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, StorageError, "state/00000-00000.bin"),
        (403, ConfigError, "Storage Object User"),
        (503, StorageError, "state/00000-00000.bin"),
    ],
)
def test_a_lasting_fault_is_raised_at_the_next_save_naming_object_and_cause(
    service: Gcs, running: Gcs, tmp_path: Path, status: int, error: type[Exception], words: str
) -> None:
    cloud = open_store(f"{service.url}/{tmp_path.name}", retry_seconds=2)
    life = begin(cloud)
    life.save(1)
    service.fault(status, "step-00000002", times=10_000)
    assert life.save(2, wait=False)  # begun; what goes wrong is not known yet
    with pytest.raises(error, match=rf"checkpoint of step 2 could not be saved.*{words}") as raised:
        life.save(3)
    assert f"{status}" in str(raised.value) or "injected" in str(raised.value)
    service.clear()
    assert resume(cloud) == 1


def test_an_error_of_the_last_save_is_raised_at_the_end(service: Gcs, tmp_path: Path) -> None:
    cloud = open_store(f"{service.url}/{tmp_path.name}", retry_seconds=2)
    service.fault(503, "MANIFEST", times=10_000)
    life = begin(cloud)
    life.save(1, wait=False)
    with pytest.raises(StorageError, match=r"step 1 could not be saved: .*MANIFEST\.json"):
        life.checkpoints.finish()


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """What this process writes may not be longer than 64 KiB, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_named_and_what_was_committed_stays(
    disk: Store, small_files_only: None, told: pytest.LogCaptureFixture
) -> None:
    life = begin(disk)
    life.save(1)
    big = begin(disk, shapes={"big": (100, 1000)})
    with pytest.raises(StorageError, match=r"step 2 could not be saved: .*/state/00000-00000\.bin: File too large"):
        big.save(2)
    assert resume(disk) == 1
    assert list(Path(disk.url).glob(".store/*.tmp")) == []


# --- the machine goes -------------------------------------------------------------------------------------------------


def test_a_save_that_the_grace_is_too_short_for_is_given_up_whole(
    service: Gcs, cloud: Store, told: pytest.LogCaptureFixture
) -> None:
    gone = [float("inf")]
    life = begin(cloud, remaining=lambda: max(0.0, gone[0] - time.monotonic()))
    life.save(1)
    service.fault("delay", "step-00000002/.*/state/", seconds=5.0)
    life.save(2, wait=False)
    gone[0] = time.monotonic() + 0.5
    began = time.monotonic()
    assert not life.save(3)
    assert time.monotonic() - began < 4.5, "it waited for the request"
    assert "step 2 was given up" in told.text
    assert life.checkpoints.committed_step == 1
    time.sleep(5.5)  # the request that was under way ends, and nothing comes after it
    assert steps(cloud) == [1]


def test_a_save_on_its_way_is_finished_within_the_grace_and_the_newest_state_saved_too(
    service: Gcs, cloud: Store
) -> None:
    gone = [float("inf")]
    life = begin(cloud, remaining=lambda: max(0.0, gone[0] - time.monotonic()))
    service.fault("delay", "step-00000002/.*/state/", seconds=1.0)
    life.save(2, wait=False)
    gone[0] = time.monotonic() + 20
    assert life.save(3)
    assert steps(cloud) == [3, 2]


def test_a_run_that_fails_leaves_its_save_a_little_time(service: Gcs, cloud: Store) -> None:
    service.fault("delay", "/state/", seconds=0.5)
    life = begin(cloud)
    life.save(2, wait=False)
    life.checkpoints.close()
    assert steps(cloud) == [2]


# --- what stays -------------------------------------------------------------------------------------------------------


def test_the_newest_stay_and_the_best_by_evaluation_besides(store: Store) -> None:
    life = begin(store, keep=2)
    losses = {1: 3.0, 2: 1.5, 3: float("nan"), 4: 2.0, 5: 1.6}
    for step in range(1, 7):
        life.save(step)
        if step in losses:
            life.checkpoints.note_evaluation(step, losses[step])
    assert steps(store) == [6, 5, 2]
    later = begin(store, keep=1)
    later.checkpoints.load(committed(store))
    later.save(7)
    assert steps(store) == [7, 2]  # a later life knows the evaluations too


def test_nothing_is_deleted_before_a_newer_one_is_committed(service: Gcs, cloud: Store) -> None:
    life = begin(cloud, keep=1)
    life.save(1)
    service.fault(503, "COMMITTED", times=10_000)
    impatient = open_store(cloud.url, retry_seconds=1)
    with pytest.raises(StorageError):
        begin(impatient, keep=1).save(2)
    assert service.count("^DELETE") == 0
    service.clear()
    assert resume(cloud) == 1


def test_leftovers_of_earlier_lives_go_and_those_of_a_later_one_stay(store: Store) -> None:
    first = begin(store, keep=2)
    first.save(1)
    store.write("checkpoints/step-00000002/attempt-1/state/00000-00000.bin", b"of a life that was killed")
    second = begin(store, keep=2)
    store.write("checkpoints/step-00000009/attempt-3/state/00000-00000.bin", b"of a life that has begun after it")
    open_attempt(store)
    second.save(3)
    assert store.names("checkpoints/step-00000002/") != []  # the second life is not the last one: it touches its own
    third = begin(store, keep=2)
    assert third.attempt == 5
    third.save(4)
    assert store.names("checkpoints/step-00000002/") == []
    assert store.names("checkpoints/step-00000009/") == []
    assert steps(store) == [4, 3]


def test_a_zombie_that_goes_on_writing_harms_nothing(service: Gcs, cloud: Store) -> None:
    """The machine was given up for dead; its process lives on beside the next attempt."""
    zombie = begin(cloud, keep=1)
    zombie.save(1)
    service.fault("delay", r"step-00000005/.*done/host", seconds=2.0)
    zombie.save(5, wait=False)
    time.sleep(1.0)  # its shards are stored
    heir = begin(cloud, keep=1)
    assert heir.checkpoints.load(drop_unsound(committed(cloud))).step == 1
    heir.save(4)  # takes the zombie's files of step 5 for leftovers
    with pytest.raises(StorageError, match="does a later attempt of this run clean up after this one"):
        zombie.checkpoints.finish()
    assert steps(cloud) == [4]
    zombie.save(6)  # it may commit: its state is of the same run
    heir.save(7)
    assert resume(cloud) == 7
    assert faults_of(committed(cloud)[0]) == []


def test_a_dead_writers_unfinished_files_are_swept(disk: Store) -> None:
    life = begin(disk)
    (Path(disk.url) / ".store").mkdir(exist_ok=True)
    left = Path(disk.url) / ".store" / "0123.tmp"
    left.write_bytes(b"half of a shard")
    life.save(1)
    assert not left.exists()
