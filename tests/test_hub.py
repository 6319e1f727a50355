"""Models from the hub and onto it, with the hub's real client, against a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from numina_finetune import cli
from numina_finetune.config import RunConfig
from numina_finetune.models.hub import weights_at_hand
from numina_finetune.models.load import load_config, load_model
from numina_finetune.models.tokenizer import load_tokenizer
from numina_finetune.storage import open_store
from numina_finetune.train.place import RunPlace, pushed_as
from numina_finetune.train.preparation import model_commit
from numina_finetune.train.record import recorded_config
from tests.conftest import TINY
from tests.gcs import BUCKET, gcs
from tests.hub import Hub, hub_here

BASE = RunConfig(model_name="tiny-qwen3", precision="fp32")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_here() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub has one."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer(BASE)
    load_model(BASE, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("native_here")
def test_a_run_keeps_the_commit_it_began_with_and_pushes_once_the_hub_can(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.lead_here(monkeypatch, tmp_path / "hub")
    began_with = hub.commit("org/tiny", base)
    asked = ("--model-name", "org/tiny", "--max-steps", "2", "--save-steps", "0", "--backend", "native")
    places = ("--output-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"))
    command = [*TINY, *asked, *places, "--push-to-hub", "--hub-private"]
    hub.faulty = True
    assert cli.run_command(command) == 1
    told = capsys.readouterr().err
    assert "the model is whole in" in told and "the same command pushes it" in told
    (run,) = (tmp_path / "runs").iterdir()
    outcome = json.loads((run / "attempts" / "1" / "outcome.json").read_text(encoding="utf-8"))
    assert outcome["kind"] == "crashed", "a supervisor runs it again"
    assert yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))["model_commit"] == began_with

    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    (moved / "config.json").write_text(json.dumps({**config, "hidden_size": 96}), encoding="utf-8")
    assert hub.commit("org/tiny", moved) != began_with
    hub.faulty = False
    assert cli.run_command(command) == 0
    said = capsys.readouterr().out
    assert "nothing to do: the run has made all 2 steps" in said and f"/me/{run.name}" in said
    written = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert hub.uploaded[f"me/{run.name}"] == written and hub.private[f"me/{run.name}"]

    out = tmp_path / "out"
    export = ["export", str(run), "--output", str(out), "--push-to-hub", "--hub-model-id", "org/again"]
    assert cli.run_command(export) == 0
    again, then = load_file(out / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert all((again[name] == then[name]).all() for name in then), "the base's branch has moved, the run has not"
    assert sorted(hub.uploaded["org/again"]) == sorted(written) and not hub.private["org/again"]


@pytest.mark.usefixtures("native_here")
def test_a_push_is_refused_before_anything_is_prepared(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: str) -> str:
        given = ("--model-name", "tiny-qwen3", "--dataset-name", "synthetic-gsm8k", "--backend", "native")
        places = ("--output-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"))
        assert cli.run_command([*given, *places, *arguments]) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "--push-to-hub with HF_HUB_OFFLINE set" in told("--push-to-hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
    both = told("--push-to-hub", "--hub-model-id", "a/b/c")
    assert "--hub-model-id 'a/b/c' cannot name a model" in both and "--push-to-hub needs a token" in both
    hub.lead_here(monkeypatch, tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the hub refuses this machine's token" in told("--push-to-hub")
    unasked = told("--hub-model-id", "a/b", "--hub-private")
    assert "--hub-model-id is about a push" in unasked and "--hub-private is about a push" in unasked
    assert cli.run_command(["export", str(tmp_path), "--output", str(tmp_path / "out"), "--hub-private"]) == 2


def test_an_export_that_only_the_bucket_has_is_fetched_to_be_pushed(tmp_path: Path) -> None:
    with gcs():
        place = RunPlace(open_store(f"gs://{BUCKET}/runs/mine"), tmp_path / "here")
        (tmp_path / "here" / "model").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "here" / "model" / name).write_bytes(name.encode())
        place.publish_exported("model")
        elsewhere = RunPlace(place.store, tmp_path / "another-machine")
        with elsewhere.exported("model") as folder:
            found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {name: name.encode() for name in ("config.json", "model.safetensors")}


def test_an_adapter_beside_a_model_is_pushed_beside_it() -> None:
    both = RunConfig(lora_rank=4, hub_model_id="me/math")
    assert pushed_as(both) == {"model": "me/math", "adapter": "me/math-adapter"}
    assert pushed_as(replace(both, lora_export="adapter")) == {"adapter": "me/math"}


def coded(base: Path, folder: Path, ran: Path) -> Path:
    """The model with a configuration class of its own, whose code leaves a mark where it is run."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own_qwen3", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code = (
        "from pathlib import Path\nfrom transformers import Qwen3Config\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own_qwen3'\n"
    )
    (folder / "own.py").write_text(code, encoding="utf-8")
    return folder


@pytest.mark.usefixtures("native_here")
def test_code_that_comes_with_a_model_is_run_only_when_asked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = coded(base, tmp_path / "coded", tmp_path / "ran")
    given = ("--model-name", str(folder), "--dataset-name", "synthetic-gsm8k", "--backend", "native")
    assert cli.run_command([*given, "--output-dir", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert "brings Python code of its own" in told and "--trust-remote-code" in told
    asked = ("generate", "--model", str(folder), "--prompt", "a", "--backend", "native")
    assert cli.run_command([*asked]) == 2
    assert "brings Python code of its own" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    config = RunConfig(model_name=str(folder), tokenizer_name=str(base), trust_remote_code=True)
    with pytest.raises(Exception, match="is a own_qwen3 model"):
        load_config(config, load_tokenizer(config))
    assert (tmp_path / "ran").exists()


def test_a_commit_changes_neither_the_runs_name_nor_whether_code_is_run() -> None:
    asked = RunConfig(model_name="org/tiny", model_revision="main", trust_remote_code=True)
    record = {"config": asked.to_mapping(), "model_commit": "1" * 40}
    later = recorded_config(record, "run.yaml", trust_remote_code=False)
    assert later.model_revision == "1" * 40 and later.resolved_run_id == asked.resolved_run_id
    assert not later.trust_remote_code, "what a record allows, its reader has to allow again"
    before_commits = recorded_config({"config": asked.to_mapping()}, "run.yaml", trust_remote_code=True)
    assert before_commits == asked and model_commit(asked, {"config": {}}) is None


def test_weights_are_at_hand_in_a_folder_or_whole_in_the_cache(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights_at_hand(str(base), None) and not weights_at_hand("org/tiny", None)
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40, encoding="utf-8")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (snapshot / "model-1.safetensors").touch()
    assert not weights_at_hand("org/tiny", None), "one of two files is missing"
    (snapshot / "model-2.safetensors").touch()
    assert weights_at_hand("org/tiny", None) and weights_at_hand("org/tiny", "1" * 40)
