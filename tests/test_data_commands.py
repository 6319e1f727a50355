"""The ``data`` commands, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.cli import run_command

pytestmark = pytest.mark.usefixtures("native_here")


def rows(*numbers: int) -> list[dict[str, str]]:
    return [
        {"question": f"What are {n} and {n}?", "answer": f"{n}+{n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in numbers
    ]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Three files: rows to train on, a benchmark that asks two of them, and one that asks none."""
    files = {"train": rows(*range(30)), "overlapping": rows(3, 5, 99), "apart": rows(77)}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: str(tmp_path / f"{name}.jsonl") for name in files}


def run(command: str, *arguments: str, cache: Path | None = None) -> int:
    model = ["--model-name", "tiny-qwen3"] if command != "check" else []
    cached = ["--cache-dir", str(cache)] if cache else []
    return run_command(["data", command, *model, *cached, *arguments])


def test_preview_marks_the_targets(data: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("preview", "--dataset-name", data["train"]) == 0
    output = capsys.readouterr().out
    assert output.count("⟦") == 3 and "⟦1+1 = 2\n#### 2<|im_end|>⟧" in output
    assert "format gsm8k" in output and "\x1b" not in output


def test_preview_colours_on_demand_and_shows_tool_calls(
    data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dataset-name", data["train"], "--rows", "1", "--color", "--gsm8k-style", "calculator")
    assert run("preview", *options) == 0
    output = capsys.readouterr().out
    assert "\x1b[" in output and '"name": "calculator"' in output


def test_preview_says_why_a_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "no final line"}) + "\n")
    assert run("preview", "--dataset-name", str(path), "--format", "gsm8k") == 0
    assert "row 0: refused: GSM8K answer has 0 lines that start with ####" in capsys.readouterr().out


def test_prepare_fills_the_cache_and_says_what_came_of_the_rows(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prepare", "--dataset-name", data["train"], cache=tmp_path / "cache") == 0
    assert "30 rows, 30 kept, 0 dropped" in capsys.readouterr().out
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_report_is_written_with_its_picture(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for place, options in (("data-report", ()), ("other", ("--report-dir", str(tmp_path / "other")))):
        assert run("report", "--dataset-name", data["train"], *options) == 0
        written = {path.name for path in (tmp_path / place).iterdir()}
        assert written == {"data_report.json", "data_report.md", "lengths.png"}
    assert any((tmp_path / "numina_finetune").iterdir()), "prepared once, where all commands look"


def test_check_finds_a_benchmarks_questions_and_exits_3(
    data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("--dataset-name", data["train"], "--against", data["overlapping"])
    assert run("check", *names, "--against", data["apart"]) == 3
    output = capsys.readouterr().out
    assert f"{data['overlapping']}: 2 rows ask the same question" in output
    assert f"{data['apart']}: 0 rows ask the same question" in output
    assert run("check", *names, "--decontaminate") == 0
    assert run("check", "--dataset-name", data["train"], "--against", data["apart"]) == 0


def test_decontaminate_drops_them_from_what_is_prepared(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dataset-name", data["train"], "--against", data["overlapping"], "--decontaminate")
    assert run("prepare", *options, cache=tmp_path / "cache") == 0
    assert "30 rows, 28 kept, 2 dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        ([], ["--dataset-name is missing"]),
        (["--dataset-name", "no.jsonl", "--chat-date", "June"], ["no.jsonl does not exist", "--chat-date 'June'"]),
        (["--dataset-name", "{train}", "--decontaminate"], ["--decontaminate has no benchmark"]),
        (["--dataset-name", "{train}", "--against", "no.jsonl"], ["--against no.jsonl does not exist"]),
        (["--dataset-name", "{train}", "--dataset-max-samples", "0"], ["--dataset-max-samples 0"]),
        (["--dataset-name", "{train}", "--tool-input-field", "tool"], ["'tool' is missing", "--tool-input-field"]),
        (["--dataset-name", "{train}", "--tir-style", "x", "--overlong", "y"], ["--tir-style 'x'", "--overlong 'y'"]),
    ],
)
def test_wrong_commands_are_told_all_at_once_with_exit_2(
    data: dict[str, str], arguments: list[str], faults: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prepare", *(argument.format(**data) for argument in arguments)) == 2
    message = capsys.readouterr().err
    assert all(fault in message for fault in faults), message


def test_yaml_names_every_field_of_a_source(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    source: dict[str, Any] = {"name": data["train"], "format": "gsm8k", "max_samples": 7}
    config = {"model_name": "tiny-qwen3", "datasets": [source], "against": [data["apart"]], "gsm8k_style": "calculator"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert run_command(["data", "prepare", "--config", str(tmp_path / "run.yaml"), "--cache-dir", str(tmp_path)]) == 0
    assert "30 rows, 30 kept" in capsys.readouterr().out
