"""Shapes of models and of slices, known offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.plan.geometry import GEOMETRIES, geometry_of
from numina_finetune.tpu import CHIPS, parse_tpu

PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
}
"""As the published weights have them, every tensor counted once."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_built_in_geometries_have_the_published_number_of_parameters(name: str) -> None:
    values = dict(GEOMETRIES[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_folder_comes_before_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-0.6B"
    folder.mkdir()
    geometry = {**GEOMETRIES["Qwen/Qwen3-0.6B"], "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(geometry))
    found = geometry_of(RunConfig(model_name=str(folder)))
    assert found["num_hidden_layers"] == 3 and found["model_type"] == "qwen3"


def test_an_instruction_tuned_model_has_its_bases_geometry() -> None:
    tuned = geometry_of(RunConfig(model_name="meta-llama/Meta-Llama-3-8B-Instruct"))
    assert tuned == GEOMETRIES["meta-llama/Meta-Llama-3-8B"]


def test_a_kind_that_cannot_be_trained_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    with pytest.raises(ConfigError, match="gpt2 model: use one of"):
        geometry_of(RunConfig(model_name=str(tmp_path)))


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts"),
    [
        ("v5litepod-1", "v5e:1x1", 1, 1),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("v5e-16", "v5e:4x4", 16, 4),
        ("v6e-256", "v6e:16x16", 256, 64),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v4-64", "v4:2x4x4", 32, 8),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v5p-512", "v5p:4x8x8", 256, 64),
    ],
)
def test_types_name_slices(accelerator: str, topology: str, chips: int, hosts: int) -> None:
    found = parse_tpu(accelerator)
    assert (found.topology, found.chips, found.hosts) == (topology, chips, hosts)


@pytest.mark.parametrize("accelerator", ["v5litepod-12", "v5p-7", "v5p-200", "v6e-512", "v7x-8", "v5p", ""])
def test_types_that_do_not_exist_are_told(accelerator: str) -> None:
    with pytest.raises(ConfigError, match="--tpu"):
        parse_tpu(accelerator)


def test_a_v4_chip_is_one_device() -> None:
    assert parse_tpu("v4-8").topology_options(1)["chip_config_name"] == "megacore"
    assert parse_tpu("v5litepod-8").topology_options(1) == {}
    assert parse_tpu("v5litepod-8").topology_options(2) == {"num_slices": 2}


@pytest.mark.parametrize("family", CHIPS)
def test_the_interconnect_grows_with_the_slice(family: str) -> None:
    small, large = parse_tpu(f"{family}-8"), parse_tpu(f"{family}-256")
    assert 0 < small.interconnect < large.interconnect
