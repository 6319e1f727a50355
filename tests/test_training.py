"""What a user trains: own conversations, mixtures, a model from a folder, another architecture, an evaluation loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from numina_finetune.models.builtin import TINY_TOKENIZER
from tests.conftest import ROOT, environment, real_data, train

NATIVE = environment()
SHORT = ("--max-steps", "3", "--logging-steps", "1", "--save-steps", "0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def write_chats(path: Path, count: int = 40) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + 1?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
                {"role": "user", "content": "And twice that?"},
                {"role": "assistant", "content": f"{2 * (n + 1)}"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_own_conversations_mix_with_another_source_by_weight(tmp_path: Path, cache: str) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    run = train(
        tmp_path / "out",
        *SHORT,
        *("--dataset-name", str(chats), "--format", "messages"),  # beside the tiny run's own GSM8K-style source
        *("--dataset-weight", "1", "--dataset-weight", "3", "--validation-size", "8"),
        env=NATIVE,
    )
    assert run.code == 0, run.output
    report = json.loads((run.run / "data_report.json").read_text(encoding="utf-8"))
    assert [(s["format"], s["rows"], s["kept"]) for s in report["sources"]] == [
        ("gsm8k", 256, 256),
        ("messages", 40, 40),
    ]
    assert len(run.losses) == 3
    assert [record["step"] for record in run.metrics if "eval_loss" in record] == [3], "at the end, if not told"


@pytest.mark.parametrize("epochs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_whole_epochs_end_by_themselves_and_report_the_evaluation_loss(tmp_path: Path, cache: str, epochs: int) -> None:
    more = ("--num-train-epochs", str(epochs)) if epochs > 1 else ()
    run = train(
        tmp_path / "out",
        *("--dataset-max-samples", "80", "--validation-size", "0.25", "--eval-steps", "1"),
        *("--per-device-train-batch-size", "8", *more),
        env=NATIVE,
    )
    assert run.code == 0, run.output
    evaluations = [record for record in run.metrics if "eval_loss" in record]
    assert evaluations[-1]["step"] == len(run.losses)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    trained_on = sum(record["supervised_tokens"] for record in run.metrics if "loss" in record) / epochs
    held_out = evaluations[-1]["eval_tokens"]
    assert 0.2 < held_out / (held_out + trained_on) < 0.3, "each epoch sees each training token exactly once"


@pytest.mark.slow
def test_the_evaluation_loss_is_the_same_on_four_devices(tmp_path: Path, cache: str) -> None:
    runs = [
        train(
            tmp_path / name,
            *("--max-steps", "1", "--logging-steps", "1", "--save-steps", "0", "--global-batch-size", "4"),
            *("--eval-dataset-name", "synthetic-gsm8k[test]"),
            *extra,
            env=env,
        )
        for name, extra, env in (
            ("native", ("--per-device-train-batch-size", "4"), NATIVE),
            ("xla", (), environment(devices=4)),
        )
    ]
    records = [record for run in runs for record in run.metrics if "eval_loss" in record]
    assert len(records) == 2
    assert records[0]["eval_tokens"] == records[1]["eval_tokens"]
    assert records[0]["eval_loss"] == pytest.approx(records[1]["eval_loss"], rel=1e-3)  # of bf16
    assert "training-graph compilations: 1;" in runs[1].output


@pytest.mark.slow
def test_an_exported_model_is_trained_on_from_its_folder(tmp_path: Path, cache: str) -> None:
    steps = ("--max-steps", "12", "--logging-steps", "1", "--save-steps", "0", "--per-device-train-batch-size", "8")
    first = train(tmp_path / "first", *steps, env=NATIVE)
    model = first.run / "model"
    second = train(tmp_path / "second", *steps, "--model-name", str(model), env=NATIVE)
    assert second.code == 0, second.output
    assert second.losses[0] < first.losses[0], "of the same rows"
    assert second.losses[0] == pytest.approx(first.losses[-1], rel=0.05)


def test_a_resume_does_not_need_the_base_weights(tmp_path: Path, cache: str) -> None:
    base = train(tmp_path / "base", *SHORT, env=NATIVE).run / "model"
    long = ("--max-steps", "6", "--logging-steps", "1", "--save-steps", "3", "--model-name", str(base))
    whole = train(tmp_path / "whole", *long, env=NATIVE)
    assert whole.code == 0, whole.output
    newest = whole.checkpoints[-1]
    (newest / "COMMITTED").unlink()  # as if killed before the last commit
    (base / "model.safetensors").unlink()
    resumed = train(tmp_path / "whole", *long, env=NATIVE)
    assert resumed.code == 0, resumed.output
    assert "resumed from the checkpoint of step 3/6" in resumed.output
    assert resumed.losses == whole.losses


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_llama_trains_sharded_and_exports(tmp_path: Path, tied: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    model = ("--model-name", str(tmp_path / "llama"))
    batch = ("--global-batch-size", "4")
    xla = train(tmp_path / "xla", *SHORT, *model, *batch, "--mesh", "fsdp=2,tensor=2")
    native = train(tmp_path / "native", *SHORT, *model, *batch, env=NATIVE)
    assert xla.code == 0, xla.output
    assert xla.losses == pytest.approx(native.losses, rel=1e-3)
    exported = AutoModelForCausalLM.from_pretrained(xla.run / "model")
    assert exported.config.model_type == "llama"
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied


def test_real_gsm8k_trains_with_the_real_qwen3_tokenizer(tmp_path: Path) -> None:
    data = real_data()
    run = train(
        tmp_path / "out",
        *("--max-steps", "4", "--logging-steps", "1", "--save-steps", "0", "--max-seq-length", "128"),
        *("--tokenizer-name", str(data / "tokenizers" / "qwen3"), "--gsm8k-style", "annotated"),
        *("--learning-rate", "1e-3"),  # at which four steps of different rows show that it learns
        env=environment(devices=2),
    )
    assert run.code == 0, run.output
    assert run.losses[-1] < run.losses[0]


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50000}', encoding="utf-8")
    run = train(
        tmp_path / "out",
        *("--model-name", str(tmp_path / "gpt2"), "--tokenizer-name", str(TINY_TOKENIZER)),
        env=NATIVE,
    )
    assert run.code == 2
    assert "is a gpt2 model" in run.output
    assert "qwen3, llama" in run.output


def test_metrics_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = train(tmp_path / "out", *SHORT, "--report-to", "tensorboard", env=NATIVE)
    assert run.code == 0, run.output
    assert list(run.run.rglob("events.out.tfevents.*"))


def test_the_exported_folder_has_a_card_with_the_data_report_and_generation_settings(tmp_path: Path) -> None:
    model = train(tmp_path / "out", *SHORT, env=NATIVE).run / "model"
    card = (model / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "| synthetic-gsm8k | 256 | 256 |" in card
    generation = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == AutoTokenizer.from_pretrained(model).eos_token_id


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_sound_configuration(recipe: Path) -> None:
    from numina_finetune.checks import config_faults
    from numina_finetune.config import RunConfig
    from numina_finetune.option_fields import load_yaml

    config = RunConfig.from_mapping({**load_yaml(str(recipe)), "output_dir": "runs"}, str(recipe))
    assert config_faults(config) == []
