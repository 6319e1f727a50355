"""Every mistake a user can make before training: one message with the fix, exit 2, and nothing written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from numina_finetune import cli
from numina_finetune.cli import backends
from tests.conftest import TINY, Run, environment, train
from tests.models.folders import DENSE

Refused = Callable[..., str]


@pytest.fixture
def refused(
    native_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Refused:
    """Runs the command line, which must refuse; returns what it says."""

    def reached(name: str) -> Any:
        raise AssertionError(f"not refused: the {name} backend was about to start")

    def run(*arguments: str, output_dir: Path | None = None, **env: str) -> str:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        folder = output_dir or tmp_path / "runs"
        before = content(folder)
        code = cli.run_command([*arguments, "--output-dir", str(folder), "--cache-dir", str(tmp_path / "cache")])
        said = capsys.readouterr()
        assert code == 2, said
        assert said.err.startswith("numina-finetune: ") and "Traceback" not in said.err
        assert content(folder) == before, "a refused command has written something"
        assert not (tmp_path / "cache").exists()
        return said.err

    monkeypatch.setattr(backends, "factory", reached)
    return run


def content(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with the hash of what is in it; also the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def problems(tmp_path: Path) -> str:
    """A small dataset with the columns of the MATH format."""
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"What is {i} + 1?", "solution": f"It is \\boxed{{{i + 1}}}."} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def listed(message: str) -> list[str]:
    """The problems of a message that has several."""
    first, *rest = message.splitlines()
    assert first == f"numina-finetune: {len(rest)} problems:"
    return rest


# --- the data ---------------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_named_once_with_the_known_ones(refused: Refused, problems: str) -> None:
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", problems, "--format", "gsm9k")
    assert said.count("--format 'gsm9k'") == 1
    assert "gsm8k, math, numina_cot" in said and problems in said


@pytest.mark.parametrize(
    ("options", "column", "remedy"),
    [
        (["--format", "math", "--answer-field", "gold"], "gold", "--answer-field"),
        (["--format", "math", "--question-field", "asked"], "asked", "--question-field"),
        (["--format", "messages"], "messages", "--messages-field"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are_and_the_flag(
    options: list[str], column: str, remedy: str, refused: Refused, problems: str
) -> None:
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", problems, *options)
    assert f"column {column!r} is missing" in said
    assert "problem, solution" in said
    assert f"name the column{' of the question' if remedy == '--question-field' else ''}" in said and remedy in said


def test_columns_that_fit_no_format_are_listed(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"left": "1", "right": "2"}\n', encoding="utf-8")
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", str(path))
    assert "left, right" in said and "--question-field" in said and "--messages-field" in said


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_dataset_is_said_to_be_empty(text: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(text, encoding="utf-8")
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", str(path), "--format", "gsm8k")
    assert str(path) in said and "is empty" in said


def test_a_file_that_is_no_json_is_named(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "1", "answer"\n', encoding="utf-8")
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", str(path), "--format", "gsm8k")
    assert str(path) in said and "cannot be read" in said


def test_a_path_that_does_not_exist_is_named_with_its_flag(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "nothing.jsonl"
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", str(path), "--eval-dataset-name", f"{path}2.jsonl")
    train_fault, eval_fault = listed(said)
    assert f"--dataset-name {path} does not exist" in train_fault
    assert f"--eval-dataset-name {path}2.jsonl does not exist" in eval_fault


def test_a_split_that_is_not_there_is_named_with_those_that_are(refused: Refused) -> None:
    said = refused("--model-name", "tiny-qwen3", "--dataset-name", "synthetic-gsm8k[trian]")
    assert "split 'trian'" in said and "train, test" in said


# --- devices and model ------------------------------------------------------------------------------------------------


def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused_before_they_start(refused: Refused) -> None:
    said = refused(*TINY, "--backend", "xla", "--mesh", "fsdp=3", PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    assert "'fsdp=3' multiplies to 3, but there are 4 devices" in said and "fsdp=4" in said


def test_several_processes_are_refused_on_xla(refused: Refused) -> None:
    said = refused(*TINY, "--backend", "xla", PJRT_DEVICE="CPU", WORLD_SIZE="2")
    assert "WORLD_SIZE=2 with the XLA backend" in said and "--backend native" in said


def test_what_accelerate_is_asked_for_and_this_training_does_not_do_is_refused(refused: Refused) -> None:
    """Each names its variable, the value and our option; see test_accelerate_settings.py for all of them."""
    asked = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    precision, dynamo = listed(refused(*TINY, "--backend", "native", **asked))
    assert "ACCELERATE_MIXED_PRECISION=fp16" in precision and "--precision bf16" in precision
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR" in dynamo and "--torch-compile" in dynamo


def test_a_tpu_that_is_asked_for_and_not_there_is_refused_before_libtpu_waits_for_it(refused: Refused) -> None:
    said = refused(*TINY, PJRT_DEVICE="TPU")
    assert "PJRT_DEVICE=TPU" in said and "no TPU is attached" in said and "PJRT_DEVICE=CPU" in said


@pytest.mark.parametrize("count", ["four", "0", "128"])
def test_a_number_of_virtual_devices_that_is_none_is_refused(count: str, refused: Refused) -> None:
    said = refused(*TINY, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=count)
    assert f"CPU_NUM_DEVICES={count}" in said and "1 to 127" in said


def test_dropout_of_attention_scores_is_refused_with_a_kernel_that_has_none(refused: Refused, tmp_path: Path) -> None:
    Qwen3Config(**DENSE, attention_dropout=0.1).save_pretrained(tmp_path / "model")
    words = (*TINY, "--model-name", str(tmp_path / "model"), "--tokenizer-name", "tiny-qwen3")
    said = refused(*words, "--attention", "splash", "--backend", "xla", PJRT_DEVICE="CPU")
    assert "attention_dropout is 0.1" in said and "--attention torch" in said


def test_a_sequence_longer_than_the_model_can_take_is_refused_with_both_lengths(refused: Refused) -> None:
    said = refused(*TINY, "--max-seq-length", "4097")
    assert "--max-seq-length 4097" in said and "tiny-qwen3" in said and "4096" in said


# --- flags ------------------------------------------------------------------------------------------------------------


def test_missing_flags_are_all_named_and_the_quickstart_too(
    native_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command([]) == 2
    faults = listed(capsys.readouterr().err)
    assert [fault.split()[1] for fault in faults] == ["--dataset-name", "--model-name", "--output-dir"]
    assert "quickstart" in faults[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bf16", "--precision", "fp32"], ["--bf16", "--precision fp32"]),
        (["--no-bf16", "--precision", "pure-bf16"], ["--no-bf16", "--precision pure-bf16"]),
        (
            ["--global-batch-size", "8", "--gradient-accumulation-steps", "2"],
            ["--global-batch-size 8", "--gradient-accumulation-steps 2"],
        ),
        (
            ["--validation-size", "0.1", "--eval-dataset-name", "synthetic-gsm8k[test]"],
            ["--validation-size 0.1", "--eval-dataset-name synthetic-gsm8k[test]"],
        ),
        (["--eval-steps", "5"], ["--eval-steps 5", "--eval-dataset-name", "--validation-size"]),
    ],
)
def test_contradictions_name_both_flags(options: list[str], said: list[str], refused: Refused) -> None:
    message = refused("--model-name", "tiny-qwen3", "--dataset-name", "synthetic-gsm8k", *options)
    assert all(words in message for words in said)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (["--dataset-weight", "1", "--dataset-weight", "2"], "--dataset-weight is given 2 times for 3 datasets"),
        (["--dataset-weight", "0"], "--dataset-weight 0.0"),
    ],
)
def test_weights_that_do_not_fit_the_datasets_are_refused(weights: list[str], said: str, refused: Refused) -> None:
    names = [word for split in ("train", "test", "train") for word in ("--dataset-name", f"synthetic-gsm8k[{split}]")]
    assert said in refused("--model-name", "tiny-qwen3", *names, *weights)


def test_a_weight_for_some_datasets_only_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name: tiny-qwen3\ndatasets:\n- {name: synthetic-gsm8k, weight: 1}\n- {name: synthetic-gsm8k}\n",
        encoding="utf-8",
    )
    assert "--dataset-weight is given for 1 of 2 datasets" in refused("--config", str(path))


def test_a_dataset_option_without_a_dataset_is_told_to_have_none(refused: Refused) -> None:
    assert "--format gsm8k belongs to a --dataset-name" in refused("--model-name", "tiny-qwen3", "--format", "gsm8k")


def test_everything_that_is_wrong_is_told_at_once(refused: Refused, problems: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jsonl")
    said = refused(
        *("--model-name", "tiny-qwen3", "--backend", "xla", "--mesh", "fsdp=3", "--max-seq-length", "5000"),
        *("--dataset-name", problems, "--format", "gsm8k", "--dataset-name", missing, "--format", "nope"),
        *("--dataset-weight", "1", "--dataset-weight", "-1"),
        *("--bf16", "--precision", "fp32", "--global-batch-size", "8", "--gradient-accumulation-steps", "2"),
        *("--learning-rate", "nan", "--optim", "sgd", "--remat", "some", "--profile-steps", "15-10"),
        PJRT_DEVICE="CPU",
        CPU_NUM_DEVICES="4",
        WORLD_SIZE="2",
    )
    faults = listed(said)
    expected = [
        "--bf16 and --precision fp32",
        "--optim 'sgd'",
        "--remat 'some'",
        "--profile-steps '15-10'",
        "--learning-rate nan",
        "--global-batch-size 8",
        "--format 'nope'",
        "--dataset-weight -1.0",
        "WORLD_SIZE=2",
        "column 'question'",
        "column 'answer'",
        "multiplies to 3",
        "--max-seq-length 5000",
    ]
    for words in expected:
        assert sum(words in fault for fault in faults) == 1, f"{words!r} in\n{said}"
    assert len(faults) == len(expected)


# --- the YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"a: [1\nb: {", "is not valid YAML"),
        (b"a: \xff\xfe", "is not text in UTF-8"),
        (b"- a\n- b\n", "holds list"),
        (b"learning_rat: 1\n", "'learning_rat' is unknown"),
        (b"max_steps: many\n", "max_steps is 'many'"),
    ],
)
def test_a_yaml_that_cannot_be_used_is_named(
    content: bytes | None, said: str, refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    message = refused("--config", str(path))
    assert str(path) in message and said in message


# --- the output folder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has trained one step, with its checkpoint and model."""
    folder = tmp_path_factory.mktemp("finished") / "runs"
    run = train(folder, "--max-steps", "1", "--run-id", "first", "--backend", "native", env=environment())
    assert run.code == 0, run.output
    return run


SAME = [*TINY, "--max-steps", "1", "--backend", "native"]


def test_the_same_run_id_with_another_learning_rate_is_refused_with_both(refused: Refused, finished: Run) -> None:
    said = refused(*SAME, "--run-id", "first", "--learning-rate", "0.5", output_dir=finished.folder)
    assert "run first" in said and "--learning-rate 2e-05" in said and "0.5" in said and "--run-id" in said


def test_every_setting_that_differs_from_the_runs_is_named(refused: Refused, finished: Run) -> None:
    changes = ("--learning-rate", "0.5", "--seed", "1", "--dataset-name", "synthetic-gsm8k")
    said = refused(*SAME, "--run-id", "first", *changes, output_dir=finished.folder)
    assert "--learning-rate" in said and "--seed 42" in said and "the datasets" in said


def test_a_folder_with_another_runs_checkpoints_is_refused_and_left_alone(refused: Refused, finished: Run) -> None:
    assert finished.checkpoints
    said = refused(*SAME, "--learning-rate", "0.5", output_dir=finished.folder)
    assert str(finished.folder) in said and "first" in said
    assert "--learning-rate 2e-05, here 0.5" in said and "another --output-dir" in said


def test_an_output_folder_that_is_a_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine", encoding="utf-8")
    assert f"--output-dir {path} is a file" in refused(*SAME, output_dir=path)
    assert path.read_text(encoding="utf-8") == "mine"
