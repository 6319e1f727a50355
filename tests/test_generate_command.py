"""``generate`` as a command: what is asked, where answers go, kills, and every refusal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from numina_finetune import cli
from numina_finetune.cli import backends
from numina_finetune.config import RunConfig
from numina_finetune.evaluation.sandbox import Minimum
from numina_finetune.models.load import load_model
from numina_finetune.models.tokenizer import load_tokenizer
from tests.evaluation.tiers import missing

TINY = ("generate", "--model", "tiny-qwen3", "--max-new-tokens", "8")

pytestmark = pytest.mark.usefixtures("native_here")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_answer_is_printed_alone_and_is_the_continuation_that_transformers_gives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run_command([*TINY, "--raw", "--prompt", "Question: 2+2?"]) == 0
    said = capsys.readouterr()
    config = RunConfig(model_name="tiny-qwen3", seed=42)
    tokenizer = load_tokenizer(config)
    ids = torch.tensor([tokenizer("Question: 2+2?")["input_ids"]])
    model = load_model(config, tokenizer)
    model.set_attn_implementation("eager")
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert said.out == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert "1/1 prompts" in said.err


def test_text_in_a_pipe_is_one_prompt_and_a_dash_is_one_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert cli.run_command([*TINY]) == 0
    assert "1 prompts, 1 to do" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    limits = ("--max-rounds", "2", "--tool-seconds", "5", "--tool-memory-mb", "512", "--tool-output-chars", "100")
    assert cli.run_command([*TINY, "--prompts", "-", "--tools", "python", "--sandbox-minimum", "none", *limits]) == 0
    said = capsys.readouterr()
    assert "2 prompts, 2 to do" in said.err and "# prompt 1" in said.out


def test_tools_run_as_isolated_as_is_asked_for_by_default_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    lacks = missing(Minimum.ISOLATED)
    words = ["generate", "--model", "tiny-qwen3", "--prompt", "2+2?", "--tools", "python"]
    assert cli.run_command(words) == (2 if lacks else 0)
    said = capsys.readouterr()
    assert "--sandbox-minimum isolated" in said.err if lacks else "1/1 prompts" in said.err


def test_a_file_of_answers_goes_on_where_it_was_cut_and_takes_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+3?"}]
    rows = [{"prompt": "2+2?"}, {"messages": chat}, {"messages": chat[1:]}, {"prompt": "2+2?"}]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "new" / "answers.jsonl"
    drawn = ("--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--samples", "2", "--batch-size", "2")
    command = [*TINY, *drawn, "--prompts", str(asked), "--system-prompt", "Be brief.", "--output", str(out)]
    assert cli.run_command(command) == 0
    whole = records(out)
    assert [record.get("prompt", record.get("messages")) for record in whole] == ["2+2?", chat, chat[1:], "2+2?"]
    assert all(len(record["answers"]) == 2 for record in whole)
    assert whole[1]["answers"] == whole[2]["answers"], "--system-prompt stands where a chat has no system message"
    assert whole[0] == whole[3] and whole[0]["answers"][0] != whole[0]["answers"][1]
    text = out.read_text(encoding="utf-8")
    out.write_text(text[: text.index("\n", text.index("\n") + 1) + 20], encoding="utf-8")  # two lines, and a bit
    capsys.readouterr()
    assert cli.run_command([*command[:-2], "--batch-size", "8", "--output", str(out)]) == 0
    assert "4 prompts, 2 to do" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == text, (
        "what is drawn depends neither on the batches nor on where it was cut"
    )
    assert cli.run_command([*command, "--seed", "1"]) == 2
    assert "line 1 is of another command" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == text


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is said to a command that cannot work, before any device is touched."""

    def reached(name: str) -> Any:
        def make(config: RunConfig) -> Any:
            raise AssertionError("not refused")

        return make

    monkeypatch.setattr(backends, "factory", reached)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))

    def refused(*arguments: str) -> str:
        assert cli.run_command([*TINY, *arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return refused


def test_what_cannot_be_asked_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    def file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    assert "nothing is asked" in refusal()
    assert "prompt 0 is empty" in refusal("--prompt", "", "--prompt", "a")
    assert "cannot be read" in refusal("--prompts", str(tmp_path / "absent.txt"))
    assert "give .txt (one prompt a line) or .jsonl" in refusal("--prompts", file("a.csv", "x"))
    assert "holds no prompt" in refusal("--prompts", file("a.txt", "\n\n"))
    rows = '{"prompt": 3}\n{"question": "x"}\nnot JSON\n{"messages": []}\n{"prompt": "a", "tools": [1]}\n'
    told = refusal("--prompts", file("bad.jsonl", rows))
    for fault in ("line 1: prompt is 3", "line 2: it needs", "line 3: no JSON", "line 4: ", "line 5: it brings tools"):
        assert fault in told
    answered = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    assert "end with the assistant's answer" in refusal("--prompts", file("done.jsonl", answered))
    chat = file("chat.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')
    assert "a chat has no place in --raw" in refusal("--prompts", chat, "--raw")
    assert "is more than the 4096 positions" in refusal("--prompt", "a", "--max-new-tokens", "4096")
    assert "ends in .jsonl" in refusal("--prompt", "a", "--output", file("notes.txt", "mine"))
    assert "line 1 is of another command" in refusal("--prompt", "a", "--output", file("notes.jsonl", "mine\n"))
    assert (tmp_path / "notes.jsonl").read_text(encoding="utf-8") == "mine\n"


def test_contradictions_are_told_together(refusal: Callable[..., str]) -> None:
    both = ("--prompt", "a", "--prompts", "b.txt", "--output", "gs://bucket/a.jsonl", "--top-k", "3")
    told = refusal(*both, "--raw", "--system-prompt", "s", "--tools", "python")
    for fault in (
        *(
            "--prompt and --prompts b.txt both",
            "--system-prompt has no place in --raw",
            "--tools has no place in --raw",
        ),
        *("--output gs://bucket/a.jsonl: answers are written into a file here", "--top-k 3 is of sampling"),
    ):
        assert fault in told
