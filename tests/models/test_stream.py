"""Weights read a slice at a time are those that transformers reads."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from numina_finetune.models import staged, stream
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.load import load_config, load_model, open_model
from numina_finetune.models.mxfp4 import dequantise
from numina_finetune.models.ranges import LocalBytes, TensorFile
from numina_finetune.models.stage import stage_model
from numina_finetune.models.stream import Wanted
from numina_finetune.storage import GcsStore
from tests.conftest import ROOT, environment
from tests.gcs import gcs
from tests.models.folders import CONFIGS, quantise_randomly, save


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SLICE_BYTES", 1000)
    monkeypatch.setattr(stream, "DEQUANTISED", 500)


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


def test_a_file_that_is_cut_short_is_refused_with_its_name_and_the_tensors(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """And once it is whole, the load begins anew, whatever was read before."""
    expected = save(CONFIGS["qwen3"], tmp_path)
    path, run = tmp_path / "model.safetensors", RunConfig(model_name=str(tmp_path), precision="pure-bf16")
    data = path.read_bytes()

    def refused(changed: bytes) -> str:
        path.write_bytes(changed)
        with pytest.raises(ConfigError) as caught:
            load_model(run, tokenizer)
        assert str(path) in str(caught.value)
        return str(caught.value)

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    assert f"{last} ends at byte {len(data)}, the file at {len(data) - 100}" in refused(data[:-100])
    for damaged in (data[:100], b"", b"<html>" + data[6:], data.replace(b'"BF16"', b'"BF1"', 1)):
        assert "damaged or cut short" in refused(damaged)
    assert "is of type I64" in refused(data.replace(b'"BF16"', b'"I64" ', 1))
    assert "bytes for F32" in refused(data.replace(b'"BF16"', b'"F32" '))
    path.write_bytes(data)
    assert_same(load_model(run, tokenizer), expected)


def test_a_file_that_loses_its_end_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CONFIGS["qwen3"], tmp_path)
    run, whole = RunConfig(model_name=str(tmp_path)), LocalBytes.read
    model, weights = open_model(run, tokenizer)
    monkeypatch.setattr(LocalBytes, "read", lambda self, start, end: whole(self, start, end)[:-1])
    with pytest.raises(ConfigError, match=r"ends before byte .*copy or download it again"):
        stream.fill(model, weights)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(CONFIGS["qwen3"], tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    named = json.loads(index.read_text(encoding="utf-8"))
    first, *_, last = sorted(set(named["weight_map"].values()))
    name = next(name for name, file in named["weight_map"].items() if file == first)
    named["weight_map"][name] = last
    index.write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{last} lacks {name}, which its index names"):
        load_model(RunConfig(model_name=str(tmp_path)), tokenizer)


# --- parts ------------------------------------------------------------------------------------------------------------


class Counted:
    """Bytes that are read of files on this disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        plain = LocalBytes.read

        def read(this: LocalBytes, start: int, end: int) -> torch.Tensor:
            self.count += end - start
            return plain(this, start, end)

        monkeypatch.setattr(LocalBytes, "read", read)


def cut(tensor: torch.Tensor, axis: int, parts: int) -> list[tuple[slice, ...]]:
    """The parts that so many hosts hold of a tensor that is split along one dimension."""
    step = tensor.shape[axis] // parts
    own = (slice(step * number, step * (number + 1)) for number in range(parts))
    whole = stream.whole(tensor.shape)
    return [(*whole[:axis], one, *whole[axis + 1 :]) for one in own]


@pytest.mark.parametrize(
    ("name", "axis", "hosts", "share"),
    [
        ("model.embed_tokens.weight", 0, 4, 1 / 4),
        ("model.embed_tokens.weight", 1, 4, 1.0),  # a part of each row: what lies between is read too
        ("model.layers.0.mlp.experts.gate_up_proj_bias", 0, 2, 1 / 2),
        ("model.layers.1.mlp.experts.gate_up_proj", 0, 4, 1 / 4),
        ("model.layers.1.mlp.experts.gate_up_proj", 2, 4, 1 / 4),
        ("model.layers.1.mlp.experts.gate_up_proj", 1, 8, 1.0),  # a quarter of a group: all of it is dequantised
        ("model.layers.1.mlp.experts.down_proj", 1, 4, 1.0),
    ],
)
def test_a_host_reads_no_more_than_its_part_spans(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    axis: int,
    hosts: int,
    share: float,
) -> None:
    save(CONFIGS["gpt-oss"], tmp_path)
    quantise_randomly(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).get_parameter(name)
    _, weights = open_model(RunConfig(model_name=str(tmp_path)), tokenizer)
    assert weights is not None
    header = TensorFile(LocalBytes(tmp_path / "model.safetensors"))
    own = [stored for stored in header.names if stored.removesuffix("_blocks").removesuffix("_scales") == name]
    stored = sum(math.prod(header.shape(one)) * header.item_bytes(one) for one in own)
    counted = Counted(monkeypatch)
    for part in cut(expected, axis, hosts):
        found, before = torch.empty_like(expected[part]), counted.count
        weights.read([Wanted(name, part, found)])
        assert torch.equal(found, expected[part])
        assert counted.count - before <= stored * share


def test_what_several_devices_hold_is_read_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = save(CONFIGS["gpt-oss"], tmp_path)
    _, weights = open_model(RunConfig(model_name=str(tmp_path)), tokenizer)
    assert weights is not None
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensor = expected.get_parameter(name)
    parts = [part for axis in range(3) for part in cut(tensor, axis, 4)]
    targets = [torch.empty_like(tensor[part]) for part in parts]
    counted = Counted(monkeypatch)
    weights.read([Wanted(name, part, target) for part, target in zip(parts, targets, strict=True)])
    assert all(torch.equal(target, tensor[part]) for part, target in zip(parts, targets, strict=True))
    assert counted.count == tensor.nbytes


def test_without_weights_none_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a resume, which takes them from its checkpoint."""
    save(CONFIGS["qwen3"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model, weights = open_model(RunConfig(model_name=str(tmp_path)), tokenizer, weights=False)
    assert weights is None and all(parameter.is_meta for parameter in model.parameters())
    stream.fill(model, weights)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("files", ["one file", "many files"])
def test_of_a_model_in_a_bucket_only_the_ranges_that_are_needed_are_fetched(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    folder = tmp_path / "source"
    save(CONFIGS["gpt-oss"], folder, **({"max_shard_size": "100KB"} if files == "many files" else {}))
    if files == "one file":
        quantise_randomly(folder)
    tokenizer.save_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(staged, "BLOCK", 256)
    fetched: list[int] = []
    plain = GcsStore.read

    def read(self: GcsStore, name: str, **options: Any) -> bytes:
        data = plain(self, name, **options)
        fetched.append(len(data) if name.endswith(".safetensors") else 0)
        return data

    with gcs() as service:
        url = stage_model(str(folder), None, f"{service.url}/models").url
        monkeypatch.setattr(GcsStore, "read", read)
        model, weights = open_model(RunConfig(model_name=url), tokenizer)
        assert weights is not None
        headers = sum(fetched)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        name = "model.layers.1.mlp.experts.gate_up_proj"
        one = (slice(3, 4), slice(0, 64), slice(0, 64))
        found, before = torch.empty(1, 64, 64), len(fetched)
        weights.read([Wanted(name, one, found)])
        assert torch.equal(found, expected.get_parameter(name)[3:4])
        requests = 2 if files == "one file" else 1  # blocks and scales
        assert len(fetched) - before == requests
        assert sum(fetched) - headers <= 64 * 64 * 2 + 2 * requests * 256, "the expert, and the blocks around it"
        stream.fill(model, weights)
    assert_same(model, expected)


def test_weights_quantised_in_another_way_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(CONFIGS["qwen3"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="quantised weights: give the model they were made from"):
        load_model(RunConfig(model_name=str(tmp_path)), tokenizer)


@pytest.mark.parametrize(
    "side", ["native", *(pytest.param(side, marks=pytest.mark.slow) for side in ("fsdp=2,expert=2", "host 3 of 16"))]
)
def test_besides_its_own_shards_less_than_the_largest_tensor_twice_is_in_memory(tmp_path: Path, side: str) -> None:
    """In a process of its own, by the kernel's count of the most that was ever resident."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.models.peak", str(tmp_path), side],
        env=environment(devices=4) if "=" in side else environment(USE_TORCH_XLA="false"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["peak"] < measured["own"] + 2 * measured["largest"], measured
    assert measured["read"] <= measured["stored"], measured
