"""``checkpoints list | verify | prune`` and ``export``, on a real run's checkpoints, on disk and in a bucket."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from numina_finetune import cli
from numina_finetune.checkpoint.attempts import open_attempt
from numina_finetune.storage import Store, open_store
from tests.conftest import environment, train
from tests.gcs import Gcs, gcs

pytestmark = pytest.mark.usefixtures("running", "native_here")
STEPS = (2, 4, 6, 8)
SHARDS = "state/00000-00000.bin"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on four devices with four evaluated checkpoints, of which the last is not the best."""
    run = train(
        tmp_path_factory.mktemp("trained") / "out",
        *("--run-id", "mine", "--max-steps", "8", "--save-steps", "2", "--save-total-limit", "9"),
        *("--validation-size", "8", "--eval-steps", "2", "--logging-steps", "1", "--mesh", "fsdp=2,tensor=2"),
        *("--learning-rate", "0.1", "--lr-scheduler-type", "constant"),  # the loss rises again
        env=environment(devices=4),
    )
    assert run.code == 0, run.output
    return run.run


@pytest.fixture(scope="module")
def running() -> Iterator[Gcs]:
    with gcs() as service:
        yield service


@pytest.fixture
def on_disk(trained: Path, tmp_path: Path) -> Store:
    shutil.copytree(trained, tmp_path / "out" / "mine")
    return open_store(tmp_path / "out" / "mine")


@pytest.fixture(params=["disk", "cloud"])
def run(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Store:
    """A copy of the run's place."""
    if request.param == "disk":
        store: Store = request.getfixturevalue("on_disk")
        return store
    service: Gcs = request.getfixturevalue("running")
    service.clear()
    cloud, disk = open_store(f"{service.url}/{tmp_path.name}/mine", retry_seconds=10), open_store(trained)
    for name in disk.names():
        cloud.write(name, disk.read(name))
    return cloud


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in this process."""

    def run_command(*arguments: str) -> Answer:
        capsys.readouterr()
        code = cli.run_command(arguments)
        return Answer(code, *capsys.readouterr())

    return run_command


def name_of(step: int, file: str) -> str:
    return f"checkpoints/step-{step:08d}/attempt-1/{file}"


def flip_a_bit(store: Store, name: str) -> None:
    """Damage the object; on a disk so that nothing but its bytes tells."""
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    if store.url.startswith("gs://"):
        store.write(name, bytes(data))
        return
    path = Path(store.url) / name
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def listed(ask: Callable[..., Answer], url: str) -> dict[int, dict[str, Any]]:
    answer = ask("checkpoints", "list", url, "--json")
    assert answer.code == 0, answer.err
    (run,) = json.loads(answer.out)
    return {row["step"]: row for row in run["checkpoints"]}


def age(store: Store, *names: str) -> None:
    """Make it two hours since the files were written."""
    for name in names:
        then = time.time() - 7200
        os.utime(Path(store.url) / name, (then, then))


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_tells_what_is_there_and_which_is_the_newest_and_the_best(
    run: Store, ask: Callable[..., Answer], trained: Path
) -> None:
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert best != STEPS[-1], "else the test shows nothing"
    rows = listed(ask, run.url)
    assert list(rows) == sorted(STEPS, reverse=True)
    for step, row in rows.items():
        files = run.list(name_of(step, ""))
        assert row["bytes"] == sum(entry.size for entry in files)
        assert (row["attempt"], row["state"], row["faults"]) == (1, "committed", [])
        assert row["mesh"] == {"dcn": 1, "data": 1, "fsdp": 2, "expert": 1, "tensor": 2}
        assert row["evaluation_loss"] == losses[step]
        assert (row["newest"], row["best"]) == (step == STEPS[-1], step == best)
    table = ask("checkpoints", "list", run.url).out.splitlines()
    assert table[0] == run.url
    assert "fsdp=2,tensor=2" in table[2] and table[2].endswith("newest")
    assert next(line for line in table if line.endswith("best")).split()[0] == str(best)


def test_list_tells_leftovers_and_damage_from_checkpoints(run: Store, ask: Callable[..., Answer]) -> None:
    run.delete(name_of(8, "COMMITTED"))
    run.delete(name_of(6, SHARDS))
    rows = listed(ask, run.url)
    assert {step: row["state"] for step, row in rows.items()} == {
        **{8: "leftover", 6: "damaged"},
        **{4: "committed", 2: "committed"},
    }
    assert rows[4]["newest"]
    assert run.address(name_of(6, SHARDS)) in rows[6]["faults"][0]
    assert run.address(name_of(6, SHARDS)) in ask("checkpoints", "list", run.url).out


def test_list_of_a_place_with_several_runs_tells_of_each(on_disk: Store, ask: Callable[..., Answer]) -> None:
    mine = Path(on_disk.url)
    shutil.copytree(mine, mine.parent / "other")
    (mine.parent / "notes").mkdir()
    answer = ask("checkpoints", "list", str(mine.parent), "--json")
    assert [run["run"] for run in json.loads(answer.out)] == [str(mine), str(mine.parent / "other")]
    for command in (["verify"], ["prune", "--keep", "1"]):
        refused = ask("checkpoints", command[0], str(mine.parent), *command[1:])
        assert refused.code == 2
        assert f"{mine}, {mine.parent / 'other'}" in refused.err


def test_a_place_without_a_run_is_refused(tmp_path: Path, ask: Callable[..., Answer]) -> None:
    for place in (str(tmp_path), str(tmp_path / "absent"), "s3://bucket/run"):
        answer = ask("checkpoints", "list", place)
        assert answer.code == 2
        assert place in answer.err


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_all_sound(run: Store, ask: Callable[..., Answer]) -> None:
    answer = ask("checkpoints", "verify", run.url)
    assert answer.code == 0
    assert answer.out.count("sound") == len(STEPS)


@pytest.mark.parametrize(
    "file", [SHARDS, "done/host-00000.json", "accelerate/00000/random_states_0.pkl", "MANIFEST.json"]
)
def test_a_flipped_bit_in_any_file_is_found_and_named(run: Store, file: str, ask: Callable[..., Answer]) -> None:
    flip_a_bit(run, name_of(4, file))
    answer = ask("checkpoints", "verify", run.url)
    assert answer.code == 3
    faults = [line for line in answer.out.splitlines() if "crc32c" in line]
    assert len(faults) == 1 and run.address(name_of(4, file)) in faults[0]
    assert "step 4 attempt 1: DAMAGED" in answer.out
    assert answer.out.count("sound") == len(STEPS) - 1
    assert ask("checkpoints", "verify", run.url, "--step", "4").code == 3
    assert ask("checkpoints", "verify", run.url, "--step", "6").code == 0


def test_a_missing_file_is_found_and_named(run: Store, ask: Callable[..., Answer]) -> None:
    run.delete(name_of(8, SHARDS))
    answer = ask("checkpoints", "verify", run.url)
    assert answer.code == 3
    assert f"{run.address(name_of(8, SHARDS))} is missing" in answer.out


def test_verify_refuses_what_is_not_committed(run: Store, ask: Callable[..., Answer]) -> None:
    answer = ask("checkpoints", "verify", run.url, "--step", "5")
    assert answer.code == 2
    assert "2, 4, 6, 8" in answer.err
    for step in STEPS:
        run.delete(name_of(step, "COMMITTED"))
    answer = ask("checkpoints", "verify", run.url)
    assert answer.code == 2
    assert "no committed checkpoint" in answer.err


# --- prune ------------------------------------------------------------------------------------------------------------


def best_of(rows: dict[int, dict[str, Any]]) -> int:
    return next(step for step, row in rows.items() if row["best"])


def test_prune_says_first_and_deletes_only_when_told(run: Store, ask: Callable[..., Answer]) -> None:
    before, best = run.names(), best_of(listed(ask, run.url))
    said = ask("checkpoints", "prune", run.url, "--keep", "1")
    assert said.code == 0 and "--yes" in said.out
    assert run.names() == before
    stays = {8, best}
    assert {int(line.split()[1]) for line in said.out.splitlines() if ": stays" in line} == stays
    assert {int(line.split()[1]) for line in said.out.splitlines() if ": delete" in line} == set(STEPS) - stays
    assert ask("checkpoints", "prune", run.url, "--keep", "1", "--yes").code == 0
    assert set(listed(ask, run.url)) == stays
    assert [name for name in before if name not in run.names()] == [
        name for name in before if any(name.startswith(name_of(step, "")) for step in set(STEPS) - stays)
    ]
    assert ask("checkpoints", "verify", run.url).code == 0


def test_prune_keeps_the_newest_sound_one_where_newer_ones_rotted(run: Store, ask: Callable[..., Answer]) -> None:
    flip_a_bit(run, name_of(8, SHARDS))
    flip_a_bit(run, name_of(6, SHARDS))
    best = best_of(listed(ask, run.url))
    pruned = ask("checkpoints", "prune", run.url, "--keep", "1", "--yes")
    assert pruned.code == 0
    assert "step 4 attempt 1: stays" in pruned.out
    assert set(listed(ask, run.url)) == {8, 6, 4, best}, "the damaged ones count for nothing, and are not in the way"
    assert ask("checkpoints", "verify", run.url, "--step", "4").code == 0


def test_prune_deletes_leftovers_of_attempts_before_the_newest_only(run: Store, ask: Callable[..., Answer]) -> None:
    run.delete(name_of(2, "COMMITTED"))
    own = ask("checkpoints", "prune", run.url, "--keep", "9", "--yes")
    assert "step 2 attempt 1: stays" in own.out, "its own attempt is the newest"
    later = open_attempt(run)
    later.finish("crashed", step=None, saved_step=None, reason="")
    assert ask("checkpoints", "prune", run.url, "--keep", "9", "--yes").code == 0
    assert set(listed(ask, run.url)) == {4, 6, 8}


def test_prune_leaves_a_running_life_alone(on_disk: Store, ask: Callable[..., Answer]) -> None:
    open_attempt(on_disk)
    command = ("checkpoints", "prune", on_disk.url, "--keep", "1")
    before = on_disk.names()
    refused = ask(*command, "--yes")
    assert refused.code == 2
    assert "attempt 2 seems to be running" in refused.err and "--force" in refused.err
    assert on_disk.names() == before
    assert "attempt 2 seems to be running" in ask("checkpoints", "list", on_disk.url).out
    age(on_disk, "attempts/2/started.json", "metrics.jsonl")  # killed long ago
    assert ask(*command, "--yes").code == 0


def test_prune_of_a_life_that_only_seems_to_run_can_be_forced(on_disk: Store, ask: Callable[..., Answer]) -> None:
    open_attempt(on_disk)
    assert ask("checkpoints", "prune", on_disk.url, "--keep", "1", "--yes", "--force").code == 0
    assert len(listed(ask, on_disk.url)) == 2


def test_prune_to_nothing_is_refused(on_disk: Store, ask: Callable[..., Answer]) -> None:
    answer = ask("checkpoints", "prune", on_disk.url, "--keep", "0", "--yes")
    assert answer.code == 2
    assert "--keep 0" in answer.err
    assert len(listed(ask, on_disk.url)) == len(STEPS)


# --- export -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["tokenizer_config.json"] = json.loads(files["tokenizer_config.json"])
    return files


def test_an_export_of_the_newest_is_the_runs_own_model_file_for_file(
    run: Store, ask: Callable[..., Answer], trained: Path, tmp_path: Path
) -> None:
    answer = ask("export", run.url, "--output", str(tmp_path / "model"))
    assert answer.code == 0, answer.err
    assert "step 8" in answer.out
    assert contents(tmp_path / "model") == contents(trained / "model")


def test_an_export_into_a_bucket_opens_as_a_model(
    on_disk: Store, running: Gcs, ask: Callable[..., Answer], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = f"{running.url}/{tmp_path.name}/model"
    assert ask("export", on_disk.url, "--output", target, "--dtype", "bf16").code == 0
    stored = open_store(target)
    for name in stored.names():
        stored.download(name, tmp_path / "fetched" / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fetched")
    own = load_file(Path(on_disk.url) / "model" / "model.safetensors")
    assert str(model.dtype) == "torch.bfloat16"
    state = model.state_dict()
    assert all((state[name] == weight.bfloat16()).all() for name, weight in own.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "fetched")("48/2")["input_ids"]
    again = ask("export", on_disk.url, "--output", target)
    assert again.code == 2
    assert f"--output {target} is not empty" in again.err


def test_an_export_of_an_earlier_step_has_that_steps_weights(
    run: Store, ask: Callable[..., Answer], trained: Path, tmp_path: Path
) -> None:
    assert ask("export", run.url, "--step", "4", "--output", str(tmp_path / "four")).code == 0
    four, eight = load_file(tmp_path / "four" / "model.safetensors"), load_file(trained / "model" / "model.safetensors")
    assert four.keys() == eight.keys()
    assert any((four[name] != eight[name]).any() for name in four)
    assert "| optimizer steps | 4 |" in (tmp_path / "four" / "README.md").read_text(encoding="utf-8")


def test_an_export_of_the_newest_passes_over_damage_and_one_of_a_step_refuses_it(
    run: Store, ask: Callable[..., Answer], tmp_path: Path
) -> None:
    flip_a_bit(run, name_of(8, SHARDS))
    newest = ask("export", run.url, "--output", str(tmp_path / "newest"))
    assert newest.code == 0, newest.err
    assert "exported the checkpoint of step 6" in newest.out
    refused = ask("export", run.url, "--step", "8", "--output", str(tmp_path / "eight"))
    assert refused.code == 2
    assert run.address(name_of(8, SHARDS)) in refused.err
    assert not (tmp_path / "eight").exists()


def test_an_export_refuses_all_that_is_wrong_at_once(
    on_disk: Store, ask: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine", encoding="utf-8")
    answer = ask("export", on_disk.url, "--step", "soon", "--dtype", "int4", "--output", str(tmp_path / "used"))
    assert answer.code == 2
    assert all(told in answer.err for told in ("'soon'", "'int4'", str(tmp_path / "used")))
    assert (tmp_path / "used" / "file").read_text(encoding="utf-8") == "mine"
    assert ask("export", on_disk.url, "--step", "5", "--output", str(tmp_path / "new")).code == 2


def test_an_export_falls_into_an_empty_folder_that_is_there(
    on_disk: Store, ask: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert ask("export", on_disk.url, "--output", str(tmp_path / "empty")).code == 0
    assert (tmp_path / "empty" / "config.json").is_file()
