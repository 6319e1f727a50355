"""How parameters are split, beyond what the table says of each."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT, environment

SPECS = """
import json, torch
from transformers import AutoModelForCausalLM, Qwen3Config
from numina_finetune.mesh import MeshShape
from numina_finetune.xla.placement import parameter_specs
from numina_finetune.xla.stacking import stacking_of
sizes = dict(vocab_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = Qwen3Config(hidden_size=64, head_dim=16, intermediate_size=96, **sizes)  # 4 heads of 16 make 64: square
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
layer = "model.layers.[0::1].self_attn.{}_proj.weight"
for shape in (MeshShape(fsdp=4), MeshShape(fsdp=2, tensor=2)):
    specs = parameter_specs(model, shape, stacking_of(config))
    print(json.dumps([specs[layer.format(name)] for name in "qo"]))
"""


def test_square_matrices_are_split_alike_unless_tensor_needs_their_other_dimension() -> None:
    """Else the compiler exchanges every scalar that it spreads over both."""
    result = subprocess.run(
        [sys.executable, "-c", SPECS], env=environment(devices=1), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone, with_tensor = map(json.loads, result.stdout.splitlines()[-2:])
    shards = ["fsdp", "expert"]
    assert alone == [[None, "tensor", shards]] * 2
    assert with_tensor == [[None, "tensor", shards], [None, shards, "tensor"]]


KERNELS = """
from transformers import Qwen3Config
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.xla.splash import attention_for

for rate in (0.0, 0.1):
    sizes = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, attention_dropout=rate)
    print(attention_for("auto", config, 256, MeshShape(fsdp=1), device_type="TPU"))
try:
    attention_for("splash", config, 256, MeshShape(fsdp=1), device_type="TPU")
except ConfigError as error:
    print(error)
"""


def test_a_model_that_drops_attention_scores_is_not_given_the_kernel_that_drops_none() -> None:
    told = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env=environment(devices=1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines()[:2] == ["splash", "torch"]
    assert "attention_dropout is 0.1" in told.stdout and "--attention torch" in told.stdout
