"""What a pipeline's file says, what is wrong with it, and what a step's key depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from numina_finetune import cli
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.pipeline.command import RunOptions, load
from numina_finetune.pipeline.plan import Step
from tests.conftest import ROOT
from tests.pipeline.bench import TINY

PIPELINES = ROOT / "configs" / "pipelines"


def planned(path: Path, output_dir: str = "/runs") -> tuple[dict[str, Step], list[str]]:
    """The steps by name, and what is wrong with them."""
    faults: list[str] = []
    _, steps = load(RunOptions(str(path), output_dir), faults)
    return {step.name: step for step in steps}, faults


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("output_dir", ["/runs", "gs://bucket/runs"])
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("quickstart", ["cot-data", "cot", "tir-data", "tir", "answers", "export"]),
        ("numina_two_stage", ["cot-data", "cot", "tir-data", "tir", "gsm8k", "math500", "export"]),
    ],
)
def test_the_pipelines_that_come_with_the_package_are_without_fault(
    name: str, order: list[str], output_dir: str
) -> None:
    steps, faults = planned(PIPELINES / f"{name}.yaml", output_dir)
    assert faults == []
    assert list(steps) == order
    assert steps["tir"].options["model_name"] == f"{steps['cot'].location.url}/model"
    assert steps["tir"].options["cache_dir"] == f"{steps['tir-data'].location.url}/cache"
    assert set(steps["tir"].needs) == {"cot", "tir-data"} and steps["tir-data"].needs == ()
    assert steps["export"].location.url.startswith(f"{output_dir}/")


def changed(written: Callable[[str], Path], old: str, new: str) -> set[str]:
    """The steps whose folders are others after a change of the file."""
    before, _ = planned(written(TINY))
    assert TINY.count(old) == 1
    after, faults = planned(written(TINY.replace(old, new)))
    assert faults == []
    return {name for name in before if before[name].location != after[name].location}


@pytest.mark.parametrize(
    ("old", "new", "steps"),
    [
        ("dtype: bf16", "dtype: fp32", {"export"}),
        ("max_steps: 3", "max_steps: 3\n      learning_rate: 2.0e-3", {"cot", "export"}),
        ("max_seq_length: 128", "max_seq_length: 256", {"data", "cot", "export"}),
        ("save_steps: 2", "save_steps: 1", set()),
        ("max_steps: 3", "max_steps: 3\n      weight_decay: 0.0", set()),
        ("max_steps: 3", "max-steps: 3", set()),
        ("max_steps: 3", "max_steps: 3\n      validation_size: 8", {"cot", "export"}),
    ],
)
def test_an_option_changes_its_step_and_those_that_depend_on_it(
    written: Callable[[str], Path], old: str, new: str, steps: set[str]
) -> None:
    assert changed(written, old, new) == steps


def test_another_place_changes_no_step(written: Callable[[str], Path]) -> None:
    path = written(TINY)
    here, there = planned(path)[0], planned(path, "gs://bucket/runs")[0]
    assert [step.key for step in here.values()] == [step.key for step in there.values()]


def test_a_local_file_with_other_rows_is_another_input(tmp_path: Path, written: Callable[[str], Path]) -> None:
    rows = tmp_path / "rows.jsonl"
    path = written(TINY.replace('"synthetic-gsm8k[test]", format: gsm8k', f"{rows}, format: qa"))
    folders = []
    for answer in ("2", "3"):
        rows.write_text(f'{{"question": "1+1", "answer": "{answer}"}}\n', encoding="utf-8")
        steps, faults = planned(path)
        assert faults == []
        folders.append([step.location.folder for step in steps.values()])
    assert not set(folders[0]) & set(folders[1])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: tiny\n", "name: a/b\n", "name is 'a/b': it names a folder"),
        ("name: tiny\n", "name: tiny\nstepz: []\n", "'stepz' is unknown: use one of name, defaults, steps"),
        ("name: tiny\n", "name: tiny\ndefaults: {fly: {}}\n", "'fly' is no kind of step: use one of prepare, train"),
        ("kind: export", "kind: fly", "step 3: kind is 'fly': use one of prepare, train, evaluate, export"),
        ("name: export", "name: cot", "step 3: there is another step cot"),
        ("${cot.run}", "${sft.run}", "step export: ${sft.run} names no step: there are data, cot, export"),
        ("${data.cache}", "${export.model}", "steps wait for one another (cot -> export -> cot)"),
        ("dtype: bf16", "dtype: bf16, kinds: 2", "step export: 'kinds' is unknown: use one of"),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused_naming_the_place(
    written: Callable[[str], Path], old: str, new: str, said: str
) -> None:
    try:
        _, faults = planned(written(TINY.replace(old, new)))
    except ConfigError as error:
        faults = error.problems
    assert any(said in fault for fault in faults), faults


def test_all_that_is_wrong_with_all_steps_is_told_before_the_first_one_begins(
    written: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], native_here: None
) -> None:
    text = TINY.replace("max_seq_length: 128", "max_seq_length: 1").replace("dtype: bf16", "dtype: int4")
    text = text.replace("max_steps: 3", "output_dir: elsewhere").replace("metadata_url: none", "optim: lion")
    text += '  - {name: tir, kind: train, options: {model_name: "${cot.weights}", optim: [1]}}\n'
    text += '  - {name: answers, kind: evaluate, options: {model: "${cot.model}", task: no.jsonl, max_rounds: 2}}\n'
    out = tmp_path / "out"
    assert cli.run_command(["run", str(written(text)), "--output-dir", str(out)]) == ExitCode.CONFIGURATION
    said = capsys.readouterr().err
    for part in (
        "step data: --max-seq-length 1",
        "step cot: output_dir is the pipeline's own",
        "step tir: optim is [1]",
        "step answers: --max-rounds 2 is about calls of tools",
    ):
        assert part in said, said
    assert not out.exists()


def test_what_only_the_libraries_can_see_is_told_too_of_models_that_are_not_there_yet(
    written: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], native_here: None
) -> None:
    text = TINY.replace("dtype: bf16", "dtype: int4, push_to_hub: true, hub_model_id: a/b/c")
    text += (
        '  - {name: tir, kind: train, options: {model_name: "${cot.model}", mesh: fsdp=3, lora_rank: 4, '
        "lora_targets: nothing_proj, backend: xla, datasets: [{name: no.jsonl}]}}\n"
        '  - {name: answers, kind: evaluate, options: {model: "${cot.model}", task: no.jsonl}}\n'
    )
    out = tmp_path / "out"
    assert cli.run_command(["run", str(written(text)), "--output-dir", str(out)]) == ExitCode.CONFIGURATION
    said = capsys.readouterr().err
    for part in (
        "step export: --dtype 'int4' is unknown",
        "step export: --hub-model-id 'a/b/c' cannot name a model",
        "step tir: --lora-targets",
        "step tir: --dataset-name no.jsonl does not exist",
        "step answers: --task no.jsonl does not exist",
    ):
        assert part in said, said
    assert not out.exists()


def test_adapters_of_a_run_without_adapters_are_refused(written: Callable[[str], Path]) -> None:
    _, faults = planned(written(TINY.replace("dtype: bf16", "lora_export: adapter")))
    assert any("--lora-export adapter: cot trains no adapters" in fault for fault in faults)
    lora = TINY.replace("dtype: bf16", "lora_export: adapter").replace(
        "max_steps: 3", "max_steps: 3\n      lora_rank: 2"
    )
    steps, faults = planned(written(lora))
    assert faults == [] and list(steps["export"].outputs) == ["adapter"]
    assert list(steps["cot"].outputs) == ["run", "model", "adapter"]
