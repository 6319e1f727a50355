"""``numina-finetune stage``: a model's files into a store and back, whatever goes wrong on the way."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from numina_finetune import cli
from numina_finetune.errors import ConfigError
from numina_finetune.models.builtin import TINY_TOKENIZER, tiny_config
from numina_finetune.models.stage import stage_model
from numina_finetune.models.staged import open_staged
from numina_finetune.models.stream import StoredWeights, fill, staged_weights
from numina_finetune.storage import Store, open_store
from tests.conftest import ROOT, environment
from tests.gcs import Gcs, gcs

SHARDS = "model-0000"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, its weights in several files, with things in it that are not a model's."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    torch.manual_seed(1)
    Qwen3ForCausalLM(tiny_config("tiny-qwen3", tokenizer)).save_pretrained(folder, max_shard_size="2MB")
    tokenizer.save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"no")
    (folder / "optimizer.pt").write_bytes(b"no")
    assert len(list(folder.glob(f"{SHARDS}*"))) >= 3
    return folder


@pytest.fixture(scope="module")
def running() -> Iterator[Gcs]:
    with gcs() as service:
        yield service


@pytest.fixture
def service(running: Gcs) -> Gcs:
    running.clear()
    return running


@pytest.fixture
def bucket(service: Gcs, tmp_path: Path) -> str:
    return f"{service.url}/{tmp_path.name}"


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "staged") if request.param == "disk" else str(request.getfixturevalue("bucket"))


def uploaded(service: Gcs) -> list[str]:
    """The model's files that were sent, once for each time."""
    begun = [request.split()[1] for request in service.requests if re.match(r"POST \S+ .*uploadType=", request)]
    return sorted(name.rpartition("/")[2] for name in begun if not re.search(r"(CLAIM|SOURCE|STAGED)\.json$", name))


def files_of(model: Path) -> list[str]:
    return sorted(path.name for path in model.iterdir() if path.is_file() and path.name != "optimizer.pt")


def assert_comes_back(url: str, model: Path, local: Path) -> None:
    """By its name in the store: weights by ranges, all else as a folder."""
    folder = open_staged(url).download(local)
    names = [name for name in files_of(model) if not name.endswith(".safetensors")]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert AutoTokenizer.from_pretrained(folder)("48/2 = 24")["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(model)
    own = copy.deepcopy(expected).to("meta")
    own.tie_weights()  # moving took them apart
    fill(own, StoredWeights(own, staged_weights(url)))
    assert all(torch.equal(tensor, own.get_parameter(name)) for name, tensor in expected.named_parameters())


def assert_same_model(folder: Path, model: Path) -> None:
    own, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, folder))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert AutoTokenizer.from_pretrained(folder)("48/2 = 24")["input_ids"]


def damage(store: Store, name: str) -> None:
    """Other bytes of the same size, which the store takes for what was written."""
    data = bytearray(store.read(name))
    data[-1] ^= 1
    store.write(name, bytes(data))


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_staged_model_comes_back_by_the_name_that_was_printed(
    place: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(["stage", "--model_name", str(model), "--output_dir", place]) == 0
    name = capsys.readouterr().out.split("--model-name ")[1].strip()
    assert_comes_back(name, model, tmp_path / "local")
    if not name.startswith("gs://"):
        assert_same_model(Path(name), model)


def test_staging_and_downloading_again_moves_nothing(service: Gcs, bucket: str, model: Path, tmp_path: Path) -> None:
    first = stage_model(str(model), None, bucket)
    folder = open_staged(first.url).download(tmp_path / "local")
    assert first.new and uploaded(service) == files_of(model)
    service.clear()
    again = stage_model(str(model), None, bucket)
    assert (again.new, again.url, again.files) == (False, first.url, first.files)
    assert open_staged(first.url).download(tmp_path / "local") == folder
    assert uploaded(service) == [] and service.count(r"alt=media.*safetensors|safetensors.*alt=media") == 0


def test_two_hosts_at_once_upload_every_file_once(service: Gcs, bucket: str, model: Path) -> None:
    service.fault("delay", f"POST .*{SHARDS}", times=2, seconds=1)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: stage_model(str(model), None, bucket, poll_seconds=0.1), range(2)))
    assert sorted(result.new for result in results) == [False, True]
    assert results[0].files == results[1].files
    assert uploaded(service) == files_of(model)
    assert not any(name.endswith("CLAIM.json") for name in open_store(bucket).names())


# --- cut short --------------------------------------------------------------------------------------------------------


def test_staging_that_was_refused_halfway_goes_on_and_until_then_does_not_exist(
    service: Gcs, bucket: str, model: Path, tmp_path: Path
) -> None:
    service.fault(403, f"POST .*{SHARDS}2")
    with pytest.raises(ConfigError, match=f"{SHARDS}2.*may not"):
        stage_model(str(model), None, bucket)
    there = {name.rpartition("/")[2] for name in open_store(bucket).names()}
    with pytest.raises(ConfigError, match="no staged model"):
        open_staged(f"{bucket}/small")
    service.clear()
    assert stage_model(str(model), None, bucket).new
    assert uploaded(service) == sorted(set(files_of(model)) - there)
    assert there & set(files_of(model)), "something had been copied before"
    assert_comes_back(f"{bucket}/small", model, tmp_path / "local")


def test_staging_that_was_killed_is_taken_over(service: Gcs, bucket: str, model: Path, tmp_path: Path) -> None:
    service.fault("delay", f"POST .*{SHARDS}3", seconds=60)
    process = subprocess.Popen(
        [sys.executable, "-m", "numina_finetune", "stage", "--model-name", str(model), "--output-dir", bucket],
        env=environment(**service.environment),
        cwd=ROOT,
    )
    until = time.monotonic() + 120
    while not service.count(f"POST .*{SHARDS}3") and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert open_store(bucket).stat("small/CLAIM.json")
    service.requests.clear()
    began = time.monotonic()
    staged = stage_model(str(model), None, bucket, poll_seconds=0.1, claim_seconds=1.5)
    assert time.monotonic() - began > 1.5, "the claim is respected for as long as its holder may live"
    assert f"{SHARDS}3" in " ".join(uploaded(service)) and "config.json" not in uploaded(service)
    assert_comes_back(staged.url, model, tmp_path / "local")


def test_a_download_that_was_cut_short_goes_on(service: Gcs, bucket: str, model: Path, tmp_path: Path) -> None:
    staged = open_staged(stage_model(str(model), None, bucket).url)
    service.clear()
    service.fault(403, "GET .*tokenizer.json.*alt=media")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        staged.download(tmp_path / "local")
    assert not [path for path in (tmp_path / "local").iterdir() if not path.name.startswith(".")]
    time.sleep(1)  # for the files that were under way
    there = [path.name for path in (tmp_path / "local").glob(".*.partial/[!.]*")]
    assert there
    service.clear()
    staged.download(tmp_path / "local")
    assert [name for name in there if service.count(rf"GET \S*/{name} .*alt=media")] == []
    assert service.count("GET .*tokenizer.json.*alt=media") == 1
    assert_comes_back(staged.store.url, model, tmp_path / "local")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [f"{SHARDS}2", "tokenizer.json"])
def test_bytes_damaged_on_their_way_are_fetched_again(
    service: Gcs, bucket: str, model: Path, tmp_path: Path, what: str
) -> None:
    url = stage_model(str(model), None, bucket).url
    fault = service.fault("corrupt", f"GET .*{what}.*alt=media")
    assert_comes_back(url, model, tmp_path / "local")
    assert fault.times == 0


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_what_is_no_longer_what_was_staged_is_refused_and_staging_again_mends_it(
    place: str, model: Path, tmp_path: Path, how: str
) -> None:
    url = stage_model(str(model), None, place).url
    store = open_store(url)
    (name,) = [name for name in store.names() if name.startswith(f"{SHARDS}2")]
    if how == "damaged":
        damage(store, name)
    else:
        store.delete(name)
    with pytest.raises(ConfigError, match=name) as refused:
        staged_weights(url)
    assert "stage" in str(refused.value)
    assert stage_model(str(model), None, place).new
    assert_comes_back(url, model, tmp_path / "local")


def test_a_copied_place_is_as_good_as_the_first(bucket: str, model: Path, tmp_path: Path) -> None:
    """Object generations differ there; the bytes do not."""
    store = open_store(stage_model(str(model), None, bucket).url)
    elsewhere = open_store(f"{bucket}/elsewhere")
    for name in store.names():
        elsewhere.write(name, store.read(name))
    assert_comes_back(elsewhere.url, model, tmp_path / "local")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_model_in_the_same_place_is_refused(place: str, model: Path, tmp_path: Path) -> None:
    stage_model(str(model), None, place)
    other = tmp_path / "other" / model.name
    shutil.copytree(model, other)
    (other / "config.json").write_text((model / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="another folder"):
        stage_model(str(other), None, place)


def test_a_model_is_never_staged_over_files_that_are_not_staged(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / model.name
    shutil.copytree(model, mine)
    before = {path: path.read_bytes() for path in sorted(mine.rglob("*")) if path.is_file()}
    with pytest.raises(ConfigError, match="were not staged"):
        stage_model(str(mine), None, str(tmp_path))
    assert {path: path.read_bytes() for path in sorted(mine.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("lacking", "said"),
    [("config.json", "no config.json"), ("*.safetensors", "no weights"), ("model-00002*", "model-00002")],
)
def test_what_is_no_whole_model_is_refused(model: Path, tmp_path: Path, lacking: str, said: str) -> None:
    part = tmp_path / "part"
    shutil.copytree(model, part)
    for path in part.glob(lacking):
        path.unlink()
    with pytest.raises(ConfigError, match=said):
        stage_model(str(part), None, str(tmp_path / "staged"))
    with pytest.raises(ConfigError, match="no staged model"):
        open_staged(str(tmp_path / "staged" / "part"))


@pytest.mark.parametrize("name", ["tiny-qwen3", "./absent", "gs://bucket/model"])
def test_what_cannot_be_staged_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(["stage", "--model-name", name, "--output-dir", str(tmp_path / "staged")]) == 2
    assert name in capsys.readouterr().err


# --- from the hub -----------------------------------------------------------------------------------------------------


class Hub:
    """The hub's answers about one model, with what can go wrong on purpose.

    Attributes:
        head: the commit that main points to.
        absent, altered: files that it says it has, and does not give, or gives in other bytes.
        requests: paths that were asked for.
    """

    NAME = "someone/small"

    def __init__(self, model: Path) -> None:
        self.files = {name: (model / name).read_bytes() for name in files_of(model)}
        self.head = "a" * 40
        self.absent: set[str] = set()
        self.altered: set[str] = set()
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        if re.match(rf"/api/models/{self.NAME}(/revision/main)?(\?|$)", path):
            return 200, {}, json.dumps(self._info()).encode()
        found = re.match(rf"/{self.NAME}/resolve/(\w+)/([^?]+)", path)
        if not found:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit, name = found.groups()
        if name not in self.files or name in self.absent:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        data = self.files[name]
        data = data[:-1] + bytes([data[-1] ^ 1]) if name in self.altered else data
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data

    def _info(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": self.NAME, "sha": self.head, "siblings": siblings, "tags": [], "private": False}


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: `Hub.requests` is the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


COMMANDS = """
import contextlib, io, json, sys, traceback
from numina_finetune import cli
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.run_command(json.loads(line))
        except Exception:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
"""The command line in a process that knows its hub from the start: one command a line, code and output back."""


@contextmanager
def commands(endpoint: str, home: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS],
        env=environment(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(home)),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        assert process.stdin and process.stdout
        print(json.dumps(arguments), file=process.stdin, flush=True)
        code, out, err = json.loads(process.stdout.readline())
        return code, out, err

    with process:
        yield run
        assert process.stdin
        process.stdin.close()


def test_a_hub_model_is_staged_from_one_commit_checked_and_never_asked_for_again(
    bucket: str, model: Path, tmp_path: Path
) -> None:
    hub = Hub(model)
    weights = next(name for name in hub.files if name.startswith(f"{SHARDS}2"))
    with serving(hub) as endpoint, commands(endpoint, tmp_path / "hf") as run:
        code, _, err = run("stage", "--model-name", "someone/else", "--output-dir", bucket)
        assert code == 2
        assert "someone/else was not found" in err

        command = ("stage", "--model-name", Hub.NAME, "--output-dir", bucket)
        hub.altered = {weights}
        code, _, err = run(*command)
        assert code == 1
        assert weights in err and "sha256" in err

        hub.altered, hub.absent = set(), {weights}
        code, _, err = run(*command)
        assert code == 2, err
        assert weights in err

        hub.absent, hub.head = set(), "c" * 40  # the hub has moved on meanwhile
        hub.requests.clear()
        code, out, err = run(*command)
        assert code == 0, err
        resolved = [path for path in hub.requests if "/resolve/" in path]
        assert resolved and all(f"/resolve/{'a' * 40}/" in path for path in resolved)
        assert not any("config.json" in path for path in resolved), "what was there already is not fetched again"

        hub.requests.clear()
        code, again, _ = run(*command)
        assert code == 0 and "nothing to do" in again
        assert hub.requests == []
    url = out.split("--model-name ")[1].split()[0]
    assert url == f"{bucket}/someone--small"
    assert_comes_back(url, model, tmp_path / "local")
