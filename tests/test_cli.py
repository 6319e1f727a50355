"""The command line: its spellings, its YAML, and its exit codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from numina_finetune import __version__, cli, launch
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.errors import ConfigError
from numina_finetune.option_fields import flag
from tests.conftest import environment, train

NEEDED = ["--model-name", "tiny-qwen3", "--output-dir", "runs"]


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch, native_here: None) -> Callable[..., RunConfig]:
    """The configuration with which a command line would train."""
    from numina_finetune.train import run

    def resolve(*arguments: str) -> RunConfig:
        seen: list[RunConfig] = []

        def stop(config: RunConfig, backend: str) -> None:
            seen.append(config)
            raise ConfigError("far enough")

        monkeypatch.setattr(run, "check", stop)
        assert cli.run_command([*arguments, "--backend", "native"]) == 2
        return seen[0]

    return resolve


# --- spellings --------------------------------------------------------------------------------------------------------


def test_underscores_work_as_well_as_hyphens(resolved: Callable[..., RunConfig]) -> None:
    hyphens = resolved(*NEEDED, "--dataset-name", "a", "--max-seq-length", "64", "--no-gradient-checkpointing")
    underscores = resolved(
        *("--model_name=tiny-qwen3", "--output_dir", "runs", "--dataset_name", "a", "--max_seq_length=64"),
        "--no_gradient_checkpointing",
    )
    assert underscores == hyphens
    assert hyphens.max_seq_length == 64 and hyphens.remat == "none"


def test_train_may_be_left_out(resolved: Callable[..., RunConfig]) -> None:
    assert resolved("train", *NEEDED, "--seed", "3") == resolved(*NEEDED, "--seed", "3")


def test_nothing_given_means_every_default(resolved: Callable[..., RunConfig]) -> None:
    assert resolved() == RunConfig(backend="native")


@pytest.mark.parametrize("spelling", ["--lora-rank", "--lora-r", "--lora_r"])
def test_the_adapters_rank_has_a_second_name(resolved: Callable[..., RunConfig], spelling: str) -> None:
    assert resolved(spelling, "4").lora_rank == RunConfig.from_mapping({"lora_r": 4}).lora_rank == 4


def test_a_value_keeps_its_underscores_and_spaces(resolved: Callable[..., RunConfig]) -> None:
    config = resolved(*NEEDED, "--run-id", "my_run", "--system-prompt", "think --hard_er")
    assert (config.run_id, config.system_prompt) == ("my_run", "think --hard_er")


def test_gradient_checkpointing_is_a_spelling_of_remat(resolved: Callable[..., RunConfig]) -> None:
    assert resolved(*NEEDED, "--gradient-checkpointing").remat == "full"
    assert resolved(*NEEDED, "--no-gradient-checkpointing").remat == "none"


def test_gradient_checkpointing_and_remat_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command([*NEEDED, "--no-gradient-checkpointing", "--remat", "dots", "--backend", "native"]) == 2
    assert "--no-gradient-checkpointing and --remat dots both say" in capsys.readouterr().err


def test_bf16_is_a_spelling_of_precision(resolved: Callable[..., RunConfig]) -> None:
    assert resolved(*NEEDED, "--no-bf16").precision == "fp32"
    assert resolved(*NEEDED, "--bf16").precision == "bf16"


def test_every_field_of_a_run_has_its_option_with_help_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run_command(["train", "--help"]) == 0
    words = "".join(capsys.readouterr().out.split())
    for field in fields(RunConfig):
        if field.name != "datasets":
            assert flag(field.name) in words
    assert "[default:2e-05]" in words
    assert "name[split]" in words, "square brackets are shown, not taken for markup"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_the_commands(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command([word]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown and "quickstart" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"numina-finetune {__version__}\n"


# --- several datasets -------------------------------------------------------------------------------------------------


def test_an_option_given_once_is_for_every_dataset_and_given_as_often_for_each(
    resolved: Callable[..., RunConfig],
) -> None:
    config = resolved(
        *(*NEEDED, "--dataset-name", "a[test]", "--dataset-name", "b"),
        *("--dataset-weight", "3", "--dataset-weight", "1", "--format", "gsm8k"),
    )
    assert config.datasets == (
        SourceConfig("a[test]", format="gsm8k", weight=3.0),
        SourceConfig("b", format="gsm8k", weight=1.0),
    )


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[..., str]:
    def write(**values: Any) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write


def test_a_yaml_says_the_same_as_the_flags(resolved: Callable[..., RunConfig], yaml_file: Callable[..., str]) -> None:
    flags = resolved(
        *(*NEEDED, "--learning-rate", "1e-4", "--no-packing", "--mesh", "fsdp=1"),
        *("--dataset-name", "a", "--dataset-split", "test", "--question-field", "q", "--dataset-weight", "2"),
        *("--dataset-name", "b", "--dataset-split", "train", "--question-field", "p", "--dataset-weight", "1"),
    )
    path = yaml_file(
        model_name="tiny-qwen3",
        output_dir="runs",
        learning_rate=1e-4,
        packing=False,
        mesh="fsdp=1",
        datasets=[
            {"name": "a", "split": "test", "question_field": "q", "weight": 2},
            {"name": "b", "question_field": "p", "weight": 1},
        ],
    )
    assert resolved("--config", path) == flags
    assert resolved("--config", path).resolved_run_id == flags.resolved_run_id


def test_a_flag_wins_over_the_yaml_and_only_that_one(
    resolved: Callable[..., RunConfig], yaml_file: Callable[..., str]
) -> None:
    path = yaml_file(**{"learning-rate": 1.0, "packing": False, "seed": 7, "datasets": ["a"]})
    config = resolved("--config", path, "--learning-rate", "2", "--packing")
    assert (config.learning_rate, config.packing, config.seed) == (2.0, True, 7)
    assert config.datasets == (SourceConfig("a"),)
    assert resolved("--config", path, "--dataset-name", "b").datasets == (SourceConfig("b"),)


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-option", "1"], "--no-such-option"),
        (["--max-steps", "many"], "--max-steps"),
        (["--learning-rate"], "--learning-rate"),
        (["leftover"], "leftover"),
        (["quickstart", "--no-such-option"], "--no-such-option"),
    ],
)
def test_a_slip_of_the_pen_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("numina-finetune: ") and said in line


def test_ctrl_c_before_training_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "choose_backend", interrupted)
    assert cli.run_command([]) == 130


def test_a_crash_exits_1_with_its_traceback_and_says_so_in_the_outcome(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine" / "metrics.jsonl").mkdir(parents=True)  # where a file must be written
    options = ("--max-steps", "1", "--run-id", "mine", "--backend", "native")
    crashed = train(tmp_path / "runs", *options, env=environment())
    assert crashed.code == 1
    assert "Traceback" in crashed.output and "IsADirectoryError" in crashed.output
    assert crashed.outcome()["kind"] == "crashed"
    assert "IsADirectoryError" in crashed.outcome()["reason"]
