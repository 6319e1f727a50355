"""The real compiler: a tiny model's real step, for a TPU that is not there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.conftest import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra `plan`, is not here"),
]
TINY = ["--model-name", "tiny-qwen3", "--tpu", "v5litepod-8", "--max-seq-length", "256", "--max-compilations", "1"]


def plan(*options: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "numina_finetune", "plan", *TINY, *options]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_tiny_step_compiles_for_v5e() -> None:
    code, out, err = plan("--per-device-train-batch-size", "2", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["fits"] and told["topology"] == "v5e:2x4"
    assert 0 < told["peak_hbm_bytes"] < 1e9
    assert 0.9 < told["matmul_flops_ratio"] < 2, "forward, backward, and a second forward"
    assert told["notes"] == [], "every loop's turns are known"
    assert {"all-gather", "all-reduce"} <= told["collectives"].keys()
    kinds = told["hbm_by_kind"]
    # AdamW's two moments are as large as the weights
    assert kinds["optimizer"] >= 2 * told["parameters"] * 4 / 8
    modules = {one["module"] for one in told["largest_allocations"]}
    assert any("layers" in module or "embed_tokens" in module for module in modules)


def test_a_step_with_adapters_compiles_with_moments_of_the_adapters_alone() -> None:
    code, out, err = plan("--per-device-train-batch-size", "2", "--lora-rank", "8", "--json")
    assert code == 0, err
    kinds = json.loads(out)["hbm_by_kind"]
    assert 0 < kinds["optimizer"] < kinds["weights"]


@pytest.mark.slow
def test_a_plan_without_options_compiles_what_its_advice_needs() -> None:
    command = [sys.executable, "-m", "numina_finetune", "plan", "--model-name", "tiny-qwen3", "--tpu", "v5litepod-8"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "--per-device-train-batch-size" in ended.stdout


@pytest.mark.parametrize("form", ["dropless", "capacity"])
def test_a_step_with_experts_compiles_with_the_tokens_exchanged(form: str) -> None:
    options = ("--model-name", "tiny-gpt-oss", "--experts", form, "--mesh", "fsdp=2,expert=4", "--json")
    code, out, err = plan(*options, "--per-device-train-batch-size", "2")
    assert code == 0, err
    told = json.loads(out)
    # The embedding has a few of its own; by capacity each of four layers sends its tokens there and back.
    assert (told["collectives"]["all-to-all"]["count"] >= 2 * 4) == (form == "capacity")
    assert (told["kernel_flops"] > 0) == (form == "dropless")


def test_a_batch_beyond_all_memory_is_refused_with_3() -> None:
    code, out, err = plan("--per-device-train-batch-size", "65536")
    assert code == 3, err
    assert "DOES NOT FIT" in out


def test_several_slices_compile_as_such() -> None:
    code, out, err = plan("--per-device-train-batch-size", "1", "--mesh", "dcn=2,fsdp=8", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["chips"], told["slices"]) == (16, 2)
    assert told["collective_bytes"] > 0


def test_a_step_with_adafactor_compiles_with_a_fraction_of_adamws_state() -> None:
    code, out, err = plan("--per-device-train-batch-size", "2", "--optim", "adafactor", "--json")
    assert code == 0, err
    kinds = json.loads(out)["hbm_by_kind"]
    assert 0 < kinds["optimizer"] < kinds["weights"] / 5
