"""``--dry-run``: one page on what a command would do, and nothing done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from numina_finetune import cli
from numina_finetune.config import RunConfig
from tests.conftest import TINY, environment, train

Page = dict[str, str]
"""Its sections by title."""


def sections(text: str) -> Page:
    parts = re.split(r"^# (?=configuration|what would|data|the first|memory|where|downloads)", text, flags=re.MULTILINE)
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts[1:]}


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    return [*TINY, "--output-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"), "--max-steps", "2"]


@pytest.fixture
def dry(tiny: list[str], capsys: pytest.CaptureFixture[str], native_here: None) -> Callable[..., Page]:
    def run(*more: str) -> Page:
        assert cli.run_command([*tiny, "--backend", "native", "--dry-run", *more]) == 0
        return sections(capsys.readouterr().out)

    return run


def test_the_configuration_is_whole_says_where_it_comes_from_and_gives_the_same_run_again(
    dry: Callable[..., Page], tmp_path: Path
) -> None:
    text = "Solve:\n\n  step by step. " + "Think before you write. " * 5
    told = dry(
        "--system-prompt", text, "--max-seq-length", "512", "--no-gradient-checkpointing", "--report-to", "wandb"
    )["configuration"]
    again = RunConfig.from_mapping(yaml.safe_load(told))
    assert again.system_prompt == text and again.remat == "none" and not again.dry_run
    for line in ("remat: none  # given", "seed: 42  # default", f"run_id: {again.run_id}  # derived"):
        assert line in told.splitlines()
    (tmp_path / "run.yaml").write_text(told, encoding="utf-8")
    page = dry("--config", str(tmp_path / "run.yaml"), "--seed", "7", "--max-seq-length", "512")
    from_file = RunConfig.from_mapping(yaml.safe_load(page["configuration"]))
    assert from_file.seed == 7 and from_file.run_id == again.run_id and from_file.system_prompt == text
    assert "remat: none  # of --config" in page["configuration"].splitlines()
    assert "seed: 7  # given" in page["configuration"].splitlines()
    assert "wandb: project numina_finetune" in page["where everything goes"]


def test_the_first_batch_is_shown_as_the_model_sees_it(dry: Callable[..., Page]) -> None:
    page = dry("--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2")
    batch = page["the first batch, targets between ⟦ and ⟧"]
    assert "2 optimizer steps of 4 rows (2 x 2); 128 tokens a row" in page["what would run"]
    assert "sample 0: " in batch and "row 3: " in batch and "4 rows in the optimizer step" in batch
    assert re.search(r"<\|im_start\|>assistant\n<think>\n\n</think>\n\n⟦[^⟧]*####[^⟧]*<\|im_end\|>⟧", batch)
    targets = re.findall(r"sample \d+: \d+ tokens, (\d+) supervised", batch)
    row = re.search(r"row 0: \d+ tokens in 128 places, (\d+) supervised; samples packed in it: (\d+)", batch)
    assert row and int(row[2]) == len(targets) > 1 and int(row[1]) == sum(map(int, targets))


def test_the_memory_of_a_device_is_reckoned_from_the_shapes(dry: Callable[..., Page]) -> None:
    """Of 1,057,856 parameters: 4 bytes each, as much for the gradient, twice that for AdamW."""
    whole = dry()["memory of a device"]
    assert whole.startswith("1,057,856 parameters are trained; a device holds at least 0.017")
    assert "weights 0.00423 GB, gradients 0.00423 GB, optimizer 0.00846 GB" in whole
    adapters = dry("--lora-rank", "4")["memory of a device"]
    trained = re.match(r"([\d,]+) parameters are trained, 1,057,856 frozen", adapters)
    assert trained and int(trained[1].replace(",", "")) < 100_000


def test_it_writes_nothing_but_the_cache_and_says_what_is_there(
    dry: Callable[..., Page], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = dry()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert "would begin at step 0 of 2" in page["what would run"] and "(is new)" in page["where everything goes"]
    assert cli.run_command([*tiny, "--backend", "native"]) == 0
    capsys.readouterr()
    files = sorted(tmp_path.rglob("*"))
    later = dry()
    assert "all 2 steps are made: " in later["what would run"]
    assert "(is there already)" in later["where everything goes"]
    assert sorted(tmp_path.rglob("*")) == files
    assert cli.run_command([*tiny, "--backend", "native", "--dry-run", "--resume-from-checkpoint", "none"]) == 2
    assert "has a checkpoint of step 2" in capsys.readouterr().err


@pytest.mark.slow
def test_it_knows_the_mesh_of_several_devices(tmp_path: Path) -> None:
    run = train(
        tmp_path / "out", "--dry-run", "--max-steps", "2", "--mesh", "data=2,fsdp=2", env=environment(devices=4)
    )
    assert run.code == 0, run.output
    page = sections(run.output)
    assert "mesh data=2,fsdp=2" in page["what would run"] and "steps of 4 rows" in page["what would run"]
    assert "weights 0.00212 GB" in page["memory of a device"]
    assert not (tmp_path / "out").exists()
