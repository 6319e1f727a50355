"""Adapters on a mesh: one program, which goes on from the native backend's checkpoint, and can be planned."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from numina_finetune.config import RunConfig
from numina_finetune.plan.geometry import geometry_of
from tests.conftest import environment, train
from tests.programs import run_module
from tests.test_parity import EXACT
from tests.xla.test_checkpoints import go_back
from tests.xla.test_hygiene import CLEAN

OPTIONS = (
    *("--model-name", "tiny-gpt-oss", "--lora-rank", "4", "--lora-export", "adapter"),
    *("--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--global-batch-size", "4", *EXACT),
)


@pytest.mark.parametrize(
    "options",
    [
        ("--mesh", "fsdp=2,expert=2"),
        pytest.param(("--mesh", "fsdp=2,tensor=2", "--no-scan-layers"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_adapters_on_a_mesh_follow_the_native_backend_with_one_compilation(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole = train(tmp_path / "out", *OPTIONS, "--per-device-train-batch-size", "4", env=environment())
    assert whole.code == 0, whole.output
    losses = whole.losses
    go_back(whole, 2)
    resumed = train(tmp_path / "out", *OPTIONS, *options, env=environment(devices=4))
    assert resumed.code == 0, resumed.output
    assert "resumed from the checkpoint of step 2/4" in resumed.output
    assert CLEAN in resumed.output
    assert resumed.losses == pytest.approx(losses, rel=1e-5)


def test_a_step_with_adapters_is_traced_for_plan_with_frozen_weights_that_it_does_not_replace(tmp_path: Path) -> None:
    config = RunConfig(model_name="tiny-qwen3", lora_rank=4, max_seq_length=128)
    request = {
        "config": config.to_mapping(),
        "geometry": geometry_of(config),
        "mesh": {"fsdp": 2, "tensor": 2},
        "rows": 4,
        "module": str(tmp_path / "module"),
        "arguments": str(tmp_path / "arguments"),
    }
    (tmp_path / "request").write_text(json.dumps(request), encoding="utf-8")
    env = environment(devices=4, XLA_HLO_DEBUG="1", XLA_IR_DEBUG="1", JAX_PLATFORMS="cpu", USE_TORCH_XLA="true")
    traced = run_module("numina_finetune.xla.trace", str(tmp_path / "request"), env=env)
    assert traced.returncode == 0, traced.stderr[-3000:]
    arguments = json.loads((tmp_path / "arguments").read_text(encoding="utf-8"))["arguments"]
    weights = {one["name"]: one for one in arguments if one["kind"] == "weights"}
    assert {name for name, one in weights.items() if one["dtype"] == "float32"} == {n for n in weights if "lora_" in n}
    assert all("lora_" in one["name"] for one in arguments if one["kind"] == "optimizer")
    key = "model.layers.[0::1].self_attn.q_proj.lora_"
    assert weights[f"{key}A.weight"]["sharding"] != weights[f"{key}B.weight"]["sharding"]
    named = set(
        re.findall(r"module=(?:backward )?([\w.*]+)", gzip.decompress((tmp_path / "module").read_bytes()).decode())
    )
    assert {"CausalLoss", "model.model.layers.0.*.mlp.up_proj"} <= named, "operations carry the model's own names"
    assert not any(name.startswith(".") for name in named), named
