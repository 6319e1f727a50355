"""One builds, the others copy: with real processes, killed and stopped, over a folder and over Cloud Storage."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from numina_finetune.config import SourceConfig
from numina_finetune.data.dataset import IndexOptions, build_index
from numina_finetune.data.shared_cache import fetch_or_build
from numina_finetune.data.token_index import open_index
from numina_finetune.errors import DataError
from numina_finetune.storage import Store, open_store
from tests.conftest import ROOT, environment
from tests.gcs import Gcs, gcs

KEY = "0123abcd"
WORKER = """
import os, sys, time
from pathlib import Path
from numina_finetune.data.shared_cache import fetch_or_build

url, local, builds, build_seconds, claim_seconds = sys.argv[1:]

def build(folder):
    with open(builds, "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(float(build_seconds))
    (folder / "parts").mkdir(parents=True)
    # Never the same twice: equal folders have one builder.
    (folder / "tokens.npy").write_bytes(os.urandom(3_000_000))
    (folder / "parts" / "Größe.json").write_text(f"{os.getpid()}")
    (folder / "empty").write_bytes(b"")

fetch_or_build(url, "0123abcd", Path(local), build, poll_seconds=0.05, claim_seconds=float(claim_seconds))
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Gcs]:
    with gcs() as service:
        yield service


@pytest.fixture
def service(running: Gcs) -> Gcs:
    running.clear()
    return running


@pytest.fixture
def cloud(service: Gcs, tmp_path: Path) -> str:
    return f"{service.url}/{tmp_path.name}/cache"


@pytest.fixture(params=["local", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("cloud"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process with a local folder of its own; those still there at the end are killed."""
    started: list[subprocess.Popen[bytes]] = []

    def go(url: str, name: str, *, build_seconds: float = 0.5, claim_seconds: float = 30) -> subprocess.Popen[bytes]:
        arguments = [url, str(tmp_path / name), str(tmp_path / "builds"), str(build_seconds), str(claim_seconds)]
        process = subprocess.Popen([sys.executable, "-c", WORKER, *arguments], env=environment(), cwd=ROOT)
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.wait()


def builders(tmp_path: Path) -> list[int]:
    log = tmp_path / "builds"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build_small(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokens.npy").write_bytes(b"tokens")
    (folder / "report.json").write_bytes(b"{}")


def never(folder: Path) -> None:
    raise AssertionError("there is nothing to build")


def commit_by_hand(store: Store, path: str = "tokens.npy") -> None:
    """What another builder leaves."""
    entry = store.write(f"{KEY}/other/tokens.npy", b"theirs")
    line = {"path": path, "object": entry.name, "size": entry.size, "crc32c": entry.crc32c}
    manifest = {"files": [{**line, "generation": entry.generation}]}
    store.write(f"{KEY}/COMMITTED", json.dumps(manifest).encode(), if_generation=0)


def names(store: Store) -> list[str]:
    """What lies in the store, builders' own folders without their names."""
    return sorted(entry.name.rpartition("/")[2] for entry in store.list(f"{KEY}/"))


def test_of_processes_at_once_one_builds_and_all_have_its_folder(
    url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    processes = [start(url, f"host-{number}") for number in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(builders(tmp_path)) == 1
    folders = [contents(tmp_path / f"host-{number}" / KEY) for number in range(3)]
    assert folders[0] == folders[1] == folders[2]
    assert set(folders[0]) == {"tokens.npy", "parts/Größe.json", "empty"}
    assert names(open_store(url)) == ["COMMITTED", "Größe.json", "empty", "tokens.npy"], "the claim is gone"
    assert [path.name for path in (tmp_path / "host-0").iterdir()] == [KEY], "nothing unfinished stays"


def test_a_killed_builders_work_is_taken_over(
    url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    doomed = start(url, "doomed", build_seconds=600, claim_seconds=1)
    until(lambda: builders(tmp_path))
    waiting = start(url, "waiting", claim_seconds=1)
    time.sleep(1.5)
    assert builders(tmp_path) == [doomed.pid], "a builder that lives keeps its claim, however long it builds"
    doomed.send_signal(signal.SIGKILL)
    assert waiting.wait(60) == 0
    assert builders(tmp_path) == [doomed.pid, waiting.pid]
    assert not (tmp_path / "doomed" / KEY).exists()
    late = fetch_or_build(url, KEY, tmp_path / "late", never)
    assert contents(late) == contents(tmp_path / "waiting" / KEY)


def test_a_builder_that_wakes_up_too_late_takes_the_others_folder(
    cloud: str, service: Gcs, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    asleep = start(cloud, "asleep", build_seconds=1, claim_seconds=1)
    until(lambda: builders(tmp_path))
    asleep.send_signal(signal.SIGSTOP)
    awake = start(cloud, "awake", build_seconds=0, claim_seconds=1)
    assert awake.wait(60) == 0
    committed = open_store(cloud).stat(f"{KEY}/COMMITTED")
    asleep.send_signal(signal.SIGCONT)
    assert asleep.wait(60) == 0
    assert builders(tmp_path) == [asleep.pid, awake.pid]
    assert contents(tmp_path / "asleep" / KEY) == contents(tmp_path / "awake" / KEY)
    assert open_store(cloud).stat(f"{KEY}/COMMITTED") == committed
    assert service.count("^POST .*tokens.npy") == 1, "what is there already is not sent again"
    assert names(open_store(cloud)) == ["COMMITTED", "Größe.json", "empty", "tokens.npy"]


def test_of_two_that_commit_at_once_the_second_takes_the_firsts_folder(
    cloud: str, service: Gcs, tmp_path: Path
) -> None:
    def build(folder: Path) -> None:
        build_small(folder)
        # Between this builder's last look at COMMITTED and its own, another commits.
        service.fault("delay", f"^POST .*{KEY}/COMMITTED ", seconds=1.0)
        overtaking.start()

    def overtake() -> None:
        until(lambda: service.count(f"^POST .*{KEY}/COMMITTED "))
        commit_by_hand(open_store(cloud))

    overtaking = threading.Thread(target=overtake)
    folder = fetch_or_build(cloud, KEY, tmp_path / "local", build)
    overtaking.join()
    assert contents(folder) == {"tokens.npy": b"theirs"}
    assert names(open_store(cloud)) == ["COMMITTED", "tokens.npy"]


def test_a_commit_between_two_looks_is_not_built_again(cloud: str, service: Gcs, tmp_path: Path) -> None:
    """COMMITTED is not there yet; then CLAIM is not there any more."""
    service.fault("delay", f"^GET .*{KEY}/CLAIM ", seconds=1.0)

    def commit() -> None:
        until(lambda: service.count(f"^GET .*{KEY}/CLAIM "))
        commit_by_hand(open_store(cloud))

    committing = threading.Thread(target=commit)
    committing.start()
    folder = fetch_or_build(cloud, KEY, tmp_path / "local", never)
    committing.join()
    assert contents(folder) == {"tokens.npy": b"theirs"}
    assert names(open_store(cloud)) == ["COMMITTED", "tokens.npy"]


def test_a_committed_folder_is_copied_and_a_local_one_is_not_even_asked_for(
    cloud: str, service: Gcs, tmp_path: Path
) -> None:
    built = fetch_or_build(cloud, KEY, tmp_path / "a", build_small)
    copied = fetch_or_build(cloud, KEY, tmp_path / "b", never)
    assert contents(copied) == contents(built) == {"tokens.npy": b"tokens", "report.json": b"{}"}
    service.clear()
    assert fetch_or_build(cloud, KEY, tmp_path / "b", never) == tmp_path / "b" / KEY
    assert service.requests == []


def test_a_build_that_fails_frees_its_claim(url: str, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"1")
        raise DataError("no row can be trained on")

    with pytest.raises(DataError, match="no row"):
        fetch_or_build(url, KEY, tmp_path / "a", fail)
    assert names(open_store(url)) == []
    assert list((tmp_path / "a").iterdir()) == []
    fetch_or_build(url, KEY, tmp_path / "b", build_small)  # would wait for two minutes otherwise


def test_faults_on_the_way_up_cost_no_second_build(cloud: str, service: Gcs, tmp_path: Path) -> None:
    faults = [
        service.fault("lose_answer", f"^POST .*{KEY}/CLAIM "),
        service.fault(503, "^POST .*tokens.npy "),
        service.fault("drop", "^POST .*report.json "),
        service.fault("lose_answer", f"^POST .*{KEY}/COMMITTED "),
    ]
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        build_small(folder)

    built = fetch_or_build(cloud, KEY, tmp_path / "a", build)
    assert [fault.times for fault in faults] == [0, 0, 0, 0]
    assert len(calls) == 1
    assert contents(fetch_or_build(cloud, KEY, tmp_path / "b", never)) == contents(built)
    assert names(open_store(cloud)) == ["COMMITTED", "report.json", "tokens.npy"]


def test_leftovers_of_a_dead_builder_are_cleared_by_the_next_commit(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    store.write(f"{KEY}/dead/tokens.npy", b"half")
    store.write(f"{KEY}-other/tokens.npy", b"another key's")
    fetch_or_build(url, KEY, tmp_path / "a", build_small)
    assert names(store) == ["COMMITTED", "report.json", "tokens.npy"]
    assert store.stat(f"{KEY}/dead/tokens.npy") is None
    assert store.read(f"{KEY}-other/tokens.npy") == b"another key's"


def test_a_damaged_object_is_named_with_the_way_out(cloud: str, service: Gcs, tmp_path: Path) -> None:
    fetch_or_build(cloud, KEY, tmp_path / "a", build_small)
    service.fault("corrupt", "^GET .*tokens.npy.*alt=media")
    with pytest.raises(DataError, match=rf"{KEY}/\w+/tokens\.npy .*crc32c.*delete {cloud}/{KEY}/"):
        fetch_or_build(cloud, KEY, tmp_path / "b", never)
    assert list((tmp_path / "b").iterdir()) == []


def test_objects_that_are_gone_or_replaced_are_all_named(url: str, tmp_path: Path) -> None:
    fetch_or_build(url, KEY, tmp_path / "a", build_small)
    store = open_store(url)
    for entry in store.list(f"{KEY}/"):
        if entry.name.endswith("tokens.npy"):
            store.delete(entry.name)
        elif entry.name.endswith("report.json"):
            store.write(entry.name, b"{}")
    with pytest.raises(DataError) as caught:
        fetch_or_build(url, KEY, tmp_path / "b", never)
    assert ["tokens.npy" in problem or "report.json" in problem for problem in caught.value.problems] == [True, True]


@pytest.mark.parametrize("marker", [b"", b"{}", b'{"files": [{"path": "../../x"}]}', b"[1]"])
def test_a_damaged_marker_is_named_with_the_way_out(tmp_path: Path, marker: bytes) -> None:
    open_store(tmp_path / "store").write(f"{KEY}/COMMITTED", marker)
    with pytest.raises(DataError, match=rf"{KEY}/COMMITTED is damaged.*delete "):
        fetch_or_build(str(tmp_path / "store"), KEY, tmp_path / "b", never)


def test_a_file_never_lands_outside_the_folder(tmp_path: Path) -> None:
    commit_by_hand(open_store(tmp_path / "store"), path="../../outside")
    with pytest.raises(DataError, match="damaged"):
        fetch_or_build(str(tmp_path / "store"), KEY, tmp_path / "b", never)


def test_who_waits_says_for_what(
    cloud: str, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    builder = start(cloud, "a", build_seconds=1.5)
    until(lambda: builders(tmp_path))
    with caplog.at_level(logging.INFO, logger="numina_finetune"):
        fetch_or_build(cloud, KEY, tmp_path / "b", never, poll_seconds=0.05)
    assert caplog.messages == [f"{cloud}/{KEY}/CLAIM is another process's: waiting for it"]
    assert builder.wait(30) == 0


def test_a_token_index_comes_through_with_its_data_key(
    cloud: str, tmp_path: Path, tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"question": f"{number}+1?", "answer": str(number + 1)} for number in range(40)]
    source = SourceConfig(name=str(write_jsonl("rows.jsonl", rows)), format="qa")
    index = build_index([source], tiny, IndexOptions(max_seq_length=256), tmp_path / "index")
    folder = next((tmp_path / "index").glob("*/report.json")).parent
    fetch_or_build(cloud, folder.name, tmp_path / "a", lambda target: shutil.copytree(folder, target))
    copied = open_index(fetch_or_build(cloud, folder.name, tmp_path / "b", never))
    assert copied.data_key == index.data_key
    assert (copied.input_ids == index.input_ids).all()
    assert len(copied) == len(index) == 40


def test_stopping_the_builder_by_hand_frees_its_claim(
    cloud: str, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    builder = start(cloud, "a", build_seconds=600)
    until(lambda: builders(tmp_path))
    os.kill(builder.pid, signal.SIGINT)
    assert builder.wait(30) != 0
    assert open_store(cloud).list() == []
