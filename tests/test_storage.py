"""One set of promises, kept by local folders and by Cloud Storage; and what each must withstand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.api_core import exceptions as api
from google.cloud import storage as google_storage

from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.storage import (
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
    Store,
    crc32c,
    open_store,
)
from tests.conftest import ROOT, environment
from tests.gcs import BUCKET, Gcs, gcs

MIB = 1 << 20


@pytest.fixture(scope="module")
def running() -> Iterator[Gcs]:
    with gcs() as service:
        yield service


@pytest.fixture
def service(running: Gcs) -> Gcs:
    running.clear()
    return running


@pytest.fixture(params=["local", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('service').url}/{tmp_path.name}"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url, chunk_bytes=MIB, retry_seconds=20)


@pytest.fixture
def cloud(service: Gcs, tmp_path: Path) -> Store:
    return open_store(f"{service.url}/{tmp_path.name}", chunk_bytes=MIB, retry_seconds=20)


@pytest.fixture
def damage(store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Changes a bit of what the object's next reader gets."""

    def in_the_cloud(name: str) -> None:
        request.getfixturevalue("service").fault("corrupt", f"GET .*{name}.*alt=media")

    def on_disk(name: str) -> None:
        path = tmp_path / "store" / name
        before = path.stat()
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return in_the_cloud if store.url.startswith("gs://") else on_disk


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(20 * MIB + 17))
    return path


# What every store promises


def test_what_was_written_is_read_whole_and_in_parts(store: Store) -> None:
    data = bytes(range(256)) * 10 + b"\r\n\n"
    entry = store.write("a/b", data)
    assert store.read("a/b") == data
    assert store.read("a/b", start=3, end=10) == data[3:10]
    assert store.read("a/b", start=2000) == data[2000:]
    assert store.read("a/b", start=9999, end=10000) == b""
    assert store.read("a/b", start=7, end=7) == b""
    assert store.stat("a/b") == entry
    assert (entry.name, entry.size) == ("a/b", len(data))


def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    assert store.write("empty", b"").crc32c == "00000000"
    assert store.read("empty") == b""
    store.download("empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_list_has_the_names_with_the_prefix_in_order(store: Store, url: str) -> None:
    names = ["run/b", "run/a/2", "run/a/10", "runner", "x", "run.txt"]
    for name in names:
        store.write(name, name.encode())
    assert [entry.name for entry in store.list()] == sorted(names)
    assert [entry.name for entry in store.list("run/")] == ["run/a/10", "run/a/2", "run/b"]
    assert [entry.name for entry in store.list("run/a/1")] == ["run/a/10"]
    assert store.list("none/") == []
    assert [entry.name for entry in open_store(f"{url}/run").list()] == ["a/10", "a/2", "b"]
    assert all(entry == store.stat(entry.name) for entry in store.list())


def test_names_may_be_in_any_script(store: Store) -> None:
    for name in ("données/été #1?.json", "数学/题 ∑%20+&.npy"):
        store.write(name, name.encode(), if_generation=0)
        assert store.read(name) == name.encode()
    assert {entry.name for entry in store.list("数学/")} == {"数学/题 ∑%20+&.npy"}


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/", "../a", "a/./b", "a\0b"])
def test_names_that_would_leave_the_place_are_refused(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="no object name"):
        store.write(name, b"")


def test_an_object_that_is_not_there_is_told_by_its_address(store: Store, tmp_path: Path) -> None:
    store.write("other", b"")
    assert store.stat("none") is None
    for ask in (store.read, lambda name: store.download(name, tmp_path / "copy")):
        with pytest.raises(NotFound, match=r"/none: no such object"):
            ask("none")
    assert not (tmp_path / "copy").exists()


def test_deleting_is_for_good_and_twice_is_fine(store: Store) -> None:
    store.write("a/b/c", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert store.stat("a/b/c") is None
    assert store.list() == []


def test_every_write_is_a_new_generation_even_of_the_same_bytes(store: Store) -> None:
    generations = [store.write("same", b"same").generation for _ in range(5)]
    assert len(set(generations)) == 5
    assert min(generations) > 0


def test_a_bound_write_replaces_only_what_it_names(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    first = store.write("name", b"first", if_generation=0)
    for attempt in (0, first.generation + 1):
        with pytest.raises(PreconditionFailed, match="/name"):
            store.write("name", b"other", if_generation=attempt)
        with pytest.raises(PreconditionFailed, match="/name"):
            store.upload(tmp_path / "file", "name", if_generation=attempt)
    assert store.read("name") == b"first"
    second = store.upload(tmp_path / "file", "name", if_generation=first.generation)
    assert store.read("name") == b"from a file"
    with pytest.raises(PreconditionFailed):
        store.write("absent", b"", if_generation=second.generation)


def test_a_bound_delete_leaves_what_it_does_not_name(store: Store) -> None:
    first = store.write("name", b"1")
    second = store.write("name", b"2")
    with pytest.raises(PreconditionFailed):
        store.delete("name", if_generation=first.generation)
    assert store.read("name") == b"2"
    store.delete("name", if_generation=second.generation)
    assert store.stat("name") is None
    store.write("name", b"3", if_generation=0)


def test_a_reader_of_a_generation_never_gets_another(store: Store, tmp_path: Path) -> None:
    first = store.write("name", b"1")
    assert store.read("name", generation=first.generation) == b"1"
    store.write("name", b"2")
    assert store.stat("name", generation=first.generation) is None
    with pytest.raises(NotFound, match="of generation"):
        store.read("name", generation=first.generation)
    with pytest.raises(NotFound, match="of generation"):
        store.download("name", tmp_path / "copy", generation=first.generation)


def test_of_writers_at_once_for_a_free_name_exactly_one_wins(url: str) -> None:
    writers = 8
    together = threading.Barrier(writers)
    stores = [open_store(url) for _ in range(writers)]

    def claim(number: int) -> bool:
        together.wait()
        try:
            stores[number].write("claim", str(number).encode(), if_generation=0)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(writers) as pool:
        winners = [number for number, won in enumerate(pool.map(claim, range(writers))) if won]
    assert len(winners) == 1
    assert stores[0].read("claim") == str(winners[0]).encode()


def test_bound_writes_lose_no_update(url: str) -> None:
    open_store(url).write("count", b"0")

    def add(_: int) -> None:
        store, added = open_store(url), 0
        while added < 10:
            entry = store.stat("count")
            assert entry
            try:
                count = int(store.read("count", generation=entry.generation))
                store.write("count", str(count + 1).encode(), if_generation=entry.generation)
                added += 1
            except (PreconditionFailed, NotFound):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert open_store(url).read("count") == b"40"


def test_a_large_file_goes_up_and_comes_down_whole(store: Store, large: Path, tmp_path: Path) -> None:
    entry = store.upload(large, "large", if_generation=0)
    assert (entry.size, entry.crc32c) == (large.stat().st_size, crc32c(large))
    assert store.download("large", tmp_path / "deep" / "copy") == entry
    assert (tmp_path / "deep" / "copy").read_bytes() == large.read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]


def test_a_damaged_object_is_refused_and_the_old_file_stays(
    store: Store, damage: Callable[[str], None], tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    target.write_bytes(b"old")
    store.write("name", b"the content")
    damage("name")
    with pytest.raises(Damaged, match=r"/name .*crc32c"):
        store.download("name", target)
    assert target.read_bytes() == b"old"


def test_a_damaged_object_is_not_read(store: Store, damage: Callable[[str], None]) -> None:
    store.write("name", b"the content")
    damage("name")
    with pytest.raises(Damaged, match="/name"):
        store.read("name")


# Local folders


def test_a_folder_holds_plain_files_and_shows_those_put_there_by_hand(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("a/b.txt", b"written")
    assert (tmp_path / "a/b.txt").read_bytes() == b"written"
    (tmp_path / "a/c.txt").write_bytes(b"by hand")
    by_hand = store.stat("a/c.txt")
    assert by_hand
    assert by_hand.crc32c == crc32c(tmp_path / "a/c.txt")
    assert [entry.name for entry in store.list("a/")] == ["a/b.txt", "a/c.txt"]
    store.write("a/c.txt", b"replaced", if_generation=by_hand.generation)


def test_reading_makes_no_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path / "none")
    assert (store.list(), store.stat("a")) == ([], None)
    assert not (tmp_path / "none").exists()


def test_a_killed_writer_leaves_no_object_and_no_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    script = "import sys; from numina_finetune.storage import *; from pathlib import Path\n"
    script += "open_store(sys.argv[1]).upload(Path(sys.argv[2]), 'name')"
    arguments = [sys.executable, "-c", script, str(tmp_path / "store"), str(tmp_path / "pipe")]
    writer = subprocess.Popen(arguments, env=environment(), cwd=ROOT)
    with (tmp_path / "pipe").open("wb") as pipe:
        pipe.write(bytes(5 * MIB))
        pipe.flush()
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(30) == -signal.SIGKILL
    store = open_store(tmp_path / "store")
    assert store.list() == []
    store.write("name", b"next", if_generation=0)


def test_a_folder_that_cannot_be_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="another folder"):
        open_store(tmp_path / "file" / "below").write("name", b"")


# Cloud Storage


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://", "gs:///x", "gs://-bucket/x"])
def test_a_place_of_no_known_kind_is_refused(service: Gcs, url: str) -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/prefix|'-bucket' is no bucket name"):
        open_store(url)


def test_a_long_upload_and_download_go_in_pieces(cloud: Store, service: Gcs, large: Path, tmp_path: Path) -> None:
    cloud.upload(large, "large")
    cloud.download("large", tmp_path / "copy")
    assert service.count(r"^PUT .*/large .*upload_id") == 21
    assert service.count(r"^GET .*/large .*alt=media") == 21


@pytest.mark.parametrize("fault", ["lose_answer", "drop", 503, 429])
def test_a_bound_write_survives_faults_and_knows_its_own_work(cloud: Store, service: Gcs, fault: int | str) -> None:
    injected = service.fault(fault, "^POST .*/name ")
    entry = cloud.write("name", b"mine", if_generation=0)
    assert injected.times == 0
    assert cloud.stat("name") == entry
    assert cloud.read("name") == b"mine"


def test_a_lost_answer_does_not_hide_that_another_was_first(cloud: Store, service: Gcs) -> None:
    cloud.write("name", b"theirs")
    service.fault("lose_answer", "^POST .*/name ")
    with pytest.raises(PreconditionFailed):
        cloud.write("name", b"theirs", if_generation=0)  # even with the very same bytes


@pytest.mark.parametrize("fault", ["lose_answer", "drop", 503])
def test_a_long_upload_goes_on_after_faults_in_its_midst_and_at_its_end(
    cloud: Store, service: Gcs, large: Path, tmp_path: Path, fault: int | str
) -> None:
    size = large.stat().st_size
    chunks = [service.fault(fault, rf"^PUT .*/large .*bytes {start}-\d+/{size}$") for start in (5 * MIB, 20 * MIB)]
    cloud.upload(large, "large", if_generation=0)
    assert [chunk.times for chunk in chunks] == [0, 0]
    cloud.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert service.count("^POST .*uploadType=resumable") == 1


@pytest.mark.parametrize("fault", [404, 410, "keep_less"])
def test_an_upload_that_cannot_go_on_begins_anew(
    cloud: Store, service: Gcs, large: Path, tmp_path: Path, fault: int | str
) -> None:
    service.fault(fault, rf"^PUT .*/large .*bytes {5 * MIB}-")
    cloud.upload(large, "large", if_generation=0)
    cloud.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert service.count("^POST .*uploadType=resumable") == 2


def test_bytes_damaged_on_the_way_up_never_become_an_object(cloud: Store, service: Gcs, large: Path) -> None:
    service.fault("corrupt_sent", "^PUT .*/large .*upload_id")
    with pytest.raises(StorageError, match=r"(?i)crc32c"):
        cloud.upload(large, "large")
    assert cloud.stat("large") is None


def test_reading_and_deleting_survive_faults(cloud: Store, service: Gcs) -> None:
    entry = cloud.write("name", b"content")
    for fault in (503, "drop", "lose_answer"):
        service.fault(fault, "^GET .*/name .*alt=media")
        assert cloud.read("name") == b"content"
    service.fault(503, "^GET .*prefix=")
    assert cloud.list() == [entry]
    service.fault("lose_answer", "^DELETE")
    cloud.delete("name", if_generation=entry.generation)
    assert cloud.list() == []


def test_a_missing_bucket_is_the_users_to_mend(service: Gcs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    store = open_store("gs://no-such-bucket/prefix")
    asked: list[Callable[[], object]] = [
        lambda: store.stat("a"),
        lambda: store.list(),
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.upload(tmp_path / "file", "a", if_generation=0),
        lambda: store.delete("a"),
    ]
    for ask in asked:
        with pytest.raises(ConfigError, match=r"no bucket 'no-such-bucket'.*buckets create") as caught:
            ask()
        assert caught.value.exit_code == ExitCode.CONFIGURATION


def test_a_refused_account_is_the_users_to_mend(cloud: Store, service: Gcs) -> None:
    service.fault(403, times=2)
    for ask in (cloud.stat, cloud.read):
        with pytest.raises(ConfigError, match="role Storage Object User"):
            ask("name")


def test_faults_that_last_are_no_configuration_error(service: Gcs, tmp_path: Path) -> None:
    store = open_store(f"{service.url}/{tmp_path.name}", retry_seconds=1)
    service.fault(503, times=10**6)
    with pytest.raises(StorageUnavailable, match=rf"{tmp_path.name}/name"):
        store.write("name", b"", if_generation=0)


# The stand-in itself: what Google's own library expects of the service


def test_the_stand_in_enforces_generations_for_googles_library(service: Gcs, tmp_path: Path, large: Path) -> None:
    bucket = google_storage.Client.create_anonymous_client().bucket(BUCKET)
    blob = bucket.blob(f"{tmp_path.name}/raw")
    blob.upload_from_string(b"1", if_generation_match=0)
    for refused in (
        lambda: bucket.blob(blob.name).upload_from_string(b"2", if_generation_match=0),
        lambda: bucket.blob(blob.name).upload_from_filename(large, if_generation_match=0),
        lambda: bucket.blob(blob.name).delete(if_generation_match=blob.generation + 1),
        lambda: bucket.blob(blob.name).download_as_bytes(if_generation_match=blob.generation + 1),
    ):
        with pytest.raises(api.PreconditionFailed, match="pre-conditions"):
            refused()
    with pytest.raises(api.NotFound, match="No such object"):
        bucket.blob(blob.name, generation=blob.generation + 1).download_as_bytes()
    assert bucket.blob(blob.name).download_as_bytes(if_generation_match=blob.generation) == b"1"


def test_the_stand_in_checks_a_long_uploads_generation_at_its_end_too(service: Gcs, tmp_path: Path) -> None:
    bucket = google_storage.Client.create_anonymous_client().bucket(BUCKET)
    slow = bucket.blob(f"{tmp_path.name}/raw", chunk_size=MIB)
    waiting = service.fault("delay", "^PUT .*/raw .*upload_id", seconds=1.0)
    with ThreadPoolExecutor(1) as pool, (tmp_path / "file").open("w+b") as file:
        file.write(bytes(9 * MIB))
        file.seek(0)
        uploading = pool.submit(slow.upload_from_file, file, size=9 * MIB, if_generation_match=0)
        while waiting.times:
            pass
        bucket.blob(slow.name).upload_from_string(b"faster", if_generation_match=0)
        with pytest.raises(api.PreconditionFailed):
            uploading.result()
    assert bucket.blob(slow.name).download_as_bytes() == b"faster"
