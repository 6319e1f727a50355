"""A run's page, whatever state the run was left in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from numina_finetune import cli
from numina_finetune.run_report.gather import gather
from numina_finetune.run_report.page import page
from numina_finetune.storage import open_store


def step(number: int, life: int, **more: Any) -> dict[str, Any]:
    figures = {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 100, "tokens_per_second": 50.0}
    speed = {"seconds_per_step": 2.0, "applied": True, "time": 1000.0 + 10 * number}
    return {"step": number, "loss": 3.0 / number, **figures, **speed, "life": life, **more}


def write_run(folder: Path) -> Path:
    """Life 1 made five steps and was killed; life 2 went on from step 3, skipped one step, evaluated, and ended."""
    run = folder / "mine"
    for life, began in ((1, 1000.0), (2, 1100.0)):
        (run / "attempts" / str(life)).mkdir(parents=True)
        (run / "attempts" / str(life) / "started.json").write_text(json.dumps({"host": "h", "time": began}), "utf-8")
    outcome = {"kind": "done", "saved_step": 6, "reason": "all steps made", "seconds": {"save": 1.0, "restore": 2.0}}
    (run / "attempts/2/outcome.json").write_text(json.dumps({**outcome, "host": "h", "time": 1112.0}), "utf-8")
    usual = {"usual_loss": 0.75, "usual_grad_norm": 0.9}
    spike = {"loss": 1.5, "grad_norm": 1.0, **usual, "above": ["loss"], "rows": [1024, 1031]}
    records = [
        *(step(n, 1, noise_scale_rows=64.0) for n in (1, 2, 3)),
        {"step": 3, "lost": {"life": 1, "steps": 2, "seconds": 4.0, "time": 1010.0}, "life": 2},
        *(step(4, 2), step(5, 2, applied=False, loss=float("nan"), grad_norm=float("nan")), step(6, 2)),
        {"step": 2, "spike": spike, "life": 1},
        {"step": 3, "checkpoint": {"stall_seconds": 0.5, "total_seconds": 1.5, "bytes": 10**9}, "life": 1},
        {"step": 6, "eval_loss": 1.25, "eval_tokens": 10, "eval_accuracy": 0.5, "life": 2},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    config = {"model_name": "<b>tiny</b>", "datasets": []}
    record = {"run_id": "mine", "total_steps": 6, "config": config, "versions": {"torch": "2.9.0"}, "git": None}
    (run / "run.yaml").write_text(yaml.safe_dump(record), "utf-8")
    dropped = {"too long": {"count": 3}}
    source = {"name": "rows", "split": "train", "format": "qa", "rows": 10, "kept": 7, "tokens": 70, "dropped": dropped}
    report = {"data_key": "abc", "sources": [{**source, "supervised_tokens": 30}]}
    (run / "data_report.json").write_text(json.dumps(report), "utf-8")
    return run


def test_lives_are_told_apart_and_lost_work_is_counted(tmp_path: Path) -> None:
    account = gather(open_store(write_run(tmp_path)))
    first, second = account.lives
    assert (first.kind, first.first_step, first.last_step, first.lost_steps, first.wall) == (
        "no outcome",
        1,
        3,
        2,
        30.0,
    )
    assert (second.kind, second.first_step, second.last_step, second.saved_step, second.wall) == ("done", 4, 6, 6, 12.0)
    assert account.skipped == [5]
    # Six steps that count at 2 s each, in 30 s and 12 s.
    assert account.goodput == pytest.approx(12 / 42)


def test_the_page_has_every_figure_as_text_and_every_picture_twice(tmp_path: Path) -> None:
    text = page(gather(open_store(write_run(tmp_path))))
    for shown in ("6 of 6", "1.2500", "50.0%", "28.6%", "3 too long", "2.9.0", "2 (4.0 s)", "abc", "1,024 to 1,031"):
        assert shown in text
    assert text.count("data:image/png;base64,") == 2 * 9, "each for a light and a dark ground"
    assert "<b>tiny" not in text and "&lt;b&gt;tiny" in text, "what comes from outside is text"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: (run / "data_report.json").unlink(), "nothing is known of the data"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no step is on record"),
        (lambda run: (run / "metrics.jsonl").write_text("", "utf-8"), "holds no training step yet"),
        (lambda run: (run / "metrics.jsonl").open("a").write('{"step": 7, "lo'), "1 line(s) of metrics.jsonl"),
        (lambda run: (run / "run.yaml").write_text("a: [", "utf-8"), "the settings are not known"),
        (lambda run: (run / "attempts/2/outcome.json").unlink(), "life 2 left no outcome"),
        (lambda run: (run / "attempts/2/outcome.json").write_text("{", "utf-8"), "life 2 left no outcome"),
    ],
)
def test_what_a_kill_leaves_is_shown_and_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, told: str
) -> None:
    run = write_run(tmp_path)
    spoil(run)
    assert cli.run_command(["report", str(run)]) == 0
    assert told in capsys.readouterr().out
    assert told in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_only_began_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for name in ("metrics.jsonl", "data_report.json", "attempts/2/outcome.json"):
        (run / name).unlink()
    assert cli.run_command(["report", str(tmp_path), "--output", str(tmp_path / "pages" / "mine.html")]) == 0
    assert "Run mine" in (tmp_path / "pages" / "mine.html").read_text(encoding="utf-8")


def test_a_place_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["report", str(tmp_path)]) == 2
    assert "there is no run" in capsys.readouterr().err
