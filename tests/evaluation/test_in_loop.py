"""A training measures its accuracy on the same problems each time, where its weights lie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from numina_finetune.checks import config_faults
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.evaluation import in_loop
from tests.conftest import environment, train

SYNTHETIC = RunConfig(
    model_name="tiny-qwen3",
    datasets=(SourceConfig("synthetic-gsm8k", format="gsm8k"),),
    output_dir="runs",
    eval_samples=3,
)


def with_data(path: Path, **options: object) -> RunConfig:
    """A training on a file of chats, which has no final answers."""
    path.write_text('{"messages": []}\n', encoding="utf-8")
    return replace(SYNTHETIC, datasets=(SourceConfig(str(path)),), **options)


def test_without_samples_nothing_is_looked_for(tmp_path: Path) -> None:
    assert in_loop.faults(with_data(tmp_path / "chats.jsonl", eval_samples=0)) == []


def test_synthetic_training_is_asked_held_out_problems(tmp_path: Path) -> None:
    assert in_loop.faults(SYNTHETIC) == []
    (fault,) = in_loop.faults(with_data(tmp_path / "chats.jsonl"))
    assert "--eval-task" in fault
    assert in_loop.faults(with_data(tmp_path / "chats.jsonl", eval_task="synthetic-gsm8k")) == []


def test_the_evaluation_datasets_problems_are_asked_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "1+1?"}\n', encoding="utf-8")
    chats = with_data(tmp_path / "chats.jsonl", eval_dataset_name=str(tmp_path / "test.jsonl"))
    assert in_loop.faults(chats) == []
    assert "no column" in in_loop.faults(replace(chats, eval_dataset_name=str(tmp_path / "bad.jsonl")))[0]


def test_answers_longer_than_the_model_can_count_are_refused() -> None:
    (fault,) = in_loop.faults(replace(SYNTHETIC, eval_max_new_tokens=5000))
    assert "--eval-max-new-tokens 5000 behind the longest prompt" in fault and "4096 positions of tiny-qwen3" in fault


def test_options_that_ask_nothing_are_refused() -> None:
    assert config_faults(replace(SYNTHETIC, eval_steps=5)) == []
    assert "--eval-samples" in config_faults(replace(SYNTHETIC, eval_steps=5, eval_samples=0))[0]
    assert "not asked anything" in config_faults(replace(SYNTHETIC, eval_task="gsm8k", eval_samples=0))[0]


FEW = ("--eval-max-new-tokens", "20")


@pytest.mark.parametrize(("devices", "few"), [(None, FEW), (4, FEW), pytest.param(None, (), marks=pytest.mark.slow)])
def test_accuracy_is_recorded_at_every_evaluation_and_keeps_its_checkpoint(
    tmp_path: Path, devices: int | None, few: tuple[str, ...]
) -> None:
    options = ("--max-steps", "4", "--eval-steps", "2", "--eval-samples", "6", *few)
    kept = ("--save-steps", "2", "--save-total-limit", "1", "--logging-steps", "1")
    backend = "native" if devices is None else "xla"
    run = train(tmp_path / "runs", *options, *kept, "--backend", backend, env=environment(devices=devices))
    assert run.code == 0, run.output
    measured = {record["step"]: record for record in run.metrics if "eval_accuracy" in record}
    assert sorted(measured) == [2, 4]
    for record in measured.values():
        assert 0 <= record["eval_accuracy_lower"] <= record["eval_accuracy"] <= record["eval_accuracy_upper"] <= 1
        assert record["eval_problems"] == 6 and record["life"] == 1
    assert "step 2/4  accuracy " in run.output
    manifest = json.loads((run.checkpoints[-1] / "MANIFEST.json").read_text(encoding="utf-8"))
    assert manifest["accuracies"] == {"2": measured[2]["eval_accuracy"]}, "step 4's comes after its save"
    if devices:
        assert "training-graph compilations: 1;" in run.output
