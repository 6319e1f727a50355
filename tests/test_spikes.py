"""A run whose data hold something odd: the step that takes it is told, with its rows, and the rows can be looked at."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from numina_finetune import cli

ODD = "zyx wvu tsr qpo nml kji"


def write_chats(path: Path) -> None:
    """80 times nearly the same, and in one of them an answer like no other."""
    letters = random.Random(0)
    rows = []
    for number in range(80):
        answer = f"It is {number % 10}."
        if number == 40:
            answer = ODD + "".join(letters.choice("QWXZJKqwxzjk#@~^") for _ in range(30))
        messages = [{"role": "user", "content": f"Say {number % 10}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_odd_data_are_told_by_their_step_and_found_by_their_rows(
    tmp_path: Path, native_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chats(tmp_path / "chats.jsonl")
    data = ["--dataset-name", str(tmp_path / "chats.jsonl"), "--format", "messages", "--model-name", "tiny-qwen3"]
    data += ["--max-seq-length", "96", "--no-packing", "--cache-dir", str(tmp_path / "cache"), "--seed", "6"]
    # At this rate forty steps are enough to know what is usual, and the gradient still points somewhere.
    training = ["--learning-rate", "1e-3", "--lr-scheduler-type", "wsd", "--gradient-noise"]
    training += ["--per-device-train-batch-size", "2", "--max-steps", "40", "--save-steps", "0"]
    run = ["--backend", "native", "--run-id", "mine", "--output-dir", str(tmp_path / "runs"), *data, *training]
    assert cli.run_command(run) == 0
    told = capsys.readouterr().out
    lines = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    spikes = [record for record in records if "spike" in record]
    worst = max(spikes, key=lambda record: record["spike"]["loss"])
    first, last = worst["spike"]["rows"]
    assert (first, last) == (2 * worst["step"] - 2, 2 * worst["step"] - 1)
    assert f"step {worst['step']} stands out" in told and f"--run-rows {first}-{last}" in told
    assert f"by their loss or gradient norm: {len(spikes)} (" in told
    assert [record for record in records if record.get("noise_scale_rows", 0) > 0]

    assert cli.run_command(["data", "preview", *data, "--run-rows", f"{first}-{last}"]) == 0
    assert ODD in capsys.readouterr().out
