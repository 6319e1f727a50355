"""Reading ``metrics.jsonl`` back, however it was left, and what a terminal shows of it."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from numina_finetune.train.display import Display
from numina_finetune.train.metrics import kept_seconds, parse_metrics, productive_seconds
from numina_finetune.train.report import _keep_records_up_to


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_step_made_again_counts_for_the_life_that_made_it_last() -> None:
    text = lines(
        {"step": 1, "loss": 3.0, "life": 1},
        {"step": 2, "loss": 2.0, "life": 1},
        {"step": 2, "loss": 2.0, "life": 2},
        {"step": 2, "eval_loss": 2.5, "life": 2},
        {"step": 2, "eval_accuracy": 0.5, "life": 2},
        {"step": 2, "checkpoint": {"stall_seconds": 1.0}, "life": 2},
    )
    metrics = parse_metrics(text + '{"step": 3, "lo')
    assert [(record["step"], record["life"]) for record in metrics.steps] == [(1, 1), (2, 2)]
    assert [(record["eval_loss"], record["eval_accuracy"]) for record in metrics.evaluations] == [(2.5, 0.5)]
    assert len(metrics.checkpoints) == 1
    assert metrics.torn == 1


@pytest.mark.parametrize("text", ["", "\n", "[]\n", "3\n", "{}\n", "null"])
def test_what_is_no_record_is_left_out(text: str) -> None:
    assert parse_metrics(text).steps == []


def test_compiling_does_not_count_as_productive() -> None:
    assert productive_seconds([60.0, 2.0, 2.0, 2.0]) == 8.0
    assert productive_seconds([]) == 0.0
    steps = [{"step": n, "loss": 1.0, "life": 1 if n < 4 else 2, "seconds_per_step": 9.0 if n in (1, 4) else float(n)}
             for n in range(1, 7)]  # fmt: skip
    assert kept_seconds(parse_metrics(lines(*steps))) == 3 * 3.0 + 3 * 6.0


def test_a_resumed_life_keeps_what_the_checkpoint_has_and_counts_the_rest_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    made = [{"step": n, "loss": 1.0, "life": 1, "seconds_per_step": 0.5, "time": 100.0 + n} for n in range(1, 6)]
    evaluations = [{"step": 3, "eval_accuracy": 0.5, "life": 1}]
    later = {"step": 4, "eval_accuracy": 0.6, "life": 1}
    path.write_text(lines(*made[:3], *evaluations, *made[3:], later) + '{"step": 6, "l', encoding="utf-8")
    lost = _keep_records_up_to(path, 3, 2)
    assert lost == [{"step": 3, "lost": {"life": 1, "steps": 2, "seconds": 1.0, "time": 105.0}, "life": 2}]
    kept = parse_metrics(path.read_text(encoding="utf-8"))
    assert [record["step"] for record in kept.steps] == [1, 2, 3]
    assert kept.evaluations == evaluations, "it is of the state that the next life begins from"


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_the_display_shows_the_newest_figures_below_the_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    display = Display(20, 100, console)
    display.advance(20)
    display.show({"step": 21, "loss": 1.25, "learning_rate": 2e-5, "tokens_per_second": 1234.5, "seconds_per_step": 2})
    display.show({"step": 21, "eval_accuracy": 0.5, "eval_accuracy_lower": 0.4, "eval_accuracy_upper": 0.6})
    display.goodput = 0.875
    with console.capture() as shown:
        console.print(display)
    display.close()
    for part in ("step 21/100", "2:3", "loss 1.2500", "lr 2.00e-05", "1,234 tokens/s", "checkpoint of step 20",
                 "goodput 88%", "accuracy 50.0% (40.0% to 60.0%)"):  # fmt: skip
        assert part in shown.get()


def test_log_lines_move_the_display_out_of_their_way_and_handlers_get_their_stream_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        display = Display(0, 10, Console(file=screen, force_terminal=True, width=80))
        assert handler.stream is not screen
        logging.getLogger().warning("a line")
        display.close()
        assert handler.stream is screen and sys.stdout is screen
    finally:
        logging.getLogger().removeHandler(handler)
    assert "a line" in screen.getvalue()
