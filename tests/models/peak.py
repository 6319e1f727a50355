"""What loading a synthetic gpt-oss checkpoint takes, as a JSON line: ``python -m tests.models.peak FOLDER SIDE``.

MXFP4 experts of the 120B's own width, so that a tensor is far larger than anything else. A side is ``native``; a mesh
of the XLA devices at hand, such as ``fsdp=2,expert=2``; or ``host 3 of 16``: what a host reads of a model that is
split over so many by fsdp, all of its devices' shards together.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, PreTrainedModel

from numina_finetune.config import RunConfig
from numina_finetune.mesh import MeshShape
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.load import open_model
from numina_finetune.models.ranges import LocalBytes
from numina_finetune.models.stream import Wanted, Weights, fill, whole

EXPERTS = 8


def write_checkpoint(folder: Path, experts: int = EXPERTS) -> None:
    """One layer, the vocabulary cut; no more than an expert of it is in memory."""
    config = GptOssConfig(vocab_size=1024, num_hidden_layers=1, num_local_experts=experts)
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    planned: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            _, inner, out = shape
            planned[f"{name}_blocks"] = "U8", (experts, out, inner // 32, 16)
            planned[f"{name}_scales"] = "U8", (experts, out, inner // 32)
        else:
            planned[name] = "BF16", shape
    header, end = {}, 0
    for name, (kind, shape) in planned.items():
        start, end = end, end + int(np.prod(shape)) * (1 if kind == "U8" else 2)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text, rng = json.dumps(header).encode(), np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (kind, shape) in planned.items():
            for _ in range(shape[0]):
                if kind == "BF16":
                    row = torch.randn(shape[1:]).bfloat16().view(torch.int16).numpy()
                elif name.endswith("_scales"):
                    row = rng.integers(110, 130, shape[1:], np.uint8)
                else:
                    row = np.frombuffer(rng.bytes(int(np.prod(shape[1:]))), np.uint8)
                file.write(row.tobytes())


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[field].split()[0]) * 1024


def load(side: str, model: PreTrainedModel, weights: Weights | None) -> Any:
    """What was loaded, to be kept until the memory is measured."""
    if side == "native":
        return fill(model, weights)
    if side.startswith("host"):
        number, hosts = (int(word) for word in side.split()[1::2])
        return read_as_host(model, weights, number, hosts)
    import torch_xla
    import torch_xla.core.xla_model as xm

    from numina_finetune.xla.placement import StepOptions, place_model
    from numina_finetune.xla.runtime import build_mesh, start_spmd
    from numina_finetune.xla.tensors import RuntimeTensors

    mesh, shape = build_mesh(side, start_spmd())
    tensors = RuntimeTensors(mesh, torch_xla.device(), weights)
    placed = place_model(model, StepOptions("pure-bf16", False, "none", "torch"), mesh, shape, tensors)
    xm.wait_device_ops()
    return placed


def read_as_host(model: PreTrainedModel, weights: Weights | None, number: int, hosts: int) -> list[torch.Tensor]:
    from numina_finetune.xla.sharding import partition_of

    assert weights is not None
    kept = []
    for name, parameter in model.named_parameters():
        part = list(whole(parameter.shape))
        spec = partition_of("gpt_oss", name, tuple(parameter.shape), MeshShape(fsdp=hosts))
        for axis, along in enumerate(spec):
            if along == "fsdp":
                step = parameter.shape[axis] // hosts
                part[axis] = slice(number * step, (number + 1) * step)
        kept.append(torch.empty([one.stop - one.start for one in part], dtype=parameter.dtype))
        weights.read([Wanted(name, tuple(part), kept[-1])])
    return kept


def main(folder: Path, side: str, experts: int = EXPERTS) -> dict[str, float]:
    if not (folder / "config.json").exists():
        # In a child, whose memory is gone with it: what the allocator keeps would hide what loading takes.
        import multiprocessing

        child = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder, experts))
        child.start()
        child.join()
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    if "=" in side:  # what the runtime takes is not the model's
        from numina_finetune.xla.runtime import start_spmd

        start_spmd()
    model, weights = open_model(RunConfig(model_name=str(folder), precision="pure-bf16"), tokenizer)
    read, plain = 0, LocalBytes.read

    def counted(self: LocalBytes, start: int, end: int) -> torch.Tensor:
        nonlocal read
        read += end - start
        return plain(self, start, end)

    LocalBytes.read = counted  # type: ignore[method-assign]
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    before, began, cpu = resident("VmRSS"), time.monotonic(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    kept = load(side, model, weights)
    seconds, worked = time.monotonic() - began, time.process_time() - cpu
    held = sum(tensor.nbytes for tensor in kept) if isinstance(kept, list) else sum(sizes)
    return {
        "peak": resident("VmHWM") - before,
        "own": held,
        "largest": max(sizes),
        "read": read,
        "stored": (folder / "model.safetensors").stat().st_size,
        "seconds": seconds,
        "cpu_seconds": worked,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))))
