"""``RunConfig``: what makes a run this run, and its way through YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from numina_finetune.checks import config_faults
from numina_finetune.cli.options import SOURCE_OPTIONS, resolve_config
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.errors import ConfigError
from numina_finetune.model_defaults import default_mesh, with_model_defaults
from numina_finetune.option_fields import load_yaml
from tests.conftest import ROOT

BASE = RunConfig(model_name="tiny-qwen3", datasets=(SourceConfig("synthetic-gsm8k"),), output_dir="runs")


def changed(**values: Any) -> RunConfig:
    return dataclasses.replace(BASE, **values)


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"mesh": "fsdp=2,tensor=2"},
        {"backend": "native"},
        {"output_dir": "elsewhere"},
        {"cache_dir": "cache"},
        {"save_steps": 7, "save_total_limit": 1},
        {"logging_steps": 1, "report_to": "tensorboard"},
        {"eval_steps": 5, "eval_dataset_name": "synthetic-gsm8k[test]"},
        {"resume_from_checkpoint": "12"},
        {"remat": "none"},
    ],
)
def test_another_mesh_or_another_way_to_log_and_save_is_the_same_run(values: dict[str, Any]) -> None:
    assert changed(**values).identity() == BASE.identity()
    assert changed(**values).resolved_run_id == BASE.resolved_run_id


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 3e-5},
        {"lr_scheduler_type": "linear"},
        {"max_steps": 10},
        {"num_train_epochs": 2.0},
        {"seed": 1},
        {"max_seq_length": 512},
        {"packing": False},
        {"precision": "fp32"},
        {"model_name": "other"},
        {"model_revision": "abc"},
        {"tokenizer_name": "other"},
        {"validation_size": 0.1},
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"global_batch_size": 8},
        {"datasets": (SourceConfig("synthetic-gsm8k", split="test"),)},
        {"datasets": (SourceConfig("synthetic-gsm8k", format="gsm8k"),)},
        {"datasets": (SourceConfig("synthetic-gsm8k"), SourceConfig("openai/gsm8k"))},
    ],
)
def test_what_changes_the_weights_is_another_run(values: dict[str, Any]) -> None:
    assert changed(**values).resolved_run_id != BASE.resolved_run_id


def test_with_a_global_batch_its_split_over_devices_is_not_identity() -> None:
    one = changed(global_batch_size=16, per_device_train_batch_size=2)
    other = changed(global_batch_size=16, per_device_train_batch_size=8)
    assert one.resolved_run_id == other.resolved_run_id


def test_a_given_run_id_is_the_name_and_a_derived_one_can_name_a_folder() -> None:
    assert changed(run_id="mine").resolved_run_id == "mine"
    derived = changed(model_name="Qwen/Qwen3-0.6B").resolved_run_id
    assert derived.startswith("qwen3-0.6b-") and "/" not in derived


# --- YAML -------------------------------------------------------------------------------------------------------------

FULL = changed(
    datasets=(SourceConfig("a.jsonl", format="math", weight=2.0), SourceConfig("b", config="main", weight=1.0)),
    learning_rate=1e-5,
    mesh="fsdp=4",
    max_steps=7,
    packing=False,
    run_id="mine",
)


def test_a_configuration_survives_its_mapping_and_yaml(tmp_path: Path) -> None:
    assert RunConfig.from_mapping(FULL.to_mapping()) == FULL
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(FULL.to_mapping()), encoding="utf-8")
    read = RunConfig.from_mapping(load_yaml(str(path)))
    assert read == FULL
    assert read.resolved_run_id == FULL.resolved_run_id


def test_what_a_yaml_leaves_out_takes_its_default() -> None:
    assert RunConfig.from_mapping({}) == RunConfig()
    assert RunConfig.from_mapping({"datasets": ["a"]}).datasets == (SourceConfig("a"),)


def test_numbers_as_people_write_them_and_names_with_hyphens() -> None:
    config = RunConfig.from_mapping(yaml.safe_load("learning-rate: 1e-5\nweight_decay: 0\nmax-steps: 10.0\n"))
    assert (config.learning_rate, config.weight_decay, config.max_steps) == (1e-5, 0.0, 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", ["'learning_rat' is unknown", "learning_rate"]),
        ("max_steps: many", ["max_steps is 'many'", "int"]),
        ("max_steps: 1.5", ["max_steps is 1.5", "int"]),
        ("max_steps: .inf", ["max_steps is inf", "int"]),
        ("max_steps: true", ["max_steps is True", "int"]),
        ("packing: 1", ["packing is 1", "bool"]),
        ("learning_rate: fast", ["learning_rate is 'fast'", "float"]),
        ("learning_rate: null", ["learning_rate is None", "float"]),
        ("model_name: 7", ["model_name is 7", "str"]),
        ("datasets: synthetic-gsm8k", ["datasets is 'synthetic-gsm8k'", "a list"]),
        ("datasets: {name: a}", ["datasets is {'name': 'a'}", "a list"]),
        ("datasets: [{split: a}]", ["datasets[0]", "`name`"]),
        ("datasets: [{name: a, splitt: b}]", ["datasets[0]", "'splitt' is unknown", "split"]),
    ],
)
def test_a_yaml_value_that_cannot_be_is_named_with_its_place(text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_mapping(yaml.safe_load(text), "my.yaml")
    assert all(words in str(refusal.value) for words in ["my.yaml", *said])


def test_all_faults_of_a_yaml_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_mapping({"a": 1, "max_steps": "x", "datasets": [{"b": 1}, {"name": "c", "d": 1}]})
    assert len(refusal.value.problems) == 4


def test_identity_and_configuration_survive_a_yaml_file() -> None:
    config = changed(against=("gsm8k:test", "math:test"), datasets=(SourceConfig("a", weight=0.5, max_samples=3),))
    assert yaml.safe_load(yaml.safe_dump(config.identity())) == config.identity()
    assert RunConfig.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping()))) == config


def test_runs_without_adapters_have_the_identity_that_they_had_before_there_were_any() -> None:
    assert not [name for name in BASE.identity() if name.startswith("lora")]
    assert changed(lora_rank=4).identity()["lora_rank"] == 4


def test_how_experts_are_computed_is_no_identity_unless_tokens_are_dropped() -> None:
    assert changed(experts="dropless", expert_capacity=2.0).identity() == BASE.identity()
    assert changed(experts="capacity").identity() != BASE.identity()
    assert changed(experts="capacity").identity() != changed(experts="capacity", expert_capacity=2.0).identity()


# --- a model's own defaults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_gpt_oss_alone_means_its_recipe(size: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_yaml(str(ROOT / "configs" / "recipes" / f"numina_tir_gpt_oss_{size}.yaml"))
    with caplog.at_level("INFO", logger="numina_finetune"):
        taken = with_model_defaults({"model_name": f"openai/oss-{size}", "learning_rate": 3e-5})
    assert taken.pop("learning_rate") == 3e-5
    assert taken.pop("model_name") == f"openai/oss-{size}"
    assert taken
    assert taken == {name: recipe[name] for name in taken}
    assert "--max-seq-length 4096" in caplog.text
    assert "--learning-rate" not in caplog.text
    assert default_mesh(f"openai/oss-{size}", 64) == recipe["mesh"]
    assert default_mesh(f"openai/oss-{size}", 3) is None
    assert with_model_defaults({"model_name": "tiny-qwen3"}) == {"model_name": "tiny-qwen3"}


def test_the_command_line_takes_a_models_defaults_and_a_file_says_all_itself(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name: openai/gpt-oss-120b\n")

    def resolved(path: str | None, **given: Any) -> RunConfig:
        return resolve_config(path, {**dict.fromkeys(SOURCE_OPTIONS), **given}, [])

    assert resolved(None, model_name="openai/gpt-oss-120b").max_seq_length == 4096
    assert resolved(str(file)).max_seq_length == RunConfig().max_seq_length != 4096


def test_the_decay_of_a_schedule_without_one_is_no_identity() -> None:
    """Runs that began before there was one go on."""
    assert changed(lr_decay_ratio=0.5).identity() == BASE.identity()
    assert (
        changed(lr_scheduler_type="wsd").identity() != changed(lr_scheduler_type="wsd", lr_decay_ratio=0.5).identity()
    )


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", float("nan")),
        ("learning_rate", -1e-5),
        ("warmup_ratio", 1.5),
        ("lr_decay_ratio", -0.1),
        ("loss_spike_factor", -1.0),
        ("lr_scheduler_type", "polynomial"),
        ("adam_beta2", 1.0),
        ("adam_epsilon", 0.0),
        ("adam_epsilon", float("nan")),
        ("max_grad_norm", float("inf")),
        ("num_train_epochs", 0.0),
        ("num_train_epochs", float("inf")),
        ("max_steps", 0),
        ("max_steps", -2),
        ("max_seq_length", 1),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("global_batch_size", 0),
        ("logging_steps", 0),
        ("save_steps", -1),
        ("save_total_limit", 0),
        ("precision", "fp16"),
        ("optim", "sgd"),
        ("report_to", "wandb,comet"),
        ("resume_from_checkpoint", "newest"),
        ("lora_rank", -1),
        ("lora_alpha", 8),
        ("lora_targets", "q_proj"),
        ("lora_export", "adapter"),
        ("run_id", "a/b"),
        ("run_id", ".."),
        ("run_id", ""),
    ],
)
def test_a_value_out_of_range_is_one_fault_that_names_its_flag(name: str, value: Any) -> None:
    (fault,) = config_faults(changed(**{name: value}))
    assert "--" + name.replace("_", "-") in fault


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", 0), ("lora_export", "both of them")])
def test_an_adapters_value_out_of_range_is_one_fault_that_names_its_flag(name: str, value: Any) -> None:
    (fault,) = config_faults(changed(lora_rank=4, **{name: value}))
    assert "--" + name.replace("_", "-") in fault


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr_scheduler_type": "wsd", "warmup_ratio": 0.5, "lr_decay_ratio": 0.6}, ["--warmup-ratio 0.5", "0.6"]),
        ({"gradient_noise": True, "optim": "adafactor"}, ["--gradient-noise", "--optim adafactor"]),
        ({"gradient_noise": True, "adam_beta1": 0.0}, ["--gradient-noise", "--adam-beta1 0"]),
    ],
)
def test_optimisation_options_that_contradict_one_another_are_one_fault(
    values: dict[str, Any], said: list[str]
) -> None:
    (fault,) = config_faults(changed(**values))
    assert all(words in fault for words in said)


def test_the_defaults_have_no_fault() -> None:
    assert config_faults(BASE) == []
