"""``numina-finetune plan`` from the command line, with a compiler that answers at once."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from numina_finetune import cli
from numina_finetune.config import RunConfig
from numina_finetune.plan import command
from numina_finetune.plan.compilation import Candidate, Fitted, Outcome, TooLarge
from numina_finetune.plan.costs import Costs
from numina_finetune.plan.memory import Allocation, Memory
from numina_finetune.tpu import Slice

ASKED = ["plan", "--tpu", "v5litepod-8", "--model-name", "Qwen/Qwen3-0.6B"]
SIZES = {"argument": 900, "output": 900, "alias": 890, "temp": 3000, "generated_code": 50, "peak": 3500}
ROOM = 10
"""Rows a chip that fit, to the fake compiler."""


class FakeCompiler:
    """Stands where libtpu's compiler does."""

    def __init__(self, tpu: Slice, geometry: dict[str, Any], folder: Path) -> None:
        self._limit = tpu.chip.hbm_bytes

    def __call__(self, candidate: Candidate) -> Outcome:
        peak = int(self._limit / (ROOM + 0.5) * candidate.batch)
        piece = Allocation(1e9, "weights", "f32[151936,128]{1,0}", "model.embed_tokens.weight", "argument")
        if peak > self._limit:
            return TooLarge(candidate, peak, self._limit, [piece], 1.0, 2.0)
        costs = Costs(
            matmul_flops=35e12,
            collective_count=Counter({"all-gather": 394}),
            collective_bytes=Counter({"all-gather": 2_000_000_000}),
            cycles=8e8,
            hbm_bytes=3e11,
        )
        return Fitted(
            candidate,
            peak,
            peak,
            SIZES,
            Memory((piece,)),
            costs,
            596_049_920,
            596_049_920,
            6.0 * 596_049_920,
            1.0,
            2.0,
            2.0,
            {"libtpu": "0"},
        )


@pytest.fixture
def compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TpuCompiler", FakeCompiler)
    monkeypatch.setattr(command, "missing_packages", list)


@pytest.fixture
def asked(compiled_at_once: None, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*options: str) -> tuple[int, str, str]:
        code = cli.run_command([*ASKED, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ask


def test_the_report_names_memory_costs_bound_and_advice(asked: Any) -> None:
    code, out, _ = asked("--per-device-train-batch-size", "8")
    assert code == 0
    assert "fits" in out and "model.embed_tokens.weight" in out
    assert "1.19 times" in out, "35 TFLOP over 6·N·tokens"
    assert "all-gather 394 x, 2.00 GB" in out
    assert "a bound, not a prediction" in out
    assert f"the largest batch that fits is {ROOM}" in out


def test_a_global_batch_bounds_the_advice_and_is_named_in_it(asked: Any) -> None:
    """Eight rows a chip are all of 64 rows on eight chips, however much more would fit."""
    _, out, _ = asked("--per-device-train-batch-size", "8", "--global-batch-size", "64")
    assert "the largest batch that fits, of those that make up the global batch of 64 rows, is 8 " in out


def test_json_has_the_keys_that_machines_read(asked: Any) -> None:
    code, out, _ = asked("--per-device-train-batch-size", "8", "--json", "--max-compilations", "1")
    told = json.loads(out)
    assert code == 0 and told["fits"]
    assert told["hbm_capacity_bytes"] == int(15.75 * 2**30)
    assert told["tokens_per_step"] == 8 * 8 * 1024
    assert told["matmul_flops"] == 35e12 and told["collective_bytes"] == 2e9 and told["estimated_cycles"] == 8e8
    assert told["peak_hbm_bytes"] == pytest.approx(sum(told["hbm_by_kind"].values()))
    assert set(told["hbm_by_kind"]) == {
        *("weights", "gradients", "optimizer", "saved activations", "logits", "collectives", "batch"),
        *("working memory", "program", "other"),
    }
    assert set(told["bound_seconds"]) == {"compute", "memory", "interconnect", "step"}
    assert len(told["compilations"]) == 1


def test_what_does_not_fit_ends_with_3_and_says_what_would(asked: Any) -> None:
    code, out, _ = asked("--per-device-train-batch-size", "32")
    assert code == 3
    assert "DOES NOT FIT" in out
    assert f"the largest batch that fits is {ROOM}" in out


def test_json_of_what_does_not_fit_has_the_same_keys(asked: Any) -> None:
    _, fits, _ = asked("--per-device-train-batch-size", "8", "--json", "--max-compilations", "1")
    code, refused, _ = asked("--per-device-train-batch-size", "32", "--json", "--max-compilations", "1")
    assert code == 3
    assert json.loads(fits).keys() == json.loads(refused).keys()
    assert json.loads(refused)["matmul_flops"] is None
    assert json.loads(refused)["largest_allocations"]


def test_a_global_batch_sets_the_accumulation(asked: Any) -> None:
    _, out, _ = asked("--per-device-train-batch-size", "2", "--global-batch-size", "64", "--json")
    told = json.loads(out)
    assert told["gradient_accumulation_steps"] == 4
    assert told["largest_batch"] == 8, "a chip's share of 64 rows on 8 chips"


def test_several_slices_are_meshes_with_a_dcn_axis(asked: Any) -> None:
    _, out, _ = asked("--mesh", "dcn=2,fsdp=8", "--json", "--max-compilations", "1")
    told = json.loads(out)
    assert (told["slices"], told["chips"]) == (2, 16)
    assert any("data-centre network" in note for note in told["notes"])


def test_a_dataset_gives_hours_and_a_price(asked: Any, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("date: 2026-11-01\nprices: {v5litepod: {us-west4: 2.0, us-east1: 3.0}}\n")
    code, out, _ = asked(
        *("--dataset-name", "synthetic-gsm8k[test]", "--format", "gsm8k", "--model-name", "tiny-qwen3"),
        *("--max-seq-length", "128", "--per-device-train-batch-size", "1", "--max-compilations", "1"),
        *("--json", "--prices", str(prices), "--cache-dir", str(tmp_path / "cache")),
    )
    training = json.loads(out)["training"]
    assert code == 0
    assert training["rows"] > 0 and training["steps"] == -(-training["rows"] // 8)
    assert training["region"] == "us-west4" and str(prices) in training["price_source"]
    assert training["dollars"] == pytest.approx(training["hours"] * 8 * 2.0)


def test_a_hub_out_of_reach_costs_the_price_alone(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is asked once: the hub's libraries would go on asking for a minute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # whatever is set is taken back after the test
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    asked_for = []

    def unreadable(config: RunConfig) -> int:
        asked_for.append(os.environ["HF_HUB_OFFLINE"])
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more")

    monkeypatch.setattr(command, "dataset_rows", unreadable)
    code, out, _ = asked("--dataset-name", "openai/gsm8k", "--format", "gsm8k", "--max-compilations", "1")
    assert code == 0 and asked_for == ["1"]
    assert out.endswith("cannot be read here: Couldn't reach 'openai/gsm8k' on the Hub\n")


def test_progress_does_not_spoil_the_output(asked: Any) -> None:
    _, out, err = asked("--json", "--max-compilations", "1")
    json.loads(out)
    assert "compiling batch 8" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tpu", "v5litepod-12"], ["'v5litepod-12'", "8 and 16"]),
        (["--tpu", "h100-8"], ["'h100-8'", "v5litepod-N"]),
        (["--mesh", "fsdp=3"], ["'fsdp=3'", "8 devices", "fsdp=8"]),
        (["--mesh", "fsdp=4,tenser=2"], ["'tenser'", "tensor"]),
        (["--mesh", "tensor=8", "--model-name", "Qwen/Qwen3-8B", "--tpu", "v5litepod-16"], ["tensor=8", "16 devices"]),
        (["--mesh", "tensor=16", "--tpu", "v5litepod-16"], ["tensor=16", "8 key-value heads"]),
        (["--max-seq-length", "100000"], ["100000", "40960 or less"]),
        (["--remat", "some"], ["'some'", "none, dots, full"]),
        (["--max-compilations", "9"], ["--max-compilations 9", "1 to 8"]),
        (["--max-compilations", "0"], ["--max-compilations 0", "1 to 8"]),
        (["--prices", "nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
        (["--per-device-train-batch-size", "3", "--global-batch-size", "64"], ["64 rows", "24"]),
        (["--model-name", "no/such/folder"], ["no/such/folder", "no such folder"]),
        (["--per-device-train-batch-size", "0"], ["0 is too small"]),
    ],
)
def test_bad_input_is_told_before_anything_is_compiled(asked: Any, options: list[str], expected: list[str]) -> None:
    code, out, err = asked(*options)
    assert code == 2 and out == ""
    assert "compiling" not in err
    for part in expected:
        assert part in err


def test_a_missing_slice_is_told(compiled_at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["plan", "--model-name", "Qwen/Qwen3-0.6B"]) == 2
    assert "--tpu is missing" in capsys.readouterr().err


def test_a_region_without_a_price_is_told(asked: Any, tmp_path: Path) -> None:
    code, _, err = asked(
        *("--dataset-name", "synthetic-gsm8k[test]", "--format", "gsm8k", "--model-name", "tiny-qwen3"),
        *("--max-seq-length", "128", "--per-device-train-batch-size", "1", "--region", "mars-north1"),
    )
    assert code == 2
    assert "mars-north1" in err and "us-central1" in err
    assert "compiling" not in err


def test_what_is_not_installed_is_told(
    asked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "missing_packages", lambda: ["libtpu"])
    code, _, err = asked()
    assert code == 2
    assert "plan needs libtpu" in err and "numina_finetune[plan]" in err
