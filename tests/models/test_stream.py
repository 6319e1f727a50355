"""Weights read a slice at a time are those that transformers reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.models import stream
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.load import load_config, load_model
from numina_finetune.models.mxfp4 import dequantise
from tests.conftest import ROOT, environment
from tests.models.folders import CONFIGS, quantise_randomly, save


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SLICE_BYTES", 1000)


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, buffer), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
@pytest.mark.parametrize("shards", ["one file", "many files"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_is_the_one_that_transformers_loads(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, shards: str, precision: str
) -> None:
    save(CONFIGS[name], tmp_path, **({"max_shard_size": "100KB"} if shards == "many files" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards == "many files")
    model = load_model(RunConfig(model_name=str(tmp_path), precision=precision), tokenizer)
    dtype = torch.float32 if precision == "bf16" else torch.bfloat16
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kept", ["the decoder's own names", "both of a tied pair"])
def test_other_ways_to_name_the_same_weights_are_understood(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kept: str
) -> None:
    expected = save(CONFIGS["qwen3, tied"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if kept == "both of a tied pair":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    else:
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_model(RunConfig(model_name=str(tmp_path), precision="pure-bf16"), tokenizer), expected)


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_released_experts_are_loaded_as_transformers_dequantises_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, precision: str
) -> None:
    save(CONFIGS["gpt-oss"], tmp_path)
    quantise_randomly(tmp_path)
    run = RunConfig(model_name=str(tmp_path), precision=precision)
    model = load_model(run, tokenizer)
    dtype = torch.float32 if precision == "bf16" else torch.bfloat16
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    load_config(run, tokenizer).save_pretrained(tmp_path / "exported")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "exported"), "quantization_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5760, 90), (2880, 90)], ids=["gate_up_proj", "down_proj"])
def test_every_byte_and_scale_is_dequantised_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One expert of the 120B; all 256 bytes and all 256 scales are among them."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    assert len(blocks.unique()) == len(scales.unique()) == 256
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
    ours = dequantise(blocks, scales).T.to(dtype).contiguous()
    finite = scales.ne(255).repeat_interleave(32, dim=1).T  # 255 is no number, by the format's word
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    assert torch.equal(ours.view(bits)[finite], expected.view(bits)[finite])
    assert torch.equal(ours.isnan(), expected.isnan())


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(CONFIGS["qwen3, tied"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    run = RunConfig(model_name=str(tmp_path))

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError) as caught:
            load_model(run, tokenizer)
        return str(caught.value)

    last = "model.layers.1.mlp.up_proj.weight"
    said = refused({name: tensor for name, tensor in weights.items() if name != last})
    assert f"lack 1 of the model's weights, such as {last}" in said and str(tmp_path) in said
    assert f"{last} is [96, 63] in the model's files, [96, 64]" in refused(
        weights | {last: weights[last][:, 1:].contiguous()}
    )
    assert "ties lm_head.weight to model.embed_tokens.weight" in refused(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    )


def test_weights_quantised_in_another_way_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(CONFIGS["qwen3"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="quantised weights: give the model they were made from"):
        load_model(RunConfig(model_name=str(tmp_path)), tokenizer)


def test_besides_the_model_less_than_its_largest_tensor_is_in_memory(tmp_path: Path) -> None:
    """In a process of its own, by the kernel's count of the most that was ever resident."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.models.peak", str(tmp_path)],
        env=environment(USE_TORCH_XLA="false"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["peak"] < measured["model"] + 2 * measured["largest"], measured
